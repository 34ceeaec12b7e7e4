"""One conversation in the terminal and as a figure: its text, the supervised tokens, and the patches."""

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from umbrella.base import UserError
from umbrella.cohort_report.conversation import (
    describe_volume,
    draw_volumes,
    find_conversation,
    format_summary,
    format_turns,
)
from umbrella.conversations.schema import Conversation
from umbrella.data.masking import loss_weights, split_by_weight
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality
from umbrella.volumes.store import VolumeStore

END = "<|im_end|>\n"


@pytest.fixture
def example(talk: Callable[..., Conversation], tokenizer: Any, modalities: dict[str, Modality]) -> Example:
    """Two questions, two answers, a volume; [brackets], which are markup in rich, and an invisible character."""
    conversation = talk(
        ("user", [("sMRI", "/d/scan[1].nii.gz"), "Is it [bold]?\nSay\u200b."]),
        ("assistant", "Yés."),
        ("user", "Age?"),
        ("assistant", "63.5"),
        metadata={"subject_id": "s1", "subject_label": 63.5, "target": "age"},
    )
    return Renderer(tokenizer, modalities).render(conversation)


SUPERVISED = {
    ("assistant", True, False): [f"Yés.{END}", f"63.5{END}"],
    ("assistant", False, False): ["Yés.", "63.5"],
    ("last_assistant", True, False): [f"63.5{END}"],
    ("last_assistant", True, True): [f"<|im_start|>assistant\n63.5{END}"],
    ("all", False, False): ["\nIs it [bold]?\nSay\u200b.", "Yés.", "Age?", "63.5"],
    # Nothing precedes the first token, so nothing predicts it; placeholders are never supervised.
    ("all", True, True): [
        "user\n",
        f"\nIs it [bold]?\nSay\u200b.{END}",
        f"<|im_start|>assistant\nYés.{END}",
        f"<|im_start|>user\nAge?{END}",
        f"<|im_start|>assistant\n63.5{END}",
    ],
}


def printed(*shown: Any, width: int = 200) -> str:
    out = io.StringIO()
    for one in shown:
        Console(file=out, width=width, color_system=None).print(one, soft_wrap=width < 100)
    return out.getvalue()


@pytest.mark.parametrize("choice", SUPERVISED, ids=str)
def test_the_supervised_text_is_in_brackets_or_coloured(example: Example, tokenizer: Any, choice: Any) -> None:
    policy = MaskPolicy(supervise=choice[0], end_of_turn=choice[1], turn_header=choice[2])
    found = split_by_weight(example, policy, tokenizer)
    body = printed(format_turns(found, colours=False), width=20).partition("\n")[2]
    marked = [text.replace("↵\n", "\n").replace("↵", "\n") for text in re.findall("⟦(.*?)⟧", body, re.DOTALL)]
    assert [text.replace("\\u200b", "\u200b") for text in marked] == SUPERVISED[choice]
    coloured = format_turns(found, colours=True)
    assert "⟦" not in coloured.plain
    green = "".join(coloured.plain[s.start : s.end] for s in coloured.spans if "green" in str(s.style))
    in_brackets = "".join(text.strip("\n") for text in re.findall("⟦(.*?)⟧", body, re.DOTALL))
    assert green.replace("\n", "") == "supervised" + in_brackets.replace("\n", "")


def test_the_pieces_contain_all_tokens_once_and_in_order(example: Example, tokenizer: Any) -> None:
    policy = MaskPolicy(supervise="all", turn_header=True)
    found = split_by_weight(example, policy, tokenizer)
    assert sum(piece.tokens for piece in found) == len(example.input_ids)
    assert sum(piece.tokens for piece in found if piece.supervised) == np.count_nonzero(loss_weights(example, policy))
    image = next(piece for piece in found if piece.kind == "image")
    assert (image.text, image.tokens, image.supervised) == ("<image: 2 tokens, sMRI, scan[1].nii.gz>", 2, False)
    text = "".join(piece.text for piece in found).replace(image.text, "<image>" * 2)
    assert text == tokenizer.decode(example.input_ids)


def test_the_summary_counts_tokens_and_states_mask_policy_and_label(example: Example, tokenizer: Any) -> None:
    policy = MaskPolicy(supervise="last_assistant")
    text = " ".join(re.sub("[│┃]", " ", printed(format_summary(example, policy))).split())
    supervised = int(loss_weights(example, policy).sum())
    assert f"all {len(example.input_ids)} {supervised} " in text
    assert "user image 2 0" in text
    assert "mask policy: supervise=last_assistant, end_of_turn=True, turn_header=False" in text
    assert "label: age = 63.5, subject s1" in text
    assert "weight" not in text


def test_weights_are_shown_if_they_differ_from_1(example: Example, tokenizer: Any) -> None:
    policy = MaskPolicy(normalize="turn", task_weights={"T1": 3})  # 7 tokens of text and end ("é" is two), then 6
    view = format_turns(split_by_weight(example, policy, tokenizer), colours=False)
    text = printed(view, format_summary(example, policy))
    assert [line for line in text.splitlines() if line.startswith("turn ")] == [
        "turn 1, user",
        "turn 2, assistant, 0.4286 per target",
        "turn 3, user",
        "turn 4, assistant, 0.5 per target",
    ]
    text = " ".join(re.sub("[│┃]", " ", text).split())
    assert "role part tokens supervised weight" in text
    assert "assistant end 4 4 1.8571 assistant header 22 0 0 assistant text 9 9 4.1429" in text
    assert f"all {len(example.input_ids)} 13 6 " in text
    plain = format_turns(split_by_weight(example, MaskPolicy(), tokenizer), colours=False)
    assert "per target" not in plain.plain


def test_a_conversation_is_found_by_id_or_index_and_a_wrong_id_gets_similar_ones(
    talk: Callable[..., Conversation],
) -> None:
    names = ["sub-01_sex", "sub-01_age", "zebra"]
    several = [talk(("user", "?"), ("assistant", "!"), task_id=name) for name in names]
    assert find_conversation(several, "train", "zebra").task_id == "zebra"
    assert find_conversation(several, "train", sample=1).task_id == "sub-01_age"
    with pytest.raises(UserError, match=r"--task-id sub-1_sex: not among the 3 .* did you mean sub-01_sex, sub-01_age"):
        find_conversation(several, "train", "sub-1_sex")
    with pytest.raises(UserError, match="its first is sub-01_sex"):
        find_conversation(several, "train", "qqq")
    for sample in (3, -1):
        with pytest.raises(UserError, match=f"--sample {sample}: train has the samples 0 to 2"):
            find_conversation(several, "train", sample=sample)


def test_the_figure_has_the_patch_grid_over_three_planes_of_each_volume(
    cohort: dict[str, Conversation], store: VolumeStore
) -> None:
    axes = draw_volumes(cohort["three"], store).axes
    across = [
        sorted({line.get_xdata()[0] for line in a.lines if line.get_xdata()[0] == line.get_xdata()[1]}) for a in axes
    ]
    # sMRI has patches of (2, 4, 4) on a grid of 4; dMRI of 4. X runs to the right, in the sagittal plane Y.
    assert across[:6] == [[0, 2, 4], [0, 2, 4], [0, 4], [0, 4], [0, 4], [0, 4]]
    assert [a.get_title().split(",")[0] for a in axes] == ["axial", "coronal", "sagittal"] * 3


def test_the_caption_of_a_series_states_the_frames_of_the_window() -> None:
    series = Modality(grid=(4, 4, 4, 3), patch=(4, 4, 2, 3), frame_stride=2, window_stride=2)
    text = describe_volume(np.zeros((12, 4, 4, 4)), series)
    assert "grid 4×4×4×3, patch 4×4×2×3: 2 tokens" in text
    # Windows start at 0, 2, 4 and 6.
    assert "mean of frames 2 to 6 in steps of 2, out of 12: the middle one of 4 windows" in text
    assert "its only window" in describe_volume(np.zeros((5, 4, 4, 4)), series)

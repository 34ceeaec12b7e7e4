"""One conversation in the terminal and as a picture: exact text, what the loss sees, and the patches."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image
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
    """Two questions, two answers, a volume; [brackets] that rich would take for its own, and an invisible character."""
    conversation = talk(
        ("user", [("sMRI", "/d/scan[1].nii.gz"), "Is it [bold]?\nSay\u200b."]),
        ("assistant", "Yés."),
        ("user", "Age?"),
        ("assistant", "63.5"),
        metadata={"subject_id": "s1", "subject_label": 63.5, "target": "age"},
    )
    return Renderer(tokenizer, modalities).render(conversation)


HEADERS = ["<|im_start|>user\n", "<|im_start|>assistant\n"] * 2
SUPERVISED = {
    ("assistant", True, False): [f"Yés.{END}", f"63.5{END}"],
    ("assistant", False, False): ["Yés.", "63.5"],
    ("last_assistant", True, False): [f"63.5{END}"],
    ("last_assistant", True, True): [f"<|im_start|>assistant\n63.5{END}"],
    ("all", False, False): ["\nIs it [bold]?\nSay\u200b.", "Yés.", "Age?", "63.5"],
    # Nothing stands before the first token that could predict it, and no policy makes a target of a placeholder.
    ("all", True, True): [
        "user\n",
        f"\nIs it [bold]?\nSay\u200b.{END}",
        f"<|im_start|>assistant\nYés.{END}",
        f"<|im_start|>user\nAge?{END}",
        f"<|im_start|>assistant\n63.5{END}",
    ],
}


@pytest.mark.parametrize("choice", SUPERVISED, ids=str)
def test_exactly_what_the_loss_sees_stands_in_the_brackets(example: Example, tokenizer: Any, choice: Any) -> None:
    policy = MaskPolicy(supervise=choice[0], end_of_turn=choice[1], turn_header=choice[2])
    out = io.StringIO()
    view = format_turns(split_by_weight(example, policy, tokenizer), colours=False)
    Console(file=out, width=20, color_system=None).print(view, soft_wrap=True)
    body = out.getvalue().partition("\n")[2]
    marked = [text.replace("↵\n", "\n").replace("↵", "\n") for text in re.findall("⟦(.*?)⟧", body, re.DOTALL)]
    assert [text.replace("\\u200b", "\u200b") for text in marked] == SUPERVISED[choice]


def test_with_colours_the_same_text_is_marked_by_style_and_brackets_are_not_needed(
    example: Example, tokenizer: Any
) -> None:
    policy = MaskPolicy(supervise="last_assistant")
    view = format_turns(split_by_weight(example, policy, tokenizer), colours=True)
    assert "⟦" not in view.plain
    marked = [view.plain[s.start : s.end] for s in view.spans if "green" in str(s.style)]
    assert "".join(marked) == "supervised" + "63.5<|im_end|>↵"


def test_the_pieces_are_all_tokens_once_and_in_order(example: Example, tokenizer: Any) -> None:
    policy = MaskPolicy(supervise="all", turn_header=True)
    found = split_by_weight(example, policy, tokenizer)
    assert sum(piece.tokens for piece in found) == len(example.input_ids)
    assert sum(piece.tokens for piece in found if piece.supervised) == np.count_nonzero(loss_weights(example, policy))
    image = next(piece for piece in found if piece.kind == "image")
    assert (image.text, image.tokens, image.supervised) == ("<image: 2 tokens, sMRI, scan[1].nii.gz>", 2, False)
    text = "".join(piece.text for piece in found).replace(image.text, "<image>" * 2)
    assert text == tokenizer.decode(example.input_ids)


def test_each_volume_stands_at_its_own_placeholders(examples: dict[str, Example], tokenizer: Any) -> None:
    shown = [p.text for p in split_by_weight(examples["three"], MaskPolicy(), tokenizer) if p.kind == "image"]
    assert shown == [
        "<image: 2 tokens, sMRI, s2.nii>",
        "<image: 1 tokens, dMRI, d.nii>",
        "<image: 3 tokens, fMRI, f2.nii>",
    ]


def test_the_summary_counts_tokens_and_names_policy_and_truth(example: Example) -> None:
    out = io.StringIO()
    policy = MaskPolicy(supervise="last_assistant")
    Console(file=out, width=100).print(format_summary(example, policy))
    printed = " ".join(re.sub("[│┃]", " ", out.getvalue()).split())
    targets = int(loss_weights(example, policy).sum())
    assert f"all {len(example.input_ids)} {targets} " in printed
    assert "user image 2 0" in printed
    assert "mask policy: supervise=last_assistant, end_of_turn=True, turn_header=False" in printed
    assert "label: age = 63.5, subject s1" in printed
    assert "weight" not in printed


def test_weights_are_told_where_they_are_not_1(example: Example, tokenizer: Any) -> None:
    policy = MaskPolicy(normalize="turn", task_weights={"T1": 3})  # 7 tokens of text and end ("é" is two), then 6
    out = io.StringIO()
    console = Console(file=out, width=200)
    console.print(format_turns(split_by_weight(example, policy, tokenizer), colours=False))
    console.print(format_summary(example, policy))
    heads = [line for line in out.getvalue().splitlines() if line.startswith("turn ")]
    assert heads == [
        "turn 1, user",
        "turn 2, assistant, 0.4286 per target",
        "turn 3, user",
        "turn 4, assistant, 0.5 per target",
    ]
    printed = " ".join(re.sub("[│┃]", " ", out.getvalue()).split())
    assert "role part tokens supervised weight" in printed
    assert "assistant end 4 4 1.8571 assistant header 22 0 0 assistant text 9 9 4.1429" in printed
    assert f"all {len(example.input_ids)} 13 6 " in printed
    plain = format_turns(split_by_weight(example, MaskPolicy(), tokenizer), colours=False)
    assert "per target" not in plain.plain


def test_a_conversation_is_found_by_name_or_number_and_a_wrong_name_gets_near_ones(
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


def test_the_picture_has_the_patch_grid_over_three_planes_of_each_volume(
    cohort: dict[str, Conversation], store: VolumeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plt, "close", lambda figure: None)  # to look into it
    draw_volumes(cohort["three"], store, tmp_path / "new" / "p.png")
    axes = plt.gcf().axes
    monkeypatch.undo()
    plt.close("all")
    assert len(axes) == 9
    across = [
        sorted({line.get_xdata()[0] for line in a.lines if line.get_xdata()[0] == line.get_xdata()[1]}) for a in axes
    ]
    # sMRI has patches of (2, 4, 4) on a grid of 4; dMRI of 4. X runs to the right, in the sagittal plane Y.
    assert across[:6] == [[0, 2, 4], [0, 2, 4], [0, 4], [0, 4], [0, 4], [0, 4]]
    titles = [a.get_title().split(",")[0] for a in axes]
    assert titles == ["axial", "coronal", "sagittal"] * 3
    with Image.open(tmp_path / "new" / "p.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 50


def test_the_caption_of_a_series_says_which_frames_are_seen() -> None:
    series = Modality(grid=(4, 4, 4, 3), patch=(4, 4, 2, 3), frame_stride=2, window_stride=2)
    words = describe_volume(np.zeros((12, 4, 4, 4)), series)
    assert "grid 4×4×4×3, patch 4×4×2×3: 2 tokens" in words
    # Windows start at 0, 2, 4 and 6.
    assert "mean of frames 2 to 6 in steps of 2, out of 12: the middle one of 4 windows" in words
    assert "its only window" in describe_volume(np.zeros((5, 4, 4, 4)), series)


def test_a_conversation_without_volumes_has_no_picture(
    cohort: dict[str, Conversation], store: VolumeStore, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="none: shows no volume"):
        draw_volumes(cohort["none"], store, tmp_path / "p.png")


def test_a_volume_that_cannot_be_used_is_named(
    talk: Callable[..., Conversation], store: VolumeStore, tmp_path: Path
) -> None:
    flat = tmp_path / "flat.nii"
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), flat)
    with pytest.raises(UserError, match=f"{flat}: every voxel is 1"):
        draw_volumes(talk(("user", [("sMRI", flat)]), ("assistant", "!")), store, tmp_path / "p.png")

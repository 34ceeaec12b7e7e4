"""Mask policies: supervised text and weights, each written out by hand."""

from collections.abc import Callable
from itertools import groupby, product
from typing import Any, get_args

import numpy as np
import pytest

from tests.conftest import MODALITIES
from umbrella.base import UserError
from umbrella.cli import parse
from umbrella.config import Settings, load_settings
from umbrella.conversations.schema import Conversation
from umbrella.data.masking import loss_weights
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.scoring import ANSWER_ONLY
from umbrella.modality import Modality

END = "<|im_end|>\n"
USER = "<|im_start|>user\n"
ASSISTANT = "<|im_start|>assistant\n"
CHOICES = {
    name: get_args(MaskPolicy.model_fields[name].annotation) or (False, True)
    for name in ("supervise", "end_of_turn", "turn_header", "normalize")
}
Talk = Callable[..., Conversation]
POLICIES = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]


@pytest.fixture
def example(tokenizer: Any, modalities: dict[str, Modality], talk: Talk) -> Example:
    turns = [("user", [("sMRI", "s.nii"), "Q1"]), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    return Renderer(tokenizer, modalities).render(talk(*turns))


@pytest.mark.parametrize(
    ("supervise", "end_of_turn", "turn_header", "text"),
    [
        ("assistant", False, False, "A1A2"),
        ("assistant", True, False, f"A1{END}A2{END}"),
        ("assistant", False, True, f"{ASSISTANT}A1{ASSISTANT}A2"),
        ("assistant", True, True, f"{ASSISTANT}A1{END}{ASSISTANT}A2{END}"),
        ("last_assistant", False, False, "A2"),
        ("last_assistant", True, False, f"A2{END}"),
        ("last_assistant", False, True, f"{ASSISTANT}A2"),
        ("last_assistant", True, True, f"{ASSISTANT}A2{END}"),
        # The line break after a volume is text. Placeholders are never targets.
        ("all", False, False, "\nQ1A1Q2A2"),
        ("all", True, False, f"\nQ1{END}A1{END}Q2{END}A2{END}"),
        # No token precedes the first one, so it cannot be predicted.
        ("all", False, True, f"user\n\nQ1{ASSISTANT}A1{USER}Q2{ASSISTANT}A2"),
        ("all", True, True, f"user\n\nQ1{END}{ASSISTANT}A1{END}{USER}Q2{END}{ASSISTANT}A2{END}"),
    ],
)
def test_policy_supervises_exactly_this_text(
    example: Example, tokenizer: Any, supervise: Any, end_of_turn: bool, turn_header: bool, text: str
) -> None:
    policy = MaskPolicy(supervise=supervise, end_of_turn=end_of_turn, turn_header=turn_header)
    weights = loss_weights(example, policy)
    assert set(weights.tolist()) == {0, 1}
    assert tokenizer.decode(example.input_ids[weights == 1]) == text


@pytest.mark.parametrize(
    ("policy", "weighted"),
    [
        ({}, [("no", 1), (END, 1), ("rather", 1), (END, 1)]),
        # One token for each letter, and two for an end: 4 and 8 of them in the two turns.
        ({"normalize": "turn"}, [("no", 1 / 4), (END, 1 / 4), ("rather", 1 / 8), (END, 1 / 8)]),
        ({"normalize": "sample"}, [("no", 1 / 12), (END, 1 / 12), ("rather", 1 / 12), (END, 1 / 12)]),
        ({"normalize": "turn", "end_of_turn": False}, [("no", 1 / 2), ("rather", 1 / 6)]),
        ({"normalize": "sample", "supervise": "last_assistant"}, [("rather", 1 / 8), (END, 1 / 8)]),
        # 5 tokens of the first header have one before them; 11 are an assistant's.
        (
            {"normalize": "turn", "supervise": "all", "turn_header": True, "end_of_turn": False},
            [
                *[("user\n", 1 / 7), ("Q1", 1 / 7), (ASSISTANT, 1 / 13), ("no", 1 / 13)],
                *[(USER, 1 / 8), ("Q2", 1 / 8), (ASSISTANT, 1 / 17), ("rather", 1 / 17)],
            ],
        ),
        ({"task_weights": {"T3": 2.5, "T1": 9}}, [("no", 2.5), (END, 2.5), ("rather", 2.5), (END, 2.5)]),
        ({"task_weights": {"T1": 9}}, [("no", 1), (END, 1), ("rather", 1), (END, 1)]),
        (
            {"task_weights": {"T3": 3}, "normalize": "turn"},
            [("no", 3 / 4), (END, 3 / 4), ("rather", 3 / 8), (END, 3 / 8)],
        ),
        ({"task_weights": {"T3": 3}, "normalize": "sample", "end_of_turn": False}, [("no", 3 / 8), ("rather", 3 / 8)]),
        (
            {"preset": "upstream"},
            [(ASSISTANT, 1), ("no", 1), (END, 1), (ASSISTANT, 1), ("rather", 1), (END, 1)],
        ),
    ],
    ids=str,
)
def test_policy_gives_exactly_these_weights(tokenizer: Any, talk: Talk, policy: dict, weighted: list) -> None:
    turns = [("user", "Q1"), ("assistant", "no"), ("user", "Q2"), ("assistant", "rather")]
    example = Renderer(tokenizer, {}).render(talk(*turns, task_type="T3"))
    weights = loss_weights(example, MaskPolicy(**policy))
    assert weights.dtype == np.float32
    seen = []
    for span in example.spans:
        for weight, of_weight in groupby(range(span.start, span.stop), key=lambda i: weights[i]):
            if weight:
                seen.append((tokenizer.decode(example.input_ids[list(of_weight)]), weight))
    assert seen == [(text, np.float32(weight)) for text, weight in weighted]


def test_placeholders_and_the_first_token_have_weight_0_under_every_policy(examples: dict[str, Example]) -> None:
    for policy, example in product(POLICIES, examples.values()):
        weights = loss_weights(example, MaskPolicy(**policy, task_weights={"T1": 2}))
        assert len(weights) == len(example.input_ids)
        assert weights.any()
        assert weights[0] == 0
        assert not any(weights[span.start : span.stop].any() for span in example.spans if span.kind == "image")


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0.0}, {"train": False}], ids=str)
def test_turn_with_a_flag_out_of_the_loss_has_no_targets_and_other_turns_keep_theirs(
    example: Example, tokenizer: Any, flag: dict
) -> None:
    raw = example.conversation.model_dump(mode="json")
    opposite = {key: not value for key, value in flag.items()}
    raw["conversations"][1] |= flag
    raw["conversations"][2] |= opposite
    raw["conversations"][3] |= opposite
    flagged = Renderer(tokenizer, MODALITIES).render(Conversation.model_validate(raw))
    assert flagged.input_ids.tolist() == example.input_ids.tolist()
    for policy in POLICIES:
        expected = loss_weights(example, MaskPolicy(**policy | {"normalize": "token"}))
        for span in example.spans:
            if span.turn == 1:
                expected[span.start : span.stop] = 0
        weights = loss_weights(flagged, MaskPolicy(**policy))
        assert (weights > 0).tolist() == (expected > 0).tolist()
        if policy["normalize"] != "token" and expected.any():
            turns = {s.turn for s in example.spans if expected[s.start : s.stop].any()}
            assert weights.sum() == pytest.approx(len(turns) if policy["normalize"] == "turn" else 1)


def test_last_answer_out_of_the_loss_is_scored_and_not_replaced_by_an_earlier_one(tokenizer: Any, talk: Talk) -> None:
    raw = talk(("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")).model_dump(mode="json")
    raw["conversations"][3]["loss"] = False
    conversation, renderer = Conversation.model_validate(raw), Renderer(tokenizer, {})
    assert not loss_weights(renderer.render(conversation), MaskPolicy(supervise="last_assistant")).any()
    scored = renderer.render(conversation, "A2")
    assert tokenizer.decode(scored.input_ids[loss_weights(scored, ANSWER_ONLY) == 1]) == f"A2{END}"


def test_last_assistant_turn_may_precede_a_user_turn(tokenizer: Any, talk: Talk) -> None:
    example = Renderer(tokenizer, {}).render(talk(("user", "Q"), ("assistant", "A"), ("user", "bye")))
    weights = loss_weights(example, MaskPolicy(supervise="last_assistant", end_of_turn=False))
    assert tokenizer.decode(example.input_ids[weights == 1]) == "A"


@pytest.mark.parametrize("normalize", ["token", "turn", "sample"])
def test_conversation_without_a_target_has_weights_of_0(tokenizer: Any, talk: Talk, normalize: Any) -> None:
    example = Renderer(tokenizer, {}).render(talk(("user", "Q"), ("assistant", "")))
    assert not loss_weights(example, MaskPolicy(end_of_turn=False, normalize=normalize)).any()


def test_preset_is_written_out_in_the_settings_and_read_again() -> None:
    settings = load_settings(overrides={"mask.preset": "upstream"})
    assert settings.mask.model_dump() == {
        "preset": "upstream",
        "supervise": "assistant",
        "end_of_turn": True,
        "turn_header": True,
        "task_weights": {},
        "normalize": "token",
    }
    assert settings.with_values({"seed": 3}).mask == settings.mask
    assert Settings().with_values({"mask.preset": "upstream"}).mask == settings.mask == MaskPolicy(preset="upstream")
    assert load_settings(overrides={"mask.preset": "upstream", "mask.turn_header": True}).mask == settings.mask


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mask.preset": "upstream", "mask.supervise": "all"},
            "mask.supervise='all': mask.preset=upstream means supervise=assistant; leave one of them out",
        ),
        (
            {"mask.preset": "upstream", "mask.task_weights": {"T1": 2}},
            "mask.task_weights: mask.preset=upstream means task_weights={}; leave one of them out",
        ),
        ({"mask.preset": "upstram"}, "mask.preset='upstram': Input should be '' or 'upstream'"),
        (
            {"mask.task_weights": {"T1": 0, "T3": 2}},
            "mask.task_weights: T1: 0 is not above 0; leave a task out with data.task_filter",
        ),
        ({"mask.task_weights": {"T1": float("inf")}}, "mask.task_weights.T1=inf: Input should be a finite number"),
    ],
)
def test_contradictory_or_invalid_policy_is_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(overrides=values)
    assert str(caught.value).startswith(message)


def test_task_weights_are_settings_of_their_own() -> None:
    settings = parse(["mask.task_weights={T1: 1, T3: 2}"], "").settings
    weights = {name: value for name, value in settings.flat().items() if name.startswith("mask.task_weights")}
    assert weights == {"mask.task_weights.T1": 1, "mask.task_weights.T3": 2}
    assert settings.with_values({"mask.task_weights.T3": 4}).mask.task_weights == {"T1": 1, "T3": 4}


def test_description_of_a_policy_omits_empty_values() -> None:
    assert MaskPolicy().description == "supervise=assistant, end_of_turn=True, turn_header=False, normalize=token"
    policy = MaskPolicy(task_weights={"T1": 1, "T3": 2.5}, normalize="turn")
    assert policy.description.endswith("turn_header=False, task_weights={T1: 1, T3: 2.5}, normalize=turn")

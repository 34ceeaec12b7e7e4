"""Mask policies: for each one, the supervised text is written out by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation
from umbrella.data.masking import audit, loss_weights
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality

END = "<|im_end|>\n"
USER = "<|im_start|>user\n"
ASSISTANT = "<|im_start|>assistant\n"


@pytest.fixture
def example(tokenizer: Any, modalities: dict[str, Modality], talk: Callable[..., Conversation]) -> Example:
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
        # The line break after a volume is text; the two placeholders before it are nobody's target.
        ("all", False, False, "\nQ1A1Q2A2"),
        ("all", True, False, f"\nQ1{END}A1{END}Q2{END}A2{END}"),
        # Nothing stands before the very first token, so nothing can predict it.
        ("all", False, True, f"user\n\nQ1{ASSISTANT}A1{USER}Q2{ASSISTANT}A2"),
        ("all", True, True, f"user\n\nQ1{END}{ASSISTANT}A1{END}{USER}Q2{END}{ASSISTANT}A2{END}"),
    ],
)
def test_the_loss_sees_exactly_this_text(
    example: Example, tokenizer: Any, supervise: Any, end_of_turn: bool, turn_header: bool, text: str
) -> None:
    policy = MaskPolicy(supervise=supervise, end_of_turn=end_of_turn, turn_header=turn_header)
    weights = loss_weights(example, policy)
    assert set(weights.tolist()) == {0, 1}
    assert tokenizer.decode(example.input_ids[weights == 1]) == text


def test_a_user_who_speaks_last_is_not_the_last_assistant_turn(
    tokenizer: Any, talk: Callable[..., Conversation]
) -> None:
    example = Renderer(tokenizer, {}).render(talk(("user", "Q"), ("assistant", "A"), ("user", "bye")))
    weights = loss_weights(example, MaskPolicy(supervise="last_assistant", end_of_turn=False))
    assert tokenizer.decode(example.input_ids[weights == 1]) == "A"


def test_the_audit_counts_tokens_by_role_and_kind(example: Example) -> None:
    assert audit([example, example], MaskPolicy()) == [
        {"role": "assistant", "kind": "end", "tokens": 8, "supervised": 8},
        {"role": "assistant", "kind": "header", "tokens": 44, "supervised": 0},
        {"role": "assistant", "kind": "text", "tokens": 8, "supervised": 8},
        {"role": "user", "kind": "end", "tokens": 8, "supervised": 0},
        {"role": "user", "kind": "header", "tokens": 24, "supervised": 0},
        {"role": "user", "kind": "image", "tokens": 4, "supervised": 0},
        {"role": "user", "kind": "text", "tokens": 10, "supervised": 0},
    ]


def test_a_policy_that_supervises_nothing_is_refused(tokenizer: Any, talk: Callable[..., Conversation]) -> None:
    silent = Renderer(tokenizer, {}).render(talk(("user", "Q"), ("assistant", "")))
    with pytest.raises(UserError, match="supervises none of the 22 tokens"):
        audit([silent], MaskPolicy(end_of_turn=False))

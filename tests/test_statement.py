"""What a training says at its start, and how much of the data it reads to say it."""

from collections.abc import Callable
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality
from umbrella.training.statement import mask_audit, statement


def test_the_statement_names_loss_mask_tokens_weights_and_volumes(
    tokenizer: Any, modalities: dict[str, Modality], talk: Callable[..., Conversation]
) -> None:
    conversation = talk(("user", [("sMRI", "s.nii"), "Sex?"]), ("assistant", "male."))
    policy = MaskPolicy(supervise="last_assistant")
    table = mask_audit([conversation], Renderer(tokenizer, modalities), policy)
    moving = {"embedder": 1234, "projector": 0, "language_model": 5}
    assert statement(table, policy, moving, {"fMRI": modalities["fMRI"]}).splitlines() == [
        "loss: Σ weight·nll / Σ weight over the global batch, nats per supervised token",
        "mask: supervise=last_assistant, end_of_turn=True, turn_header=False",
        "supervised: 7 of 33 tokens (21.2%)",
        "  assistant end          2 of 2",
        "  assistant header       0 of 11",
        "  assistant text         5 of 5",
        "       user end          0 of 2",
        "       user header       0 of 6",
        "       user image        0 of 2",
        "       user text         0 of 5",
        "weights that move: embedder 1,234, language_model 5",
        "fMRI: a volume of 4x4x4x6 in patches of 4x4x4x2 is 3 tokens",
    ]


def test_a_large_split_is_read_evenly_and_in_part(tokenizer: Any, talk: Callable[..., Conversation]) -> None:
    # Longer and longer answers: 1000 conversations, of which every fourth is read, 250 in all.
    split = [talk(("user", ""), ("assistant", "a" * (i // 100))) for i in range(1000)]
    rows = mask_audit(split, Renderer(tokenizer, {}), MaskPolicy())
    counts = {(row["role"], row["kind"]): row["tokens"] for row in rows}
    assert counts["assistant", "end"] == 250 * 2
    assert counts["assistant", "text"] == 25 * sum(range(10))


def test_a_policy_without_a_target_is_refused(tokenizer: Any, talk: Callable[..., Conversation]) -> None:
    silent = talk(("user", "Q"), ("assistant", ""))
    with pytest.raises(UserError, match="the loss would see nothing"):
        mask_audit([silent], Renderer(tokenizer, {}), MaskPolicy(end_of_turn=False))

"""Mask policies: spans and a policy become loss weights, and an audit says what the loss sees."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from umbrella.base import UserError
from umbrella.data.rendering import Example, Span
from umbrella.data.settings import MaskPolicy


def loss_weights(example: Example, policy: MaskPolicy) -> np.ndarray:
    """The weight of each token as a target of the loss: float32, (L,). Placeholders always weigh 0."""
    weights = np.zeros(len(example.input_ids), dtype=np.float32)
    last = max((span.turn for span in example.spans if span.role == "assistant"), default=-1)
    for span in example.spans:
        if is_supervised(span, policy, last):
            weights[span.start : span.stop] = 1
    weights[:1] = 0  # nothing stands before the first token that could predict it
    return weights


def is_supervised(span: Span, policy: MaskPolicy, last_assistant_turn: int) -> bool:
    """Whether the policy makes targets of this span."""
    turn = {
        "assistant": span.role == "assistant",
        "last_assistant": span.turn == last_assistant_turn,
        "all": True,
    }[policy.supervise]
    kind = {"header": policy.turn_header, "text": True, "image": False, "end": policy.end_of_turn}[span.kind]
    return turn and kind


def audit(examples: Iterable[Example], policy: MaskPolicy) -> list[dict[str, str | int]]:
    """Tokens by role and kind, and how many of them are supervised: one row each, ordered by role and kind.

    Raises:
        UserError: no token at all is supervised, so there is nothing to learn.
    """
    tokens: Counter[tuple[str, str]] = Counter()
    supervised: Counter[tuple[str, str]] = Counter()
    for example in examples:
        weights = loss_weights(example, policy)
        for span in example.spans:
            tokens[span.role, span.kind] += span.stop - span.start
            supervised[span.role, span.kind] += int(np.count_nonzero(weights[span.start : span.stop]))
    if not supervised.total():
        raise UserError(
            f"the mask policy ({', '.join(f'{k}={v}' for k, v in policy)}) supervises none of the"
            f" {tokens.total()} tokens: the loss would see nothing; choose another mask.supervise"
        )
    return [
        {"role": role, "kind": kind, "tokens": count, "supervised": supervised[role, kind]}
        for (role, kind), count in sorted(tokens.items())
    ]

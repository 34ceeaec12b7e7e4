"""Mask policies: spans and a policy become loss weights."""

import numpy as np

from umbrella.data.rendering import Example, Span
from umbrella.data.settings import MaskPolicy


def loss_weights(example: Example, policy: MaskPolicy) -> np.ndarray:
    """The weight of each token as a target of the loss: float32, (L,). Placeholders and the first token weigh 0."""
    last = max((span.turn for span in example.spans if span.role == "assistant"), default=-1)
    sizes = [span.stop - span.start for span in example.spans]
    weights = np.repeat([float(is_supervised(span, policy, last)) for span in example.spans], sizes)
    weights[:1] = 0  # nothing stands before the first token that could predict it
    if policy.normalize != "token":
        turns = np.repeat([span.turn for span in example.spans], sizes)
        shared = turns if policy.normalize == "turn" else np.zeros_like(turns)
        # A turn without a target has none to divide.
        weights /= np.maximum(np.bincount(shared, weights), 1)[shared]
    weights *= policy.task_weights.get(example.conversation.task_type, 1)
    return weights.astype(np.float32)


def is_supervised(span: Span, policy: MaskPolicy, last_assistant_turn: int) -> bool:
    """Whether the policy makes targets of this span. A turn that the sample takes out of the loss never is one."""
    turn = {
        "assistant": span.role == "assistant",
        "last_assistant": span.turn == last_assistant_turn,
        "all": True,
    }[policy.supervise]
    kind = {"header": policy.turn_header, "text": True, "image": False, "end": policy.end_of_turn}[span.kind]
    return span.in_loss and turn and kind

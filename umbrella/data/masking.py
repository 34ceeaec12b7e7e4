"""Loss weights of the tokens of an example under a mask policy."""

import numpy as np

from umbrella.data.rendering import Example, Span
from umbrella.data.settings import MaskPolicy


def loss_weights(example: Example, policy: MaskPolicy) -> np.ndarray:
    """Return the weight of each token as a target of the loss.

    Returns:
        (L,), float32. Placeholders and the first token have weight 0.
    """
    last = max((span.turn for span in example.spans if span.role == "assistant"), default=-1)
    sizes = [span.stop - span.start for span in example.spans]
    weights = np.repeat([float(is_supervised(span, policy, last)) for span in example.spans], sizes)
    weights[:1] = 0  # no token before it can predict it
    if policy.normalize != "token":
        turns = np.repeat([span.turn for span in example.spans], sizes)
        groups = turns if policy.normalize == "turn" else np.zeros_like(turns)
        weights /= np.maximum(np.bincount(groups, weights), 1)[groups]  # 1 where a group has no target
    weights *= policy.task_weights.get(example.conversation.task_type, 1)
    return weights.astype(np.float32)


def is_supervised(span: Span, policy: MaskPolicy, last_assistant_turn: int) -> bool:
    """Return whether the tokens of a span are targets. A turn that the sample excludes from the loss never is."""
    turn = {
        "assistant": span.role == "assistant",
        "last_assistant": span.turn == last_assistant_turn,
        "all": True,
    }[policy.supervise]
    kind = {"header": policy.turn_header, "text": True, "image": False, "end": policy.end_of_turn}[span.kind]
    return span.in_loss and turn and kind

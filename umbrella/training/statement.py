"""What a training says at its start: the loss, the mask, the tokens it sees, the weights that move."""

from collections.abc import Mapping, Sequence

from umbrella.conversations.conversation import Conversation
from umbrella.data.masking import audit
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality

AUDITED = 256
"""The audit reads this many conversations at most, evenly over the split."""


def mask_audit(
    conversations: Sequence[Conversation], renderer: Renderer, policy: MaskPolicy
) -> list[dict[str, str | int]]:
    """Tokens by role and kind over an even sample of conversations; see ``audit``. Raises UserError as it does."""
    stride = -(-len(conversations) // AUDITED)
    return audit((renderer.render(c) for c in conversations[::stride]), policy)


def statement(
    table: Sequence[Mapping[str, str | int]],
    policy: MaskPolicy,
    moving: Mapping[str, int],
    modalities: Mapping[str, Modality],
) -> str:
    """The start of a training in words. ``table``: the audit; ``moving``: part of the model to weights that move."""
    tokens = sum(int(row["tokens"]) for row in table)
    supervised = sum(int(row["supervised"]) for row in table)
    lines = [
        "loss: Σ weight·nll / Σ weight over the global batch, nats per supervised token",
        "mask: " + ", ".join(f"{name}={value}" for name, value in policy),
        f"supervised: {supervised} of {tokens} tokens ({100 * supervised / tokens:.1f}%)",
    ]
    lines += [f"  {row['role']:>9} {row['kind']:<6} {row['supervised']:>7} of {row['tokens']}" for row in table]
    lines.append("weights that move: " + (", ".join(f"{part} {n:,}" for part, n in moving.items() if n) or "none"))
    lines += [
        f"{name}: a volume of {_by(m.grid)} in patches of {_by(m.patch)} is {m.num_tokens} tokens"
        for name, m in modalities.items()
    ]
    return "\n".join(lines)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))

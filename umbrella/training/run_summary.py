"""What a training says at its start: the loss, the mask, the tokens it sees, the weights that move."""

from collections.abc import Mapping, Sequence

import numpy as np

from umbrella.conversations.schema import Conversation
from umbrella.data.mask_audit import Hide, Row, as_it_is, audit_html, is_weighted, pick, shown
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality

AUDITED = 256
"""The audit reads this many conversations at most, drawn over the split."""

NEVER_STOPS = (
    "the chat template ends an assistant turn without a token of its own, so the model cannot learn to stop;"
    " model.chat_template=vicuna writes one"
)


def sample_for_audit(conversations: Sequence[Conversation], renderer: Renderer) -> list[Example]:
    """A sample of conversations, rendered, in their order: what a run's audit reads. The same in every run."""
    # Drawn: every fourth one of a file that repeats four questions would be always the same question.
    drawn = np.random.default_rng(0).permutation(len(conversations))[:AUDITED]
    return [renderer.render(conversations[int(i)]) for i in sorted(drawn)]


def describe_sample(examples: Sequence[Example], conversations: Sequence[Conversation]) -> str:
    """What an audit of these examples was read from."""
    return f"{len(examples)} of {len(conversations)} conversations"


def mask_audit_page(
    table: Sequence[Row],
    examples: Sequence[Example],
    renderer: Renderer,
    policy: MaskPolicy,
    read: str,
    hide: Hide = as_it_is,
) -> str:
    """The audit of these examples as a page of HTML, with a few of them in full; see ``audit_html``."""
    notes = [f"Read from {read}."] + ([] if renderer.stops else [f"Note: {NEVER_STOPS}."])
    return audit_html(table, pick(examples), policy, renderer.tokenizer, notes, hide)


def summarise_run(
    table: Sequence[Row],
    policy: MaskPolicy,
    moving: Mapping[str, int],
    modalities: Mapping[str, Modality],
    stops: bool,
    read: str,
) -> str:
    """The start of a training in words.

    Args:
        table: the audit.
        moving: part of the model to weights that move.
        read: what the audit was read from, see ``share``.
        stops: whether the chat template gives the model something to stop with, as ``Renderer.stops`` has it.
    """
    tokens = sum(int(row["tokens"]) for row in table)
    supervised = sum(int(row["supervised"]) for row in table)
    lines = [
        "loss: Σ weight·nll / Σ weight over the global batch, nats per supervised token",
        f"mask: {policy.description}",
        f"supervised: {supervised} of {tokens} tokens ({100 * supervised / tokens:.1f}%), in {read}",
    ]
    for row in table:
        weight = f", weight {shown(row['weight'])}" if is_weighted(table) and row["supervised"] else ""
        lines.append(f"  {row['role']:>9} {row['kind']:<6} {row['supervised']:>7} of {row['tokens']}{weight}")
    if not stops:
        lines.append(f"note: {NEVER_STOPS}")
    lines.append("weights that move: " + (", ".join(f"{part} {n:,}" for part, n in moving.items() if n) or "none"))
    lines += [
        f"{name}: a volume of {_by(m.grid)} in patches of {_by(m.patch)} is {m.num_tokens} tokens"
        for name, m in modalities.items()
    ]
    return "\n".join(lines)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))

"""The summary that a training logs at its start: loss, mask, tokens, and trained weights."""

from collections.abc import Mapping, Sequence

import numpy as np

from umbrella.data.masking import Redact, Row, audit_html, format_number, is_weighted
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality

AUDIT_SIZE = 256
"""Conversations that the audit reads at most."""

NEVER_STOPS = (
    "the chat template ends an assistant turn without a token of its own, so the model cannot learn to stop;"
    " model.chat_template=vicuna writes one"
)


def audit_sample(size: int) -> list[int]:
    """Return the indices of the conversations of a split that the audit reads, sorted and the same in every run."""
    # At random: in a file that repeats four questions, every fourth conversation has the same question.
    return sorted(np.random.default_rng(0).permutation(size)[:AUDIT_SIZE].tolist())


def mask_audit_page(
    table: Sequence[Row],
    examples: Sequence[Example],
    renderer: Renderer,
    policy: MaskPolicy,
    read: str,
    redact: Redact = lambda text, subjects: text,
) -> str:
    """Return the mask audit as an HTML page; see ``audit_html``."""
    notes = [f"Read from {read}."] + ([] if renderer.has_stop_token else [f"Note: {NEVER_STOPS}."])
    return audit_html(table, examples, policy, renderer.tokenizer, notes, redact)


def summarise_run(
    table: Sequence[Row],
    policy: MaskPolicy,
    trained: Mapping[str, int],
    modalities: Mapping[str, Modality],
    has_stop_token: bool,
    read: str,
) -> str:
    """Return the summary of a training as text.

    Args:
        table: the mask audit.
        trained: number of trained weights by part of the model.
        has_stop_token: see ``Renderer.has_stop_token``.
        read: the size of the audited sample.
    """
    tokens = sum(int(row["tokens"]) for row in table)
    supervised = sum(int(row["supervised"]) for row in table)
    lines = [
        "loss: Σ weight·nll / Σ weight over the global batch, nats per supervised token",
        f"mask: {policy.description}",
        f"supervised: {supervised} of {tokens} tokens ({100 * supervised / tokens:.1f}%), in {read}",
    ]
    for row in table:
        weight = f", weight {format_number(row['weight'])}" if is_weighted(table) and row["supervised"] else ""
        lines.append(f"  {row['role']:>9} {row['kind']:<6} {row['supervised']:>7} of {row['tokens']}{weight}")
    if not has_stop_token:
        lines.append(f"note: {NEVER_STOPS}")
    lines.append("trained weights: " + (", ".join(f"{part} {n:,}" for part, n in trained.items() if n) or "none"))
    lines += [
        f"{name}: a volume of {_format_shape(m.grid)} in patches of {_format_shape(m.patch)} is {m.num_tokens} tokens"
        for name, m in modalities.items()
    ]
    return "\n".join(lines)


def _format_shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))

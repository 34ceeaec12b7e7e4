"""Loss weights of tokens under a mask policy, and their audit: a table by role and kind, and an HTML page."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from umbrella.base import UserError
from umbrella.data.rendering import Example, Span
from umbrella.data.settings import MaskPolicy
from umbrella.html import render

NUM_EXAMPLES = 6
"""Number of conversations on the page."""

Redact = Callable[[str, Collection[str]], str]
"""Takes a text and the subjects that it may name; returns the text without identifiers."""
Row = Mapping[str, Any]
"""Keys: role, kind, tokens, supervised (number of targets), weight (sum of their weights)."""


def loss_weights(example: Example, policy: MaskPolicy) -> np.ndarray:
    """Return the weight of each token in the loss, (L,), float32. Placeholders and the first token have weight 0."""
    last = max((span.turn for span in example.spans if span.role == "assistant"), default=-1)
    sizes = [span.stop - span.start for span in example.spans]
    weights = np.repeat([float(_is_supervised(span, policy, last)) for span in example.spans], sizes)
    weights[:1] = 0  # no token before it can predict it
    if policy.normalize != "token":
        turns = np.repeat([span.turn for span in example.spans], sizes)
        groups = turns if policy.normalize == "turn" else np.zeros_like(turns)
        weights /= np.maximum(np.bincount(groups, weights), 1)[groups]  # 1 where a group has no target
    weights *= policy.task_weights.get(example.conversation.task_type, 1)
    return weights.astype(np.float32)


def _is_supervised(span: Span, policy: MaskPolicy, last_assistant_turn: int) -> bool:
    turn = {
        "assistant": span.role == "assistant",
        "last_assistant": span.turn == last_assistant_turn,
        "all": True,
    }[policy.supervise]
    kind = {"header": policy.turn_header, "text": True, "image": False, "end": policy.end_of_turn}[span.kind]
    return span.in_loss and turn and kind


def audit(examples: Iterable[Example], policy: MaskPolicy) -> list[Row]:
    """Count tokens and targets for each role and kind, sorted by name.

    Raises:
        UserError: no token is supervised.
    """
    counts: defaultdict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(3))
    for example in examples:
        weights = loss_weights(example, policy)
        for span in example.spans:
            of_span = weights[span.start : span.stop]
            counts[span.role, span.kind] += (len(of_span), np.count_nonzero(of_span), of_span.sum(dtype=np.float64))
    total = sum(counts.values(), np.zeros(3))
    if not total[1]:
        raise UserError(
            f"the mask policy ({policy.description}) supervises none of the {total[0]:.0f} tokens: the loss would see"
            " nothing; choose another mask.supervise"
        )
    return [
        {"role": role, "kind": kind, "tokens": int(n), "supervised": int(targets), "weight": round(float(weight), 6)}
        for (role, kind), (n, targets, weight) in sorted(counts.items())
    ]


def is_weighted(rows: Iterable[Row]) -> bool:
    """Return whether any target has a weight other than 1."""
    return any(row["weight"] != row["supervised"] for row in rows)


def format_number(number: float) -> str:
    """Format a number of tokens or a sum of weights with at most four decimals."""
    return f"{round(number, 4):.12g}"


def show_invisible(text: str) -> str:
    """Mark each line break with ↵, and replace other invisible characters by their code."""
    return "".join("↵\n" if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)


@dataclass(frozen=True)
class WeightedText:
    """Consecutive tokens of one span with equal weight. For placeholders, ``text`` describes the volume."""

    turn: int
    role: str
    kind: str
    text: str
    tokens: int
    weight: float
    """Weight of each token as a target of the loss; 0 if it is not a target."""
    in_loss: bool = True
    """Whether the sample allows supervision of the turn; see ``Turn.in_loss``."""

    @property
    def supervised(self) -> bool:
        """Whether the tokens are targets."""
        return self.weight > 0


def split_by_weight(
    example: Example,
    policy: MaskPolicy,
    tokenizer: PreTrainedTokenizerBase,
    redact: Redact = lambda text, subjects: text,
) -> list[WeightedText]:
    """Split an example wherever its span or weight changes. ``redact``: see ``audit_html``."""
    subjects = example.conversation.subjects
    ids, weights = example.input_ids, loss_weights(example, policy)
    volumes = iter(example.conversation.volumes)
    found = []
    for span in example.spans:
        changes = span.start + 1 + np.flatnonzero(np.diff(weights[span.start : span.stop]))
        cuts = [span.start, *changes.tolist(), span.stop]
        for start, stop in pairwise(cuts):
            if span.kind == "image":
                volume = next(volumes)
                name = redact(os.path.basename(volume.image_path), subjects)
                text = f"<image: {stop - start} tokens, {volume.modality}, {name}>"
            else:
                text = redact(_decode(tokenizer, ids, start, stop), subjects)
            weight = float(weights[start])
            found.append(WeightedText(span.turn, span.role, span.kind, text, stop - start, weight, span.in_loss))
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, start: int, stop: int) -> str:
    # Many tokenizers drop the first space of a decoded text, so some preceding tokens are decoded too. A character has
    # at most 4 bytes, so a few are enough; decoding all of them would take quadratic time.
    first = max(start - 16, 0)
    prefix, text = (
        str(tokenizer.decode(ids[first:n].tolist(), clean_up_tokenization_spaces=False)) for n in (start, stop)
    )
    return text[len(prefix) :]


def select_examples(examples: Sequence[Example], count: int = NUM_EXAMPLES) -> list[Example]:
    """Select ``count`` examples, equally many of each task_type if possible, evenly spaced."""
    by_type: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_type[example.conversation.task_type].append(example)
    rounds = sorted((i, kind) for kind, own in by_type.items() for i in range(len(own)))[:count]
    quota = Counter(kind for _, kind in rounds)
    return [own[i * len(own) // quota[kind]] for kind, own in sorted(by_type.items()) for i in range(quota[kind])]


def audit_html(
    rows: Sequence[Row],
    examples: Sequence[Example],
    policy: MaskPolicy,
    tokenizer: PreTrainedTokenizerBase,
    notes: Sequence[str],
    redact: Redact,
) -> str:
    """Render a self-contained HTML page: the policy, the table, and a few examples with their targets marked.

    Args:
        rows: table of ``audit``, for these examples.
        notes: sentences to show below the policy.
        redact: applied to the texts of conversations.
    """
    samples = []
    for example in select_examples(examples):
        found = split_by_weight(example, policy, tokenizer, redact)
        turns = [list(of_turn) for _, of_turn in groupby(found, key=lambda piece: piece.turn)]
        samples.append((example.conversation, turns))
    weights = [piece.weight for _, turns in samples for turn in turns for piece in turn]
    return render(
        Path(__file__).with_name("audit.html"),
        {"visible": show_invisible, "shown": format_number, "kept": redact},
        rows=rows,
        weighted=is_weighted(rows),
        samples=samples,
        policy=policy,
        notes=notes,
        heaviest=max(weights, default=1) or 1,
    )

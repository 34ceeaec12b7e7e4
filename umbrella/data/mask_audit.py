"""What the loss sees of the data at hand: a table of tokens by role and kind, and a page of samples to look at."""

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
from umbrella.data.masking import loss_weights
from umbrella.data.rendering import Example
from umbrella.data.settings import MaskPolicy
from umbrella.html import render

SHOWN = 6
"""Samples on the page."""

Hide = Callable[[str, Collection[str]], str]
"""A text and the subjects that may be named in it, to the text as it may be kept."""
Row = Mapping[str, Any]
"""role, kind, tokens, supervised (how many of the tokens are targets), weight (the sum of theirs)."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one span that all have one weight. Of placeholders, ``text`` says what stands there."""

    turn: int
    role: str
    kind: str
    text: str
    tokens: int
    weight: float
    """Of each token, as a target of the loss; 0 where it is none."""
    in_loss: bool = True
    """Whether the sample lets the loss supervise the turn; see ``Turn.in_loss``."""

    @property
    def supervised(self) -> bool:
        """Whether the loss sees these tokens."""
        return self.weight > 0


def audit(examples: Iterable[Example], policy: MaskPolicy) -> list[Row]:
    """A row for each role and kind, in the order of their names.

    Raises:
        UserError: no token at all is supervised, so there is nothing to learn.
    """
    tokens: Counter[tuple[str, str]] = Counter()
    supervised: Counter[tuple[str, str]] = Counter()
    weight: defaultdict[tuple[str, str], float] = defaultdict(float)
    for example in examples:
        weights = loss_weights(example, policy)
        for span in example.spans:
            inside, key = weights[span.start : span.stop], (span.role, span.kind)
            tokens[key] += len(inside)
            supervised[key] += int(np.count_nonzero(inside))
            weight[key] += float(inside.sum(dtype=np.float64))
    if not supervised.total():
        raise UserError(
            f"the mask policy ({policy.description}) supervises none of the {tokens.total()} tokens: the loss would see"
            " nothing; choose another mask.supervise"
        )
    return [
        {
            "role": role,
            "kind": kind,
            "tokens": count,
            "supervised": supervised[role, kind],
            "weight": round(weight[role, kind], 6),
        }
        for (role, kind), count in sorted(tokens.items())
    ]


def is_weighted(rows: Iterable[Row]) -> bool:
    """Whether some targets count other than 1, so that their number does not tell what they count."""
    return any(row["weight"] != row["supervised"] for row in rows)


def shown(number: float) -> str:
    """A number of tokens or a sum of weights as text, with four digits after the point at most."""
    return f"{round(number, 4):.12g}"


def as_it_is(text: str, subjects: Collection[str]) -> str:
    """What a conversation says, with its subjects in it."""
    return text


def pieces(
    example: Example, policy: MaskPolicy, tokenizer: PreTrainedTokenizerBase, hide: Hide = as_it_is
) -> list[Piece]:
    """The example cut wherever its span or weight changes, in order. ``hide``: see ``audit_html``."""
    subjects = example.conversation.subjects
    ids, weights = example.input_ids, loss_weights(example, policy)
    volumes = iter(example.conversation.volumes)
    found = []
    for span in example.spans:
        inside = weights[span.start : span.stop]
        cuts = [span.start, *(span.start + 1 + np.flatnonzero(np.diff(inside))).tolist(), span.stop]
        for start, stop in pairwise(cuts):
            if span.kind == "image":
                volume = next(volumes)
                name = hide(os.path.basename(volume.image_path), subjects)
                text = f"<image: {stop - start} tokens, {volume.modality}, {name}>"
            else:
                text = hide(_decoded(tokenizer, ids, start, stop), subjects)
            weight = float(weights[start])
            found.append(Piece(span.turn, span.role, span.kind, text, stop - start, weight, span.in_loss))
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, start: int, stop: int) -> str:
    # Not these tokens alone: many a tokenizer drops the first space of what it decodes. A few tokens before are enough,
    # as a character has at most 4 bytes. To decode all of them takes time that grows as the square of the tokens.
    first = max(start - 16, 0)
    before, through = (
        str(tokenizer.decode(ids[first:n].tolist(), clean_up_tokenization_spaces=False)) for n in (start, stop)
    )
    return through[len(before) :]


def visible(text: str) -> str:
    """The text with each line break as ↵ and a line break, and other invisible characters by their code."""
    return "".join("↵\n" if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)


def pick(examples: Sequence[Example], count: int = SHOWN) -> list[Example]:
    """So many of the examples: of every task_type as many, as far as it has them, and evenly over those that it has."""
    by_type: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_type[example.conversation.task_type].append(example)
    rounds = sorted((i, kind) for kind, own in by_type.items() for i in range(len(own)))[:count]
    quota = Counter(kind for _, kind in rounds)
    return [own[i * len(own) // quota[kind]] for kind, own in sorted(by_type.items()) for i in range(quota[kind])]


def audit_html(
    rows: Sequence[Row],
    examples: Iterable[Example],
    policy: MaskPolicy,
    tokenizer: PreTrainedTokenizerBase,
    notes: Sequence[str] = (),
    hide: Hide = as_it_is,
) -> str:
    """A page that stands for itself: the policy in words, the table, and these examples with their targets marked.

    Args:
        rows: the table, as ``audit`` gives it.
        notes: what else the reader should know, a sentence each.
        hide: applied to what conversations say.
    """
    samples = []
    for example in examples:
        found = pieces(example, policy, tokenizer, hide)
        turns = [list(of_turn) for _, of_turn in groupby(found, key=lambda piece: piece.turn)]
        samples.append((example.conversation, turns))
    weights = [piece.weight for _, turns in samples for turn in turns for piece in turn]
    return render(
        Path(__file__).with_name("audit.html"),
        {"visible": visible, "shown": shown, "kept": hide},
        rows=rows,
        weighted=is_weighted(rows),
        samples=samples,
        policy=policy,
        notes=notes,
        heaviest=max(weights, default=1) or 1,
    )

"""One conversation as the model gets it, in the terminal: the text of its tokens, and which of them the loss sees."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation
from umbrella.data.masking import audit, loss_weights
from umbrella.data.rendering import Example
from umbrella.data.settings import MaskPolicy

OPEN, CLOSE = "⟦", "⟧"
"""Around supervised text: a console without colours shows no other sign."""
SUPERVISED = "bold green underline"
STYLES = {"header": "dim", "text": "", "image": "cyan", "end": "dim"}


@dataclass(frozen=True)
class Piece:
    """Tokens of one span that are all supervised, or all not. Of placeholders, ``text`` says what stands there."""

    turn: int
    role: str
    kind: str
    text: str
    tokens: int
    supervised: bool


def find(
    conversations: Sequence[Conversation], split: str, task_id: str | None = None, sample: int = 0
) -> Conversation:
    """The conversation of that name, or without a name the ``sample``-th, counted from 0.

    Raises:
        UserError: there is none; of a name with the nearest ones.
    """
    if task_id is None:
        if not 0 <= sample < len(conversations):
            raise UserError(f"--sample {sample}: {split} has the samples 0 to {len(conversations) - 1}")
        return conversations[sample]
    by_name = {c.task_id: c for c in conversations}
    if task_id not in by_name:
        near = difflib.get_close_matches(task_id, by_name, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"its first is {conversations[0].task_id}"
        raise UserError(f"--task-id {task_id}: not among the {len(by_name)} conversations of {split}; {hint}")
    return by_name[task_id]


def pieces(example: Example, policy: MaskPolicy, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The example cut wherever its span or supervision changes, in order."""
    ids, supervised = example.input_ids, loss_weights(example, policy) > 0
    volumes = iter(example.conversation.volumes)
    found = []
    for span in example.spans:
        inside = supervised[span.start : span.stop]
        cuts = [span.start, *(span.start + 1 + np.flatnonzero(np.diff(inside))).tolist(), span.stop]
        for start, stop in pairwise(cuts):
            if span.kind == "image":
                volume = next(volumes)
                name = os.path.basename(volume.image_path)
                text = f"<image: {stop - start} tokens, {volume.modality}, {name}>"
            else:
                text = _decoded(tokenizer, ids, start, stop)
            found.append(Piece(span.turn, span.role, span.kind, text, stop - start, bool(supervised[start])))
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, start: int, stop: int) -> str:
    # Not these tokens alone: many a tokenizer drops the first space of what it decodes.
    before, through = (
        str(tokenizer.decode(ids[:n].tolist(), clean_up_tokenization_spaces=False)) for n in (start, stop)
    )
    return through[len(before) :]


def turns(found: Sequence[Piece], colours: bool) -> Text:
    """The turns one below the other. Line breaks are shown as ↵ too, and other invisible characters by their code.

    Args:
        colours: mark what is supervised by colour; with brackets otherwise.
    """
    legend, mark = ("supervised", SUPERVISED) if colours else (f"{OPEN}supervised{CLOSE}", "")
    view = Text.assemble((legend, mark), "   ", ("header and end", "dim"), "   ", ("<image: ...>", "cyan"), "\n")
    for turn, of_turn in groupby(found, key=lambda piece: piece.turn):
        parts = list(of_turn)
        view.append(f"\nturn {turn + 1}, {parts[0].role}\n", "bold")
        for supervised, alike in groupby(parts, key=lambda piece: piece.supervised):
            opening, closing = (OPEN, CLOSE) if supervised and not colours else ("", "")
            view.append(opening)
            for piece in alike:
                view.append(_visible(piece.text), mark if supervised else STYLES[piece.kind])
            if view.plain.endswith("\n"):  # the bracket belongs to the line that it closes
                view.right_crop(1)
                closing += "\n"
            view.append(closing)
        view.append("" if view.plain.endswith("\n") else "\n")
    return view


def _visible(text: str) -> str:
    return "".join("↵\n" if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)


def summary(example: Example, policy: MaskPolicy) -> Group:
    """Token counts by role and kind, the policy and the truth.

    Raises:
        UserError: the policy supervises none of the tokens.
    """
    table = Table(title="tokens", title_justify="left")
    for name in ("role", "part", "tokens", "supervised"):
        table.add_column(name, justify="right" if name in ("tokens", "supervised") else "left")
    rows = audit([example], policy)
    for row in rows:
        table.add_row(*map(str, row.values()))
    table.add_section()
    totals = [str(sum(int(row[name]) for row in rows)) for name in ("tokens", "supervised")]
    table.add_row("all", "", *totals)
    c = example.conversation
    truth = f"{c.target} = {c.label}" if c.label is not None else "none"
    lines = {
        "mask policy": ", ".join(f"{name}={value}" for name, value in policy),
        "label": f"{truth}, subject {c.subject_id}",
    }
    return Group(table, *(Text(f"{name + ':':<16}{value}") for name, value in lines.items()))

"""One conversation as the model gets it, in the terminal: the text of its tokens, and which of them the loss sees."""

import difflib
from collections.abc import Sequence
from itertools import groupby

from rich.console import Group
from rich.table import Table
from rich.text import Text

from umbrella.base import UserError, printable
from umbrella.conversations.schema import Conversation
from umbrella.data.mask_audit import Piece, audit, is_weighted, shown, visible
from umbrella.data.rendering import Example
from umbrella.data.settings import MaskPolicy

OPEN, CLOSE = "⟦", "⟧"
"""Around supervised text: a console without colours shows no other sign."""
SUPERVISED = "bold green underline"
STYLES = {"header": "dim", "text": "", "image": "cyan", "end": "dim"}


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


def turns(found: Sequence[Piece], colours: bool) -> Text:
    """The turns one below the other. Line breaks are shown as ↵ too, and other invisible characters by their code.

    Args:
        colours: mark what is supervised by colour; with brackets otherwise.
    """
    legend, mark = ("supervised", SUPERVISED) if colours else (f"{OPEN}supervised{CLOSE}", "")
    view = Text.assemble((legend, mark), "   ", ("header and end", "dim"), "   ", ("<image: ...>", "cyan"), "\n")
    for turn, of_turn in groupby(found, key=lambda piece: piece.turn):
        parts = list(of_turn)
        view.append(f"\nturn {turn + 1}, {parts[0].role}", "bold")
        weight = max(piece.weight for piece in parts)  # the targets of a turn all have one
        view.append("" if parts[0].in_loss else ", loss: false")
        view.append(f", {weight:.4g} per target\n" if weight not in (0, 1) else "\n")
        for supervised, alike in groupby(parts, key=lambda piece: piece.supervised):
            opening, closing = (OPEN, CLOSE) if supervised and not colours else ("", "")
            view.append(opening)
            for piece in alike:
                view.append(visible(piece.text), mark if supervised else STYLES[piece.kind])
            if view.plain.endswith("\n"):  # the bracket belongs to the line that it closes
                view.right_crop(1)
                closing += "\n"
            view.append(closing)
        view.append("" if view.plain.endswith("\n") else "\n")
    return view


def summary(example: Example, policy: MaskPolicy) -> Group:
    """Token counts by role and kind, the policy and the truth.

    Raises:
        UserError: the policy supervises none of the tokens.
    """
    rows = audit([example], policy)
    numbers = ["tokens", "supervised"] + ["weight"] * is_weighted(rows)
    table = Table(title="tokens", title_justify="left")
    table.add_column("role")
    table.add_column("part")
    for name in numbers:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row["role"]), str(row["kind"]), *(shown(row[name]) for name in numbers))
    table.add_section()
    table.add_row("all", "", *(shown(sum(row[name] for row in rows)) for name in numbers))
    c = example.conversation
    truth = f"{c.target} = {c.label}" if c.label is not None else "none"
    lines = {
        "mask policy": policy.description,
        "label": f"{truth}, subject {c.subject_id}",
    }
    return Group(table, *(Text(f"{name + ':':<16}{printable(value)}") for name, value in lines.items()))

"""One conversation as the model receives it: supervised text in the terminal, and a figure of its volumes."""

import difflib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from umbrella.base import UserError, printable
from umbrella.conversations.schema import Conversation
from umbrella.data.masking import WeightedText, audit, format_number, is_weighted, show_invisible
from umbrella.data.rendering import Example
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality
from umbrella.plots import new_figure
from umbrella.volumes.slices import draw_plane, orthogonal_slices
from umbrella.volumes.store import VolumeStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPEN, CLOSE = "⟦", "⟧"
"""Brackets around supervised text on a console without colours."""
SUPERVISED = "bold green underline"
LINE_COLOUR = "#ffb000"
WIDTH, CAPTION_HEIGHT = 10.5, 0.8
"""Width of the figure and height of the caption of a row, in inches."""
STYLES = {"header": "dim", "text": "", "image": "cyan", "end": "dim"}


def find_conversation(
    conversations: Sequence[Conversation], split: str, task_id: str | None = None, sample: int = 0
) -> Conversation:
    """Find a conversation by its id or, without an id, by its index.

    Raises:
        UserError: there is no such conversation; the message suggests similar ids.
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


def format_turns(found: Sequence[WeightedText], colours: bool) -> Text:
    """Format the turns of a conversation. Line breaks are shown as ↵, other invisible characters by their code.

    Args:
        found: the pieces of the rendered conversation, in order.
        colours: mark supervised text with a colour; with brackets otherwise.
    """
    legend, mark = ("supervised", SUPERVISED) if colours else (f"{OPEN}supervised{CLOSE}", "")
    view = Text.assemble((legend, mark), "   ", ("header and end", "dim"), "   ", ("<image: ...>", "cyan"), "\n")
    for turn, of_turn in groupby(found, key=lambda piece: piece.turn):
        parts = list(of_turn)
        view.append(f"\nturn {turn + 1}, {parts[0].role}", "bold")
        weight = max(piece.weight for piece in parts)  # all supervised tokens of a turn have the same weight
        view.append("" if parts[0].in_loss else ", loss: false")
        view.append(f", {weight:.4g} per target\n" if weight not in (0, 1) else "\n")
        for supervised, alike in groupby(parts, key=lambda piece: piece.supervised):
            opening, closing = (OPEN, CLOSE) if supervised and not colours else ("", "")
            view.append(opening)
            for piece in alike:
                view.append(show_invisible(piece.text), mark if supervised else STYLES[piece.kind])
            if view.plain.endswith("\n"):  # the closing bracket comes before the line break
                view.right_crop(1)
                closing += "\n"
            view.append(closing)
        view.append("" if view.plain.endswith("\n") else "\n")
    return view


def format_summary(example: Example, policy: MaskPolicy) -> Group:
    """Format token counts by role and kind, the mask policy, and the label.

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
        table.add_row(str(row["role"]), str(row["kind"]), *(format_number(row[name]) for name in numbers))
    table.add_section()
    table.add_row("all", "", *(format_number(sum(row[name] for row in rows)) for name in numbers))
    c = example.conversation
    label = "; ".join(f"{q.target} = {q.label}" for q in c.questions() if q.label is not None) or "none"
    lines = {"mask policy": policy.description, "label": f"{label}, subject {c.subject_id}"}
    return Group(table, *(Text(f"{name + ':':<16}{printable(value)}") for name, value in lines.items()))


def draw_volumes(conversation: Conversation, store: VolumeStore) -> "Figure":
    """Draw three planes of each volume, with the borders of the patches. Each volume has one row.

    Raises:
        UserError: a volume cannot be read.
    """
    planes_of, sizes, captions = [], [], []
    for volume in conversation.volumes:
        modality = store.modalities[volume.modality]
        array = store.get(volume.image_path, volume.modality)
        planes_of.append(orthogonal_slices(array, modality, store.info(volume.image_path, volume.modality)))
        sizes.append(np.array([plane.size for plane in planes_of[-1]]))
        captions.append(f"{volume.modality}   {Path(volume.image_path).name}\n{describe_volume(array, modality)}")
    heights = [CAPTION_HEIGHT + WIDTH * size[:, 1].max() / size[:, 0].sum() for size in sizes]

    figure = new_figure(WIDTH, sum(heights))
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for i, row in enumerate(rows):
        row.suptitle(captions[i], fontsize=10, ha="left", x=0.02)
        patch = store.modalities[conversation.volumes[i].modality].patch
        # Widths in millimetres: the three planes have the same scale.
        for axes, plane in zip(row.subplots(1, 3, width_ratios=sizes[i][:, 0]), planes_of[i], strict=True):
            draw_plane(axes, plane)
            height, width = plane.grey.shape
            for x in range(0, width + 1, patch[plane.axes[0]]):
                axes.axvline(x, color=LINE_COLOUR, linewidth=0.8, alpha=0.8)
            for y in range(0, height + 1, patch[plane.axes[1]]):
                axes.axhline(y, color=LINE_COLOUR, linewidth=0.8, alpha=0.8)
    return figure


def describe_volume(array: np.ndarray, modality: Modality) -> str:
    """Describe grid, patch and number of tokens and, for a series, the frames of the window (from 0)."""
    grid, patch = ("×".join(map(str, sizes)) for sizes in (modality.grid, modality.patch))
    text = f"grid {grid}, patch {patch}: {modality.num_tokens} tokens"
    if modality.is_series:
        frames = range(len(array))[modality.pick_window(len(array), None)]
        step = f" in steps of {frames.step}" if frames.step > 1 else ""
        count = modality.num_windows(len(array))
        which = f"the middle one of {count} windows, of which training draws one" if count > 1 else "its only window"
        text += f"\nmean of frames {frames[0]} to {frames[-1]}{step}, out of {len(array)}: {which}"
    return text

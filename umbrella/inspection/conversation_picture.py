"""A picture of a conversation's volumes, with the patches that become its tokens."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation
from umbrella.modality import Modality
from umbrella.volumes.slices import Plane, draw_plane, orthogonal_slices
from umbrella.volumes.store import VolumeStore
from umbrella.volumes.windows import num_windows, pick_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE = "#ffb000"
WIDTH, CAPTION = 10.5, 0.8
"""Inches: of the picture, and of the words above a row of it."""


def draw_volumes(conversation: Conversation, store: VolumeStore, file: Path) -> None:
    """Draw three planes of each volume, a row each, with the borders of the patches over them.

    Raises:
        UserError: a volume that cannot be used, or a conversation that has none.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    volumes = conversation.volumes
    if not volumes:
        raise UserError(f"{conversation.task_id}: shows no volume, so there is no picture to draw")
    cuts, captions = [], []
    for volume in volumes:
        modality = store.modalities[volume.modality]
        array = store.get(volume.image_path, volume.modality)
        cuts.append(orthogonal_slices(array, modality, store.info(volume.image_path, volume.modality)))
        captions.append(f"{volume.modality}   {Path(volume.image_path).name}\n{caption(array, modality)}")
    sizes = [np.array([plane.size for plane in planes]) for planes in cuts]
    heights = [CAPTION + WIDTH * size[:, 1].max() / size[:, 0].sum() for size in sizes]

    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(volumes), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, volume, words, planes, size in zip(rows, volumes, captions, cuts, sizes, strict=True):
        row.suptitle(words, fontsize=10, ha="left", x=0.02)
        # As wide as they are in millimetres: one scale for the three.
        for axes, plane in zip(row.subplots(1, 3, width_ratios=size[:, 0]), planes, strict=True):
            _draw(axes, plane, store.modalities[volume.modality])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def caption(array: np.ndarray, modality: Modality) -> str:
    """Grid, patch and tokens in words, and for a series which frames are seen, counted from 0."""
    grid, patch = ("×".join(map(str, sizes)) for sizes in (modality.grid, modality.patch))
    words = f"grid {grid}, patch {patch}: {modality.num_tokens} tokens"
    if modality.is_series:
        frames = range(len(array))[pick_window(len(array), modality, None)]
        step = f" in steps of {frames.step}" if frames.step > 1 else ""
        count = num_windows(len(array), modality)
        which = f"the middle one of {count} windows, of which training draws one" if count > 1 else "its only window"
        words += f"\nmean of frames {frames[0]} to {frames[-1]}{step}, out of {len(array)}: {which}"
    return words


def _draw(axes: "Axes", plane: Plane, modality: Modality) -> None:
    draw_plane(axes, plane)
    right, up = plane.axes
    height, width = plane.grey.shape
    for x in range(0, width + 1, modality.patch[right]):
        axes.axvline(x, color=LINE, linewidth=0.8, alpha=0.8)
    for y in range(0, height + 1, modality.patch[up]):
        axes.axhline(y, color=LINE, linewidth=0.8, alpha=0.8)

"""Three planes of a prepared volume, turned as a radiology atlas shows them, and small pictures of them.

Neurological convention: the left of the subject is on the left. The picture's up is the subject's front in the axial
plane and its top in the other two; the sagittal plane looks to the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from umbrella.modality import Modality
from umbrella.plots import SOFT
from umbrella.volumes.store import VolumeInfo
from umbrella.volumes.windows import pick_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
"""Name to the two of the axes X, Y, Z that run to the right and upwards in the picture."""
ENDS = ("LR", "PA", "IS")
"""Letters of the beginning and the end of X, Y, Z."""
THUMBNAIL_SIZE = 96
"""Pixels along both edges of one plane of a thumbnail."""


@dataclass(frozen=True)
class Plane:
    """One slice. grey: (rows downwards, columns to the right), uint8. edges: millimetres of a voxel, right and up."""

    name: str
    axes: tuple[int, int]
    index: int
    """Where the slice lies along the third axis."""
    grey: np.ndarray
    spacing: tuple[float, float]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in millimetres."""
        return self.grey.shape[1] * self.spacing[0], self.grey.shape[0] * self.spacing[1]


def orthogonal_slices(
    array: np.ndarray, modality: Modality, facts: VolumeInfo | None, centre: Sequence[int] | None = None
) -> list[Plane]:
    """The axial, coronal and sagittal plane through one voxel.

    Args:
        array: as ``VolumeStore.get`` gives it. Of a series the mean over its middle window is shown.
        facts: tell how large a voxel is; taken for a cube when None.
        centre: the voxel, along X, Y, Z; the middle of what is bright when None.
    """
    if modality.is_series:
        array = array[pick_window(len(array), modality, None)].mean(axis=0, dtype=np.float32)
    volume = np.asarray(array, np.float32)
    if centre is None:
        # The store does not keep which voxels are background; those brighter than the mean lie in the head.
        centre = np.rint(np.argwhere(volume > volume.mean()).mean(axis=0)).astype(int).tolist()
    dark, light = np.percentile(volume, (1, 99.5))
    if dark == light:
        dark, light = volume.min(), volume.max()
    grey = (255 * np.clip((volume - dark) / (light - dark), 0, 1)).astype(np.uint8)
    edges = voxel_spacing(modality, facts)
    planes = []
    for name, (right, up) in PLANES.items():
        across = 3 - right - up
        index = centre[across]
        planes.append(Plane(name, (right, up), index, grey.take(index, across).T[::-1], (edges[right], edges[up])))
    return planes


def voxel_spacing(modality: Modality, facts: VolumeInfo | None) -> tuple[float, float, float]:
    """Millimetres of a voxel of the prepared array along X, Y, Z; 1 where nothing tells."""
    if modality.spacing is not None:
        return (modality.spacing,) * 3
    edges = [1.0, 1.0, 1.0]
    if facts is not None and "?" not in facts.orientation:
        for code, size, edge in zip(facts.orientation, facts.shape, facts.spacing, strict=False):
            axis = next(i for i, ends in enumerate(ENDS) if code in ends)
            edges[axis] = size * edge / modality.grid[axis]
    return edges[0], edges[1], edges[2]


def save_thumbnail(planes: list[Plane], file: Path) -> None:
    """The planes side by side, all to one scale, as a grey PNG of (3 * THUMBNAIL_SIZE, THUMBNAIL_SIZE) pixels."""
    scale = THUMBNAIL_SIZE / max(length for plane in planes for length in plane.size)
    picture = Image.new("L", (len(planes) * THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    for i, plane in enumerate(planes):
        width, height = (max(1, round(scale * length)) for length in plane.size)
        tile = Image.fromarray(plane.grey).resize((width, height), Image.Resampling.BICUBIC)
        picture.paste(tile, (i * THUMBNAIL_SIZE + (THUMBNAIL_SIZE - width) // 2, (THUMBNAIL_SIZE - height) // 2))
    picture.save(file)


def draw_plane(axes: "Axes", plane: Plane) -> None:
    """A plane in its own proportions, its name above it and the letters of its ends beside it.

    One unit of the axes is a voxel; (0, 0) is the corner at the lower left.
    """
    right, up = plane.axes
    height, width = plane.grey.shape
    axes.imshow(
        plane.grey,
        cmap="gray",
        vmin=0,
        vmax=255,
        extent=(0, width, 0, height),
        aspect=plane.spacing[1] / plane.spacing[0],
        interpolation="nearest",
    )
    axes.set_title(f"{plane.name}, {'XYZ'[3 - right - up]} = {plane.index}", fontsize=9, color=SOFT)
    axes.set_xticks([0, width], ENDS[right])
    axes.set_yticks([0, height], ENDS[up])
    axes.tick_params(length=0, labelsize=9, labelcolor=SOFT)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)

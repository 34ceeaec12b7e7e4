"""Axial, coronal and sagittal slices of a prepared volume, and thumbnails of them.

Orientation follows the neurological convention: the left of the subject is on the left of the picture. Up is anterior
in the axial slice and superior in the other two. Anterior is on the right of the sagittal slice.
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
"""For each plane, the indices of the axes (X, Y, Z) that point to the right and up in the picture."""
AXIS_LABELS = ("LR", "PA", "IS")
"""Letters of the negative and the positive end of X, Y, Z."""
THUMBNAIL_SIZE = 96
"""Width and height of one slice of a thumbnail, in pixels."""


@dataclass(frozen=True)
class Plane:
    """One slice of a volume."""

    name: str
    axes: tuple[int, int]
    """Indices of the volume axes that point to the right and up."""
    index: int
    """Position of the slice along the third axis."""
    grey: np.ndarray
    """(rows, columns), uint8; rows run from top to bottom."""
    spacing: tuple[float, float]
    """Width and height of a voxel in millimetres."""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the slice in millimetres."""
        return self.grey.shape[1] * self.spacing[0], self.grey.shape[0] * self.spacing[1]


def orthogonal_slices(
    array: np.ndarray, modality: Modality, info: VolumeInfo | None, centre: Sequence[int] | None = None
) -> list[Plane]:
    """Return the axial, coronal and sagittal slice through one voxel.

    Args:
        array: (X, Y, Z) or (T, X, Y, Z), from ``VolumeStore.get``. A series is averaged over its middle window.
        modality: the modality of the array.
        info: gives the voxel spacing. None: isotropic voxels.
        centre: the voxel along X, Y, Z. None: the centre of the voxels that are brighter than the mean.
    """
    volume = mean_frame(array, modality)
    if centre is None:
        # The store does not keep the foreground mask. Voxels brighter than the mean lie in the head.
        centre = np.rint(np.argwhere(volume > volume.mean()).mean(axis=0)).astype(int).tolist()
    grey, spacing = grey_levels(volume), voxel_spacing(modality, info)
    planes = []
    for name, (right, up) in PLANES.items():
        normal = 3 - right - up
        index = centre[normal]
        planes.append(Plane(name, (right, up), index, grey.take(index, normal).T[::-1], (spacing[right], spacing[up])))
    return planes


def mean_frame(array: np.ndarray, modality: Modality) -> np.ndarray:
    """Return a prepared volume, or the mean of the middle window of a series, as (X, Y, Z) in float32."""
    if modality.is_series:
        array = array[modality.pick_window(len(array), None)].mean(axis=0, dtype=np.float32)
    return np.asarray(array, np.float32)


def grey_levels(volume: np.ndarray) -> np.ndarray:
    """Return a volume (X, Y, Z) as uint8, from its 1st percentile (0) to its 99.5th (255)."""
    dark, light = np.percentile(volume, (1, 99.5))
    if dark == light:
        dark, light = volume.min(), volume.max()
    return (255 * np.clip((volume - dark) / (light - dark), 0, 1)).astype(np.uint8)


def voxel_spacing(modality: Modality, info: VolumeInfo | None) -> tuple[float, float, float]:
    """Return the voxel spacing of the prepared array along X, Y, Z in millimetres, or 1 if it is unknown."""
    if modality.spacing is not None:
        return (modality.spacing,) * 3
    spacing = [1.0, 1.0, 1.0]
    if info is not None and "?" not in info.orientation:
        for code, size, edge in zip(info.orientation, info.shape, info.spacing, strict=False):
            axis = next(i for i, labels in enumerate(AXIS_LABELS) if code in labels)
            spacing[axis] = size * edge / modality.grid[axis]
    return spacing[0], spacing[1], spacing[2]


def save_thumbnail(planes: list[Plane], file: Path) -> None:
    """Save slices side by side, at one scale, as a grey PNG. Each slice has THUMBNAIL_SIZE x THUMBNAIL_SIZE pixels."""
    scale = THUMBNAIL_SIZE / max(length for plane in planes for length in plane.size)
    picture = Image.new("L", (len(planes) * THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    for i, plane in enumerate(planes):
        width, height = (max(1, round(scale * length)) for length in plane.size)
        tile = Image.fromarray(plane.grey).resize((width, height), Image.Resampling.BICUBIC)
        picture.paste(tile, (i * THUMBNAIL_SIZE + (THUMBNAIL_SIZE - width) // 2, (THUMBNAIL_SIZE - height) // 2))
    picture.save(file)


def draw_plane(axes: "Axes", plane: Plane) -> None:
    """Draw a slice with its name as title and orientation letters as tick labels.

    One unit of the axes is one voxel; (0, 0) is the lower left corner.
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
    axes.set_xticks([0, width], AXIS_LABELS[right])
    axes.set_yticks([0, height], AXIS_LABELS[up])
    axes.tick_params(length=0, labelsize=9, labelcolor=SOFT)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)

"""Reorient a volume to RAS+, resample it to its modality's grid and scale its intensity."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf, isnan
from typing import Any

import numpy as np
import torch
from nibabel.orientations import apply_orientation, io_orientation
from scipy import sparse

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes.reading import RawVolume

VERSION = 3
"""Version of the preprocessing. It is part of each recipe: a change that changes arrays increases it."""

MIN_VALUE, MAX_VALUE = 1e-14, 1e14
"""Range of a volume's largest absolute value within which float32 can sum squares without underflow or overflow."""


def recipe(modality: Modality) -> dict[str, Any]:
    """Return the settings that determine the array of a volume. Windows and patches are not among them."""
    fields = {"fit", "spacing", "intensity", "background"}
    fields |= {"percentiles"} if modality.intensity == "percentiles" else set()
    fields |= {"nan"} if modality.nan != "refuse" else set()  # recipes of older stores have no "nan"
    grid = {"grid": list(modality.grid[:3]), "series": modality.is_series, "version": VERSION}
    return grid | modality.model_dump(mode="json", include=fields)


def resample_to_grid(raw: RawVolume, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
    """Resample a volume to its modality's grid with RAS+ axes, in its own units.

    A target voxel of a shrinking axis is the mean over its extent; other axes are interpolated linearly. Each frame of
    a series is resampled separately.

    Returns:
        values: float32, (X, Y, Z) or (T, X, Y, Z).
        foreground: bool, of the same shape; True where the value differs from the background.

    Raises:
        UserError: if the values are too large or too small for float32.
    """
    orientation = io_orientation(raw.affine)
    grid = [modality.grid[int(i)] for i in orientation[:, 0]]
    sizes = raw.voxels.shape[:3]
    if modality.spacing is None:
        steps = [size / target for size, target in zip(sizes, grid, strict=True)]
    else:
        steps = [modality.spacing / edge for edge in raw.spacing]
    axes = list(map(cached_axis, sizes, grid, steps))
    background = (modality.background - raw.inter) / raw.slope
    frames = raw.voxels.reshape(*sizes, -1, order="A")
    difference = np.empty((frames.shape[3], *modality.grid[:3]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        for frame, target in enumerate(difference):
            # Reorientation commutes with resampling, and is faster on the smaller array.
            target[...] = apply_orientation(resample(frames[..., frame], axes, background), orientation)
    if raw.voxels.ndim == 3:
        difference = difference[0]
    foreground = difference != 0
    largest = max(float(difference.max()), -float(difference.min())) * abs(raw.slope)
    largest = inf if isnan(largest) else largest  # inf - inf is NaN
    if foreground.any() and not MIN_VALUE < largest < MAX_VALUE:
        raise UserError(f"its values are up to {largest:g}, too large or too small to compute with; rescale the file")
    difference *= np.float32(raw.slope)
    difference += np.float32(modality.background)
    return difference, foreground


def scale_intensity(values: np.ndarray, foreground: np.ndarray, modality: Modality) -> np.ndarray:
    """Scale the intensity by ``modality.intensity``, over all frames of a series.

    Args:
        values, foreground: see ``resample_to_grid``.
        modality: gives method, percentiles and background.

    Returns:
        float16, of the same shape.

    Raises:
        UserError: if the values, the percentiles or the foreground values are constant.
    """
    low, high = values.min(), values.max()
    # A relative tolerance, because a map in small units (m²/s) has a small absolute range.
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        raise UserError(
            f"every voxel is {low:g} on its modality's grid {modality.grid[:3]}; check fit and spacing, or leave it out"
        )
    if modality.intensity == "percentiles":
        dark, bright = np.percentile(values, modality.percentiles)
        if dark == bright:
            raise UserError(
                f"percentiles {modality.percentiles} are both {dark:g}; widen them, or leave the volume out"
            )
        scaled = np.clip((values - dark) / (bright - dark), 0, 1)
    else:
        used = values if modality.intensity == "zscore" else values[foreground]
        if used.size == 0 or used.min() == used.max():
            raise UserError(
                f"holds nothing but its background {modality.background:g} and one other value; check background"
            )
        scaled = values - used.mean()
        scaled /= used.std()
        if modality.intensity == "zscore_background_min":
            scaled = np.where(foreground, scaled, scaled[foreground].min())
        scaled = np.clip(scaled, -6e4, 6e4, out=scaled)
    # torch converts several values per instruction, numpy one.
    return torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32)).half().numpy()


BLOCK_PLANES = 6
"""Number of target planes that are computed together."""


@dataclass(frozen=True)
class Axis:
    """Resampling weights along one axis. The centres of source and target axis coincide.

    If the axis shrinks (``step`` > 1), a target voxel is the mean over its extent, which avoids aliasing. If it grows,
    values are interpolated linearly between voxel centres. Positions outside the source have weight 0.
    """

    size: int
    """Number of source voxels."""
    target: int
    """Number of target voxels."""
    step: float
    """Length of a target voxel in source voxels."""

    @cached_property
    def weights(self) -> np.ndarray:
        """(target, size), float32: the weight of each source voxel in each target voxel."""
        centres = (self.size - 1) / 2 + (np.arange(self.target) - (self.target - 1) / 2) * self.step
        source = np.arange(self.size)
        if self.step > 1:
            low, high = (centres[:, None] + 0.5 + offset * self.step for offset in (-0.5, 0.5))
            overlap = np.clip(np.minimum(high, source + 1) - np.maximum(low, source), 0, None) / self.step
            return np.where(overlap > 1e-7, overlap, 0).astype(np.float32)
        inside = np.clip(centres, 0, self.size - 1)[:, None]
        linear = np.clip(1 - np.abs(inside - source), 0, None)
        outside = (centres < -0.5 - 1e-9) | (centres > self.size - 0.5 + 1e-9)
        return np.where(outside[:, None], 0, linear).astype(np.float32)

    @cached_property
    def slabs(self) -> list[tuple[int, int, torch.Tensor]]:
        """The weights in blocks of ``BLOCK_PLANES`` target planes.

        Each block is (begin, end, weights): weights (planes, end - begin) of the source planes ``begin`` to ``end``.
        """
        blocks = []
        for first in range(0, self.target, BLOCK_PLANES):
            rows = self.weights[first : first + BLOCK_PLANES]
            used = np.flatnonzero(rows.any(axis=0))
            begin, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
            blocks.append((begin, end, torch.from_numpy(np.ascontiguousarray(rows[:, begin:end]))))
        return blocks

    @cached_property
    def per_plane(self) -> list[sparse.csr_array]:
        """Block-diagonal matrices that apply the weights to 1, 2, ... ``BLOCK_PLANES`` stacked planes."""
        blocks = [sparse.csr_array(self.weights)]
        return [sparse.block_diag(blocks * planes, format="csr") for planes in range(1, BLOCK_PLANES + 1)]


cached_axis = lru_cache(maxsize=256)(Axis)
"""Volumes of the same size share an axis and its matrices."""


@torch.autocast("cpu", enabled=False)  # inference decodes new volumes inside an autocast region
def resample(voxels: np.ndarray, axes: Sequence[Axis], background: float) -> np.ndarray:
    """Resample a volume along its three axes and subtract the background.

    Args:
        voxels: (I, J, K), any real type and memory order.
        axes: the resampling of I, J and K.
        background: background value in the units of the voxels. Positions outside the source have this value.

    Returns:
        float32, (target I, target J, target K). It is exactly 0 where all source voxels are background.
    """
    # The slowest axis in memory comes first, a few planes at a time. The planes stay in the CPU cache from the
    # conversion to float32 to the last product, which gives most of the speed. Each product uses the fastest library:
    # torch for small dense matrices, scipy for sparse ones (docs/decisions.md).
    order = np.argsort([-abs(stride) for stride in voxels.strides], kind="stable")
    source = voxels.transpose(order)
    slow, middle, fast = (axes[i] for i in order)
    result = torch.empty(slow.target, middle.target * fast.target)
    fast_weights = torch.from_numpy(fast.weights).T
    max_planes = max(end - begin for begin, end, _ in slow.slabs)
    # One buffer for all blocks: allocating a new one per block would cost more than the products.
    buffer = torch.empty(max_planes, source.shape[1] * source.shape[2])
    first = 0
    for begin, end, weights in slow.slabs:
        planes = buffer[: end - begin]
        np.copyto(planes.numpy().reshape(-1, *source.shape[1:]), source[begin:end])
        if background:
            planes -= float(background)
        stack = torch.mm(weights, planes).numpy()
        stack = middle.per_plane[len(weights) - 1] @ stack.reshape(-1, fast.size)
        block = result[first : first + len(weights)]
        torch.mm(torch.from_numpy(stack), fast_weights, out=block.view(-1, fast.target))
        first += len(weights)
    return result.numpy().reshape(slow.target, middle.target, fast.target).transpose(np.argsort(order))

"""Bring a volume to its modality's axes, grid and intensity."""

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
"""Part of every recipe: raised when ``prepare`` does something else, so that new never meets what the old made."""

SMALLEST, LARGEST = 1e-14, 1e14
"""Largest values of volumes whose squares, all summed, single precision still holds well."""


def recipe(modality: Modality) -> dict[str, Any]:
    """What decides the array that ``prepare`` makes of a volume; windows and patches do not."""
    decides = {"fit", "spacing", "intensity", "background"}
    decides |= {"percentiles"} if modality.intensity == "percentiles" else set()
    decides |= {"nan"} if modality.nan != "refuse" else set()  # recipes of older stores are without it
    grid = {"grid": list(modality.grid[:3]), "series": modality.is_series, "version": VERSION}
    return grid | modality.model_dump(mode="json", include=decides)


def prepare(raw: RawVolume, modality: Modality) -> np.ndarray:
    """Turn to RAS+, bring to the grid, scale the intensity.

    Axes that shrink are averaged over, others interpolated linearly; frames are never mixed. Intensities are scaled
    over the whole series. Turning comes after resampling, with which it commutes: by then there is less to turn.

    Returns:
        float16, (X, Y, Z) of the modality's grid, or (T, X, Y, Z) with every frame of the series.

    Raises:
        UserError: nothing but one value, or nothing but background, on the grid.
    """
    values, foreground = resample_to_grid(raw, modality)
    return scale_intensity(values, foreground, modality)


def resample_to_grid(raw: RawVolume, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
    """The volume in RAS+ axes on its modality's grid, in its own units, and where it is not background.

    Returns:
        float32 and bool, (X, Y, Z) or (T, X, Y, Z).

    Raises:
        UserError: values beyond what single precision can compute with.
    """
    turn = io_orientation(raw.affine)
    grid = [modality.grid[int(i)] for i in turn[:, 0]]
    sizes = raw.voxels.shape[:3]
    if modality.spacing is None:
        steps = [size / target for size, target in zip(sizes, grid, strict=True)]
    else:
        steps = [modality.spacing / edge for edge in raw.spacing]
    axes = [axis(*of_axis) for of_axis in zip(sizes, grid, steps, strict=True)]
    background = (modality.background - raw.inter) / raw.slope
    frames = raw.voxels.reshape(*sizes, -1, order="A")
    difference = np.empty((frames.shape[3], *modality.grid[:3]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        for frame, into in enumerate(difference):
            into[...] = apply_orientation(resample(frames[..., frame], axes, background), turn)
    if raw.voxels.ndim == 3:
        difference = difference[0]
    foreground = difference != 0
    largest = max(float(difference.max()), -float(difference.min())) * abs(raw.slope)
    largest = inf if isnan(largest) else largest  # infinities met
    if foreground.any() and not SMALLEST < largest < LARGEST:
        raise UserError(f"its values are up to {largest:g}, too large or too small to compute with; rescale the file")
    difference *= np.float32(raw.slope)
    difference += np.float32(modality.background)
    return difference, foreground


def scale_intensity(values: np.ndarray, foreground: np.ndarray, modality: Modality) -> np.ndarray:
    """Scale as ``modality.intensity`` says: (X, Y, Z) or (T, X, Y, Z) in its own units to float16 of the same shape."""
    low, high = values.min(), values.max()
    # Relative: a map in small units (m²/s) varies by less than rounding does in one whose values are large.
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
        return _half(np.clip((values - dark) / (bright - dark), 0, 1))
    seen = values if modality.intensity == "zscore" else values[foreground]
    if seen.size == 0 or seen.min() == seen.max():
        raise UserError(
            f"holds nothing but its background {modality.background:g} and one other value; check background"
        )
    mean, deviation = seen.mean(), seen.std()
    scaled = values - mean
    scaled /= deviation
    if modality.intensity == "zscore_background_min":
        scaled = np.where(foreground, scaled, scaled[foreground].min())
    return _half(np.clip(scaled, -6e4, 6e4, out=scaled))


def _half(values: np.ndarray) -> np.ndarray:
    # numpy converts one number at a time.
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).half().numpy()


PLANES = 6
"""Target planes made at a time."""


@dataclass(frozen=True)
class Axis:
    """One axis of a resampling: ``size`` voxels become ``target`` voxels with the same centre.

    Where the axis shrinks (``step`` > 1) a target voxel is the mean over its extent, so that nothing aliases; where it
    grows, it is interpolated linearly between voxel centres. What lies outside the source has no weight.
    """

    size: int
    target: int
    step: float
    """Edge of a target voxel, in source voxels."""

    @cached_property
    def weights(self) -> np.ndarray:
        """(target, size), float32: the share of each source voxel in each target voxel."""
        centres = (self.size - 1) / 2 + (np.arange(self.target) - (self.target - 1) / 2) * self.step
        source = np.arange(self.size)
        if self.step > 1:
            low, high = (centres[:, None] + 0.5 + half * self.step for half in (-0.5, 0.5))
            shares = np.clip(np.minimum(high, source + 1) - np.maximum(low, source), 0, None) / self.step
            return np.where(shares > 1e-7, shares, 0).astype(np.float32)
        inside = np.clip(centres, 0, self.size - 1)[:, None]
        shares = np.clip(1 - np.abs(inside - source), 0, None)
        outside = (centres < -0.5 - 1e-9) | (centres > self.size - 0.5 + 1e-9)
        return np.where(outside[:, None], 0, shares).astype(np.float32)

    @cached_property
    def slabs(self) -> list[tuple[int, int, torch.Tensor]]:
        """The weights ``PLANES`` target planes at a time: first and last source plane that count, and their weights."""
        found = []
        for first in range(0, self.target, PLANES):
            some = self.weights[first : first + PLANES]
            used = np.flatnonzero(some.any(axis=0))
            begin, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
            found.append((begin, end, torch.from_numpy(np.ascontiguousarray(some[:, begin:end]))))
        return found

    @cached_property
    def per_plane(self) -> list[sparse.csr_array]:
        """The weights along the rows of 0, 1, ... ``PLANES`` planes that lie one after another."""
        blocks = [sparse.csr_array(self.weights)]
        return [sparse.block_diag(blocks * planes, format="csr") for planes in range(1, PLANES + 1)]


@lru_cache(maxsize=256)
def axis(size: int, target: int, step: float) -> Axis:
    """The same ``Axis`` for the same numbers: volumes of a cohort share their matrices."""
    return Axis(size, target, step)


@torch.autocast("cpu", enabled=False)  # whoever asks a model of bfloat16 about a new volume decodes it in there
def resample(voxels: np.ndarray, axes: Sequence[Axis], background: float) -> np.ndarray:
    """A volume brought to other voxels along its axes, as the difference from the background.

    Args:
        voxels: (I, J, K), any real type and memory order.
        axes: what becomes of I, J and K.
        background: in the units of the voxels; what lies outside the source counts as this.

    Returns:
        float32, (targets of I, J, K), exactly 0 where only background was seen.
    """
    # Slowest axis in memory first, a few planes at a time: they stay in the processor's cache from the conversion to
    # float32 to the last product, which is most of the speed. For each product the library that was fastest: torch's
    # for small dense matrices, scipy's where all but a few weights of a row are zero (docs/decisions.md).
    order = np.argsort([-abs(stride) for stride in voxels.strides], kind="stable")
    source = voxels.transpose(order)
    slow, middle, fast = (axes[i] for i in order)
    result = torch.empty(slow.target, middle.target * fast.target)
    to_fast = torch.from_numpy(fast.weights).T
    most = max(end - begin for begin, end, _ in slow.slabs)
    room = torch.empty(most, source.shape[1] * source.shape[2])  # memory that is new each time costs more than the sums
    first = 0
    for begin, end, weights in slow.slabs:
        planes = room[: end - begin]
        _convert(source[begin:end], planes.view(end - begin, *source.shape[1:]))
        if background:
            planes -= float(background)
        stack = torch.mm(weights, planes).numpy()
        stack = middle.per_plane[len(weights) - 1] @ stack.reshape(-1, fast.size)
        done = result[first : first + len(weights)]
        torch.mm(torch.from_numpy(stack), to_fast, out=done.view(-1, fast.target))
        first += len(weights)
    return result.numpy().reshape(slow.target, middle.target, fast.target).transpose(np.argsort(order))


def _convert(source: np.ndarray, into: torch.Tensor) -> None:
    if source.dtype == np.uint8 and source.flags.c_contiguous and source.flags.writeable:
        # What conforming software writes; torch converts it twice as fast.
        into.copy_(torch.from_numpy(source))
    else:
        np.copyto(into.numpy(), source)

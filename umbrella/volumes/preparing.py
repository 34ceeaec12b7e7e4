"""Bring a volume to its modality's axes, grid and intensity."""

from math import inf, isnan
from typing import Any

import numpy as np
import torch
from nibabel.orientations import apply_orientation, io_orientation

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes.reading import RawVolume
from umbrella.volumes.resampling import axis, resample

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
    values, foreground = on_grid(raw, modality)
    return scale_intensity(values, foreground, modality)


def on_grid(raw: RawVolume, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
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

"""Random flips, affine transforms, intensity changes and noise for the volumes of a batch, on its device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch.nn import functional

from umbrella.data.batching import Batch, VolumeGroup
from umbrella.training.settings import AugmentSettings

RNG_STREAM = 2**32 - 1
"""Part of the seed, so that these random numbers differ from those that choose windows (an index of a volume there)."""


@dataclass(frozen=True)
class Geometry:
    """A flip, then an affine transform that moves the content at p to ``linear @ p + shift``."""

    mirror: np.ndarray
    """(3,), bool: whether to flip X, Y, Z."""
    linear: np.ndarray
    """(3, 3), in voxels from the centre of the volume, axes X, Y, Z."""
    shift: np.ndarray
    """(3,), as shares of the axes; positive is towards right, front and top."""


@dataclass(frozen=True)
class Intensity:
    """A change of the intensities of a volume."""

    contrast: float
    """Factor of the deviation from the mean."""
    brightness: float
    """Added, in standard deviations of the volume."""
    noise_seed: int


def augment(batch: Batch, settings: AugmentSettings) -> Batch:
    """Augment the volumes of a batch; a batch without ``rng_keys``, as in evaluation, is returned as it is.

    The augmentation of a volume depends on the key of its sample and on its index in the sample, not on the rest of the
    batch. The volumes of a sample share their geometry: those of one subject stay aligned, those of several stay
    comparable. Intensity and noise are drawn for each volume. The frames of a series share everything but the noise.
    Equal keys give equal noise on all CPUs and on all GPUs, but CPU and GPU differ.

    Returns:
        The batch with voxels of the same shape, dtype and device.
    """
    if not batch.rng_keys or not any(dict(settings).values()):
        return batch
    geometries = [draw_geometry(rng_key, settings) for rng_key in batch.rng_keys]
    counts = batch.num_images_per_sample.tolist()
    by_run = [(sample, index) for sample, count in enumerate(counts) for index in range(count)]
    groups = {}
    for name, group in batch.pixel_values.items():
        places = [by_run[run] for run in group.run.tolist()]
        group_geometries = [geometries[sample] for sample, _ in places]
        intensities = [draw_intensity(batch.rng_keys[sample], index, settings) for sample, index in places]
        groups[name] = VolumeGroup(_augment(group.voxels, group_geometries, intensities, settings), group.run)
    return replace(batch, pixel_values=groups)


def augment_volumes(
    frames: torch.Tensor, rng_keys: Sequence[tuple[int, ...]], settings: AugmentSettings
) -> torch.Tensor:
    """Augment volumes of samples with one volume each, with the same result as ``augment``.

    Args:
        frames: (n, frames, X, Y, Z), float32; they may be changed in place.
        rng_keys: one for each volume.
    """
    if not any(dict(settings).values()):
        return frames
    intensities = [draw_intensity(rng_key, 0, settings) for rng_key in rng_keys]
    return _augment_frames(frames, [draw_geometry(rng_key, settings) for rng_key in rng_keys], intensities, settings)


def draw_geometry(rng_key: tuple[int, ...], settings: AugmentSettings) -> Geometry:
    """Draw the geometry of the volumes of a sample: rotation about X, then Y, then Z (right-hand rule), and scale.

    All numbers are drawn, also for options that are off, so that one option does not change the draws of the others.
    """
    rng = _generator(rng_key, 0)
    mirror = rng.random(3) < (settings.flip_left_right, settings.flip_other, settings.flip_other)
    angles = rng.uniform(-1, 1, 3) * settings.rotate
    size = 1 + rng.uniform(-1, 1) * settings.scale
    shift = rng.uniform(-1, 1, 3) * settings.shift
    return Geometry(mirror, size * Rotation.from_euler("xyz", angles, degrees=True).as_matrix(), shift)


def draw_intensity(rng_key: tuple[int, ...], index: int, settings: AugmentSettings) -> Intensity:
    """Draw the intensity change of volume ``index`` (from 0) of a sample."""
    rng = _generator(rng_key, 1 + index)
    contrast = 1 + rng.uniform(-1, 1) * settings.contrast
    return Intensity(contrast, rng.uniform(-1, 1) * settings.brightness, int(rng.integers(2**63)))


def apply_affine(frames: torch.Tensor, linear: np.ndarray, shift: np.ndarray) -> torch.Tensor:
    """Transform each volume as ``Geometry`` describes, with trilinear interpolation.

    Voxels are taken as cubes, which they are with ``fit: spacing``. Points outside of the volume get the value of the
    nearest voxel, which is background if the field of view ends beside the head. The minimum of the volume would not be
    the background of a map with negative values.

    Args:
        frames: (n, frames, X, Y, Z), float32.
        linear: (n, 3, 3), invertible.
        shift: (n, 3).
    """
    sizes = np.array(frames.shape[2:])
    # The source of each voxel of the result. grid_sample counts each axis from -1 to 1, and has Z first.
    back = np.linalg.inv(linear)
    origin = back @ (-shift * sizes)[..., None]
    columns = np.concatenate([back, origin], 2)[:, ::-1] * (2 / sizes)[::-1, None]
    terms = torch.tensor(columns, dtype=torch.float32, device=frames.device)[:, None, None, None].unbind(-1)
    grid = terms[3]
    for axis, size in enumerate(frames.shape[2:]):  # no matrix product, which may round to TF32
        offset = torch.arange(size, device=frames.device) - (size - 1) / 2
        grid = grid + offset.view([-1 if a == axis else 1 for a in range(-1, 4)]) * terms[axis]
    return functional.grid_sample(frames, grid, padding_mode="border", align_corners=False)


def _generator(rng_key: tuple[int, ...], number: int) -> np.random.Generator:
    return np.random.default_rng((*rng_key, RNG_STREAM, number))


def _augment(
    voxels: torch.Tensor, geometries: Sequence[Geometry], intensities: Sequence[Intensity], settings: AugmentSettings
) -> torch.Tensor:
    """Augment volumes (n, X, Y, Z) or (n, X, Y, Z, T). A change that is off causes no rounding."""
    series = voxels.ndim == 5
    frames = voxels.to(torch.float32, copy=True)
    frames = _augment_frames(frames.movedim(-1, 1) if series else frames[:, None], geometries, intensities, settings)
    largest = torch.finfo(voxels.dtype).max  # an infinite voxel would make the loss NaN
    frames = frames.clamp(-largest, largest).to(voxels.dtype)
    return frames.movedim(1, -1) if series else frames[:, 0]


def _augment_frames(
    frames: torch.Tensor, geometries: Sequence[Geometry], intensities: Sequence[Intensity], settings: AugmentSettings
) -> torch.Tensor:
    """Augment volumes (n, frames, X, Y, Z), float32, which may be changed in place."""
    deviation, mean = torch.std_mean(frames, (1, 2, 3, 4), correction=0, keepdim=True)
    for axis, mirrored in enumerate(np.stack([geometry.mirror for geometry in geometries], 1)):
        if mirrored.any():
            which = torch.tensor(np.flatnonzero(mirrored), device=frames.device)
            frames[which] = frames[which].flip(2 + axis)
    if settings.rotate or settings.scale or settings.shift:
        linear, shift = (np.stack([getattr(g, name) for g in geometries]) for name in ("linear", "shift"))
        frames = apply_affine(frames, linear, shift)
    if settings.contrast or settings.brightness:
        pairs = [(intensity.contrast, intensity.brightness) for intensity in intensities]
        factor, added = torch.tensor(pairs, device=frames.device).view(-1, 2, 1, 1, 1, 1).unbind(1)
        frames = mean + factor * (frames - mean) + added * deviation
    if settings.noise:
        generator = torch.Generator(frames.device)
        for volume, width, intensity in zip(frames, settings.noise * deviation, intensities, strict=True):
            generator.manual_seed(intensity.noise_seed)  # per volume: independent of the rest of the batch
            volume += width * torch.randn(volume.shape, generator=generator, device=volume.device)
    return frames

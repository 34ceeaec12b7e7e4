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
class VolumeChange:
    """The random changes of a volume: a flip, then an affine transform, then a change of intensities."""

    mirror: np.ndarray
    """(3,), bool: whether to flip X, Y, Z."""
    linear: np.ndarray
    """(3, 3), in voxels from the centre of the volume, axes X, Y, Z. The content at p moves to linear @ p + shift."""
    shift: np.ndarray
    """(3,), as shares of the axes; positive is towards right, front and top."""
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
    counts = batch.num_images_per_sample.tolist()
    volumes = [(key, i) for key, count in zip(batch.rng_keys, counts, strict=True) for i in range(count)]
    groups = {}
    for name, group in batch.pixel_values.items():
        group = group.separate()  # each sample has its own augmentation
        changes = [draw_change(key, index, settings) for key, index in map(volumes.__getitem__, group.run.tolist())]
        series, dtype = group.voxels.ndim == 5, group.voxels.dtype
        frames = group.voxels.to(torch.float32, copy=True)
        frames = _augment_frames(frames.movedim(-1, 1) if series else frames[:, None], changes, settings)
        largest = torch.finfo(dtype).max  # an infinite voxel would make the loss NaN
        frames = frames.clamp(-largest, largest).to(dtype)
        groups[name] = VolumeGroup(frames.movedim(1, -1) if series else frames[:, 0], group.run)
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
    return _augment_frames(frames, [draw_change(rng_key, 0, settings) for rng_key in rng_keys], settings)


def draw_change(rng_key: tuple[int, ...], index: int, settings: AugmentSettings) -> VolumeChange:
    """Draw the changes of volume ``index`` (from 0) of a sample; rotations about X, then Y, then Z (right-hand rule).

    All numbers are drawn, also for options that are off, so that one option does not change the draws of the others.
    """
    of_sample, of_volume = (np.random.default_rng((*rng_key, RNG_STREAM, number)) for number in (0, 1 + index))
    mirror = of_sample.random(3) < (settings.flip_left_right, settings.flip_other, settings.flip_other)
    angles = of_sample.uniform(-1, 1, 3) * settings.rotate
    size = 1 + of_sample.uniform(-1, 1) * settings.scale
    return VolumeChange(
        mirror=mirror,
        linear=size * Rotation.from_euler("xyz", angles, degrees=True).as_matrix(),
        shift=of_sample.uniform(-1, 1, 3) * settings.shift,
        contrast=1 + of_volume.uniform(-1, 1) * settings.contrast,
        brightness=of_volume.uniform(-1, 1) * settings.brightness,
        noise_seed=int(of_volume.integers(2**63)),
    )


def apply_affine(frames: torch.Tensor, linear: np.ndarray, shift: np.ndarray) -> torch.Tensor:
    """Transform each volume as ``VolumeChange`` describes, with trilinear interpolation.

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


def _augment_frames(frames: torch.Tensor, changes: Sequence[VolumeChange], settings: AugmentSettings) -> torch.Tensor:
    """Augment volumes (n, frames, X, Y, Z), float32, which may be changed in place. What is off causes no rounding."""
    deviation, mean = torch.std_mean(frames, (1, 2, 3, 4), correction=0, keepdim=True)
    for axis, mirrored in enumerate(np.stack([change.mirror for change in changes], 1)):
        if mirrored.any():
            which = torch.tensor(np.flatnonzero(mirrored), device=frames.device)
            frames[which] = frames[which].flip(2 + axis)
    if settings.rotate or settings.scale or settings.shift:
        linear, shift = (np.stack([getattr(change, name) for change in changes]) for name in ("linear", "shift"))
        frames = apply_affine(frames, linear, shift)
    if settings.contrast or settings.brightness:
        pairs = [(change.contrast, change.brightness) for change in changes]
        factor, added = torch.tensor(pairs, device=frames.device).view(-1, 2, 1, 1, 1, 1).unbind(1)
        frames = mean + factor * (frames - mean) + added * deviation
    if settings.noise:
        generator = torch.Generator(frames.device)
        for volume, width, change in zip(frames, settings.noise * deviation, changes, strict=True):
            generator.manual_seed(change.noise_seed)  # per volume: independent of the rest of the batch
            volume += width * torch.randn(volume.shape, generator=generator, device=volume.device)
    return frames

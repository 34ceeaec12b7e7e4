"""Augmentation: the volumes of a training batch mirrored, moved, rescaled and made noisy, on the batch's device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch.nn import functional

from umbrella.data.batching import Batch, VolumeGroup
from umbrella.training.settings import AugmentSettings

RNG_STREAM = 2**32 - 1
"""Keeps these numbers apart from those that pick windows: there the index of a volume stands in its place."""


@dataclass(frozen=True)
class Geometry:
    """Where the content of volumes goes: it is mirrored, then what lies at p comes to ``linear @ p + shift``.

    mirror: (3,) bool, along X, Y, Z. linear: (3, 3), of voxels counted from the volume's centre along X, Y, Z. shift:
    (3,), shares of the axes; above 0 is towards right, front and top.
    """

    mirror: np.ndarray
    linear: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True)
class Intensity:
    """What becomes of a volume's values: contrast, a factor around its mean; brightness, added, in its deviations."""

    contrast: float
    brightness: float
    noise_seed: int


def augment(batch: Batch, settings: AugmentSettings) -> Batch:
    """Augment the volumes of a batch; a batch without ``rng_keys``, as in evaluation, is returned as it is.

    The augmentation of a volume depends on the key of its sample and on its index in the sample, not on the rest of the
    batch. The volumes of a sample share their geometry: those of one subject stay aligned, those of several stay
    comparable. Intensity and noise are drawn for each volume. The frames of a series share everything but the noise.
    Equal keys give equal noise on all CPUs and on all GPUs, but CPU and GPU differ.

    Returns:
        Voxels of the shape, type and device they had.
    """
    if not batch.rng_keys or not any(dict(settings).values()):
        return batch
    geometries = [draw_geometry(rng_key, settings) for rng_key in batch.rng_keys]
    counts = batch.num_images_per_sample.tolist()
    by_run = [(sample, index) for sample, count in enumerate(counts) for index in range(count)]
    groups = {}
    for name, group in batch.pixel_values.items():
        places = [by_run[run] for run in group.run.tolist()]
        moves = [geometries[sample] for sample, _ in places]
        intensities = [draw_intensity(batch.rng_keys[sample], index, settings) for sample, index in places]
        groups[name] = VolumeGroup(_change(group.voxels, moves, intensities, settings), group.run)
    return replace(batch, pixel_values=groups)


def augment_volumes(
    frames: torch.Tensor, rng_keys: Sequence[tuple[int, ...]], settings: AugmentSettings
) -> torch.Tensor:
    """Volumes of which each is a sample's only one, changed as ``augment`` changes those.

    Args:
        frames: (n, frames, X, Y, Z), float32; may be written into.
        rng_keys: one for each volume.
    """
    if not any(dict(settings).values()):
        return frames
    intensities = [draw_intensity(rng_key, 0, settings) for rng_key in rng_keys]
    return _change_frames(frames, [draw_geometry(rng_key, settings) for rng_key in rng_keys], intensities, settings)


def draw_geometry(rng_key: tuple[int, ...], settings: AugmentSettings) -> Geometry:
    """The geometry of a sample's volumes: turned around X, then Y, then Z, by the right-hand rule, and scaled.

    All numbers are drawn, whatever is switched on, so that one option does not change the draws of the others.
    """
    stream = _stream(rng_key, 0)
    mirror = stream.random(3) < (settings.flip_left_right, settings.flip_other, settings.flip_other)
    angles = stream.uniform(-1, 1, 3) * settings.rotate
    size = 1 + stream.uniform(-1, 1) * settings.scale
    shift = stream.uniform(-1, 1, 3) * settings.shift
    return Geometry(mirror, size * Rotation.from_euler("xyz", angles, degrees=True).as_matrix(), shift)


def draw_intensity(rng_key: tuple[int, ...], index: int, settings: AugmentSettings) -> Intensity:
    """What becomes of the values of a sample's volume, counted from 0."""
    stream = _stream(rng_key, 1 + index)
    contrast = 1 + stream.uniform(-1, 1) * settings.contrast
    return Intensity(contrast, stream.uniform(-1, 1) * settings.brightness, int(stream.integers(2**63)))


def apply_affine(frames: torch.Tensor, linear: np.ndarray, shift: np.ndarray) -> torch.Tensor:
    """Move each volume's content as ``Geometry`` says, trilinearly.

    Voxels count as cubes, which they are with ``fit: spacing``. What comes from outside has the value of the nearest
    voxel. That is background under every ``intensity`` wherever the field of view ends beside the head; a volume's
    minimum is not, where a map has values below its background.

    Args:
        frames: (n, frames, X, Y, Z), float32.
        linear: (n, 3, 3), invertible.
        shift: (n, 3).
    """
    sizes = np.array(frames.shape[2:])
    # Of each voxel of the result: where it comes from. grid_sample counts an axis from -1 to 1, and names Z first.
    back = np.linalg.inv(linear)
    origin = back @ (-shift * sizes)[..., None]
    columns = np.concatenate([back, origin], 2)[:, ::-1] * (2 / sizes)[::-1, None]
    terms = torch.tensor(columns, dtype=torch.float32, device=frames.device)[:, None, None, None].unbind(-1)
    grid = terms[3]
    for axis, size in enumerate(frames.shape[2:]):  # no matrix product: those may be rounded to TF32
        offset = torch.arange(size, device=frames.device) - (size - 1) / 2
        grid = grid + offset.view([-1 if a == axis else 1 for a in range(-1, 4)]) * terms[axis]
    return functional.grid_sample(frames, grid, padding_mode="border", align_corners=False)


def _stream(rng_key: tuple[int, ...], number: int) -> np.random.Generator:
    return np.random.default_rng((*rng_key, RNG_STREAM, number))


def _change(
    voxels: torch.Tensor, geometries: Sequence[Geometry], intensities: Sequence[Intensity], settings: AugmentSettings
) -> torch.Tensor:
    """Volumes (n, X, Y, Z) or (n, X, Y, Z, T), changed. What is switched off costs no rounding."""
    series = voxels.ndim == 5
    frames = voxels.to(torch.float32, copy=True)
    frames = _change_frames(frames.movedim(-1, 1) if series else frames[:, None], geometries, intensities, settings)
    largest = torch.finfo(voxels.dtype).max  # an infinite voxel would end the training
    frames = frames.clamp(-largest, largest).to(voxels.dtype)
    return frames.movedim(1, -1) if series else frames[:, 0]


def _change_frames(
    frames: torch.Tensor, geometries: Sequence[Geometry], intensities: Sequence[Intensity], settings: AugmentSettings
) -> torch.Tensor:
    """The same for (n, frames, X, Y, Z), float32, which it may write into."""
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
            generator.manual_seed(intensity.noise_seed)  # one by one, or a volume's noise would depend on the others
            volume += width * torch.randn(volume.shape, generator=generator, device=volume.device)
    return frames

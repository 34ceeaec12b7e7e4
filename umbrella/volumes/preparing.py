"""Bring a volume to its modality's grid and intensity."""

import numpy as np
import torch
from torch.nn import functional

from umbrella.base import UserError
from umbrella.modality import Modality

RECIPE = "area-or-trilinear, z-score, fp16, v2"
"""Names what ``prepare`` does; part of the store's key, so a change here never meets arrays made by the old way."""


def prepare(voxels: np.ndarray, modality: Modality) -> np.ndarray:
    """Resize to the modality's grid and z-score.

    Axes that shrink are averaged over (so that nothing aliases), others interpolated trilinearly. A series keeps its
    first ``grid[3]`` frames. The mean becomes 0 and the standard deviation 1, over all voxels kept.

    Args:
        voxels: float32, (X, Y, Z) or (X, Y, Z, T).

    Returns:
        float16, of shape ``modality.grid``.

    Raises:
        UserError: a series with fewer frames than the grid has; nothing but one value on the grid.
    """
    if voxels.ndim == 4:
        frames = modality.grid[3]
        if voxels.shape[3] < frames:
            raise UserError(f"has {voxels.shape[3]} frames, and its modality's grid {modality.grid} needs {frames}")
        voxels = voxels[..., :frames]
    # One volume per channel, (1, T or 1, X, Y, Z): frames are resized in space and never mixed.
    stack = torch.from_numpy(np.ascontiguousarray(voxels)).reshape(*voxels.shape[:3], -1).permute(3, 0, 1, 2)[None]
    smaller = [min(size, target) for size, target in zip(stack.shape[2:], modality.grid[:3], strict=True)]
    stack = functional.adaptive_avg_pool3d(stack, (smaller[0], smaller[1], smaller[2]))
    stack = functional.interpolate(stack, size=modality.grid[:3], mode="trilinear", align_corners=False)
    resized = stack[0].permute(1, 2, 3, 0).reshape(modality.grid)
    deviation = resized.std()
    # Relative: a map in small units (m²/s) varies by less than rounding does in one whose values are large.
    if deviation <= 1e-6 * resized.abs().max():
        raise UserError(f"every voxel is {resized.flatten()[0]:g} on its modality's grid {modality.grid}")
    scaled = (resized - resized.mean()) / deviation
    return scaled.clamp(-6e4, 6e4).to(torch.float16).numpy()

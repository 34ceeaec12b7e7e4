"""Modalities: grid, patch, preprocessing and tokens of volumes, and windows of series. Does not import torch."""

from math import prod
from typing import Literal

from pydantic import Field, model_validator

from umbrella.base import Section, UserError


class Modality(Section):
    """Preprocessing of one kind of volume. Axes are X, Y, Z in RAS+ order, then time."""

    grid: tuple[int, ...] = Field(min_length=3, max_length=4)
    """Array size (X, Y, Z) in voxels to which volumes are brought; for a series also the frames per window."""
    patch: tuple[int, ...] = Field(min_length=3, max_length=4)
    """Patch size (X, Y, Z) in voxels, and frames, that becomes one token. It divides the grid."""
    fit: Literal["resize", "spacing"] = "resize"
    """How volumes are brought to the grid: resize the whole field of view, or resample to ``spacing`` and crop or pad."""  # noqa: E501
    spacing: float | None = Field(None, gt=0)
    """Voxel size in millimetres, for ``fit: spacing``."""
    intensity: Literal["zscore", "zscore_foreground", "zscore_background_min", "percentiles"] = "zscore"
    """Z-score over all voxels or the foreground, the latter also with the background at the minimum; or percentiles to 0..1."""  # noqa: E501
    percentiles: tuple[float, float] = (1.0, 99.0)
    """Percentiles of all voxels that become 0 and 1, for ``intensity: percentiles``; other values are clipped."""
    background: float = 0.0
    """Intensity outside the head, also used for padding. Voxels with other values are the foreground."""
    nan: Literal["refuse", "background"] = "refuse"
    """Volumes with NaN or infinite voxels: refuse them, or replace these voxels by ``background``."""
    frame_stride: int = Field(1, ge=1)
    """Frames between consecutive frames of a window."""
    window_stride: int = Field(1, ge=1)
    """Frames between the starts of consecutive windows."""

    @model_validator(mode="after")
    def _consistent(self) -> "Modality":
        if len(self.grid) != len(self.patch):
            raise ValueError(f"grid {self.grid} and patch {self.patch} have different numbers of axes")
        if min(*self.grid, *self.patch) < 1:
            raise ValueError(f"grid {self.grid} and patch {self.patch} must be 1 or more along every axis")
        if any(size % step for size, step in zip(self.grid, self.patch, strict=True)):
            raise ValueError(f"patch {self.patch} does not divide grid {self.grid} along every axis")
        if (self.fit == "spacing") != (self.spacing is not None):
            raise ValueError("spacing, in millimetres, belongs to fit: spacing; give both or neither")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles {self.percentiles} are not two rising numbers from 0 to 100")
        return self

    @property
    def is_series(self) -> bool:
        """Whether the volumes have a time axis."""
        return len(self.grid) == 4

    @property
    def patch_grid(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(size // step for size, step in zip(self.grid, self.patch, strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens per volume. Rendering and the volume embedder both use this property."""
        return prod(self.patch_grid)

    @property
    def patch_voxels(self) -> int:
        """Voxels in one patch."""
        return prod(self.patch)

    @property
    def window_length(self) -> int:
        """Frames from the first to the last frame of a window, inclusive."""
        return (self.grid[3] - 1) * self.frame_stride + 1

    def num_windows(self, frames: int) -> int:
        """Return the number of windows. They start at 0, window_stride, ... Raises UserError if there is none."""
        if frames < self.window_length:
            raise UserError(
                f"has {frames} frames, and a window of {self.grid[3]} frames at frame_stride {self.frame_stride} needs"
                f" {self.window_length}; give its modality a shorter grid, or leave the series out"
            )
        return (frames - self.window_length) // self.window_stride + 1

    def pick_window(self, frames: int, rng_key: tuple[int, ...] | None) -> slice:
        """Return the frames of one window of a series.

        Args:
            frames: number of frames of the series.
            rng_key: integer seed of a uniform random choice, such as (seed, epoch, sample). None: the middle window.
        """
        import numpy as np  # not needed by scripts that only read settings

        count = self.num_windows(frames)
        index = (count - 1) // 2 if rng_key is None else int(np.random.default_rng(rng_key).integers(count))
        start = index * self.window_stride
        return slice(start, start + self.window_length, self.frame_stride)


def class_tokens(tower: str, strategy: str) -> int:
    """Class tokens before the patches of each volume. CLIP has one, which the strategy "full" keeps."""
    return int(tower == "clip_vision_model" and strategy == "full")


DEFAULT_MODALITIES = {
    "sMRI": Modality(grid=(24, 24, 24), patch=(8, 8, 8)),
    "dMRI": Modality(grid=(24, 24, 24), patch=(8, 8, 8)),
    "fMRI": Modality(grid=(16, 16, 16, 12), patch=(8, 8, 8, 3), intensity="zscore_background_min"),
}

"""A modality: what its volumes are brought to, and how many tokens such a volume becomes. No torch here."""

from math import prod
from typing import Literal

from pydantic import Field, model_validator

from umbrella.base import Section


class Modality(Section):
    """One kind of volume. Axes are X, Y, Z in RAS+ order (left to right, back to front, bottom to top), then time."""

    grid: tuple[int, ...] = Field(min_length=3, max_length=4)
    """Voxels along X, Y, Z that a volume is brought to, and for a series the number of frames in a window."""
    patch: tuple[int, ...] = Field(min_length=3, max_length=4)
    """Voxels along X, Y, Z (and frames) that become one token; it divides the grid."""
    fit: Literal["resize", "spacing"] = "resize"
    """How the grid is met: the whole field of view resized, or voxels of ``spacing`` with a centred crop or pad."""
    spacing: float | None = Field(None, gt=0)
    """Edge of the voxels in millimetres, for ``fit: spacing``."""
    intensity: Literal["zscore", "zscore_foreground", "zscore_background_min", "percentiles"] = "zscore"
    """Z-score of all voxels, of the foreground, that with the background at its minimum; or percentiles to 0..1."""
    percentiles: tuple[float, float] = (1.0, 99.0)
    """Percentiles of all voxels that become 0 and 1, for ``intensity: percentiles``; what lies beyond is clipped."""
    background: float = 0.0
    """The value outside the head: padding has it, and the foreground is what differs from it."""
    nan: Literal["refuse", "background"] = "refuse"
    """What happens to a volume with NaN or infinite voxels: it is refused, or these voxels become ``background``."""
    frame_stride: int = Field(1, ge=1)
    """Frames from one frame of a window to its next."""
    window_stride: int = Field(1, ge=1)
    """Frames from the start of one window to the start of the next."""

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
        """Whether its volumes have a time axis."""
        return len(self.grid) == 4

    @property
    def patch_grid(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(size // step for size, step in zip(self.grid, self.patch, strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens that one volume becomes. Rendering and the embedder both ask here, and nowhere else."""
        return prod(self.patch_grid)

    @property
    def patch_voxels(self) -> int:
        """Voxels in one patch."""
        return prod(self.patch)


def class_tokens(tower: str, strategy: str) -> int:
    """Tokens that a vision tower puts before a volume's patches and the model keeps, beside ``num_tokens``.

    CLIP has a class token, which the strategy drops ("default") or keeps ("full"). SigLIP has none.
    """
    return int(tower == "clip_vision_model" and strategy == "full")


DEFAULT_MODALITIES = {
    "sMRI": Modality(grid=(24, 24, 24), patch=(8, 8, 8)),
    "dMRI": Modality(grid=(24, 24, 24), patch=(8, 8, 8)),
    "fMRI": Modality(grid=(16, 16, 16, 12), patch=(8, 8, 8, 3), intensity="zscore_background_min"),
}

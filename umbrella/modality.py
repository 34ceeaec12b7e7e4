"""A modality: the grid its volumes are brought to, and how many tokens such a volume becomes. No torch here."""

from math import prod

from pydantic import Field, model_validator

from umbrella.base import Section


class Modality(Section):
    """One kind of volume. Axes are X, Y, Z in RAS+ order (left to right, back to front, bottom to top), then time."""

    grid: tuple[int, ...] = Field(min_length=3, max_length=4)
    """Voxels along X, Y, Z that a volume is resized to, and for a series the number of frames kept."""
    patch: tuple[int, ...] = Field(min_length=3, max_length=4)
    """Voxels along X, Y, Z (and frames) that become one token; it divides the grid."""

    @model_validator(mode="after")
    def _patch_divides_grid(self) -> "Modality":
        if len(self.grid) != len(self.patch):
            raise ValueError(f"grid {self.grid} and patch {self.patch} have different numbers of axes")
        if min(*self.grid, *self.patch) < 1:
            raise ValueError(f"grid {self.grid} and patch {self.patch} must be 1 or more along every axis")
        if any(size % step for size, step in zip(self.grid, self.patch, strict=True)):
            raise ValueError(f"patch {self.patch} does not divide grid {self.grid} along every axis")
        return self

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


DEFAULT_MODALITIES = {
    "sMRI": Modality(grid=(24, 24, 24), patch=(8, 8, 8)),
    "dMRI": Modality(grid=(24, 24, 24), patch=(8, 8, 8)),
    "fMRI": Modality(grid=(16, 16, 16, 12), patch=(8, 8, 8, 3)),
}

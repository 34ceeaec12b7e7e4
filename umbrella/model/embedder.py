"""Volumes to vectors: each modality's patches as one matrix product, plus learned positions per axis."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from umbrella.modality import Modality


def patchify(voxels: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """Cut volumes into patches.

    Args:
        voxels: (n, X, Y, Z) or (n, X, Y, Z, T).
        patch: voxels per patch along each axis; divides the volume's axes.

    Returns:
        (n, patches, voxels per patch). The last axis of the grid runs fastest among patches, and within a patch.
    """
    n, *grid = voxels.shape
    split = [n]
    for size, step in zip(grid, patch, strict=True):
        split += [size // step, step]
    axes = len(grid)
    order = [0, *range(1, 2 * axes + 1, 2), *range(2, 2 * axes + 2, 2)]
    patches = voxels.reshape(split).permute(order)
    return patches.flatten(1 + axes).flatten(1, axes)


class ModalityEmbedder(nn.Module):
    """One modality's patches to vectors: (n, *grid) to (n, num_tokens, width).

    Positions are a sum over axes of one learned table per axis, so that they carry over to other grids.
    """

    def __init__(self, modality: Modality, width: int) -> None:
        super().__init__()
        self.patch = modality.patch
        self.projection = nn.Linear(modality.patch_voxels, width)
        self.positions = nn.ParameterList(nn.Parameter(torch.zeros(size, width)) for size in modality.patch_grid)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights: a z-scored patch becomes a vector of about unit variance; positions start small."""
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)
        nn.init.zeros_(self.projection.bias)
        for table in self.positions:
            nn.init.normal_(table, std=0.02)

    def forward(self, voxels: torch.Tensor) -> torch.Tensor:
        tokens = self.projection(patchify(voxels, self.patch).to(self.projection.weight.dtype))
        # Looked up, not broadcast: tables of one shape would be handed views of one gradient, and add to each other's.
        steps = [torch.arange(len(table), device=table.device) for table in self.positions]
        places = torch.meshgrid(*steps, indexing="ij")
        position = torch.stack([table[place] for table, place in zip(self.positions, places, strict=True)]).sum(0)
        return tokens + position.reshape(-1, tokens.shape[-1])


class VolumeEmbedder(nn.Module):
    """Stands where a vision tower has its 2D embeddings. One ``ModalityEmbedder`` per modality, by name."""

    def __init__(self, modalities: Mapping[str, Modality], width: int) -> None:
        super().__init__()
        self.by_modality = nn.ModuleDict({name: ModalityEmbedder(m, width) for name, m in modalities.items()})

    def reset_parameters(self, names: Collection[str]) -> None:
        """Random weights for these modalities."""
        for name in names:
            embedder = self.by_modality[name]
            assert isinstance(embedder, ModalityEmbedder)
            embedder.reset_parameters()

    def forward(self, pixel_values: tuple[str, torch.Tensor], **unused: object) -> torch.Tensor:
        """``(modality, voxels (n, *grid))`` to (n, num_tokens, width). The tower passes its 2D options along."""
        name, voxels = pixel_values
        return self.by_modality[name](voxels)

"""Volumes to vectors: each modality's patches as one matrix product, plus learned positions per axis."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

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


def resize_positions(table: torch.Tensor, size: int) -> torch.Tensor:
    """Positions (n, width) along an axis of another number of patches: (size, width), linear between the old ones."""
    if len(table) == size:
        return table
    return functional.interpolate(table.T[None], size=size, mode="linear", align_corners=False)[0].T


class ModalityEmbedder(nn.Module):
    """One modality's patches to vectors: (n, *grid) to (n, patches, width).

    Positions are a sum over axes of one learned table per axis. A volume of another grid than the one trained has them
    interpolated along each axis.
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

    def fit_grid(self, patch_grid: tuple[int, ...]) -> None:
        """Keep positions for another grid from now on: patches along each axis, interpolated from those there are."""
        self.positions = nn.ParameterList(
            nn.Parameter(resize_positions(table.detach(), size).clone(), table.requires_grad)
            for table, size in zip(self.positions, patch_grid, strict=True)
        )

    def forward(self, voxels: torch.Tensor) -> torch.Tensor:
        tokens = self.projection(patchify(voxels, self.patch).to(self.projection.weight.dtype))
        sizes = [size // step for size, step in zip(voxels.shape[1:], self.patch, strict=True)]
        tables = [resize_positions(table, size) for table, size in zip(self.positions, sizes, strict=True)]
        # Looked up, not broadcast: tables of one shape would be handed views of one gradient, and add to each other's.
        places = torch.meshgrid(*(torch.arange(size, device=tokens.device) for size in sizes), indexing="ij")
        position = torch.stack([table[place] for table, place in zip(tables, places, strict=True)]).sum(0)
        # Under autocast bfloat16: what the tower passes from layer to layer has the type of what it is given here.
        return (tokens + position.reshape(-1, tokens.shape[-1])).to(tokens.dtype)


class VolumeEmbedder(nn.Module):
    """Stands where a vision tower has its 2D embeddings. One ``ModalityEmbedder`` per modality, by name.

    A tower with a class token (CLIP) has it here too, its position added in; it stands before the patches.
    """

    def __init__(self, modalities: Mapping[str, Modality], width: int, class_token: bool = False) -> None:
        super().__init__()
        self.by_modality = nn.ModuleDict({name: ModalityEmbedder(m, width) for name, m in modalities.items()})
        self.class_embedding = nn.Parameter(torch.randn(width)) if class_token else None

    def forward(self, pixel_values: tuple[str, torch.Tensor], **unused: object) -> torch.Tensor:
        """``(modality, voxels (n, *grid))`` to (n, tokens, width). The tower passes its 2D options along."""
        name, voxels = pixel_values
        tokens = self.by_modality[name](voxels)
        if self.class_embedding is None:
            return tokens
        return torch.cat([self.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], 1)

"""Patch embeddings of volumes with learned position embeddings per axis."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from umbrella.modality import Modality


def patchify(voxels: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """Cut volumes into patches.

    Args:
        voxels: (n, X, Y, Z) or (n, X, Y, Z, T).
        patch: patch size in voxels along each axis. It divides the volume's shape.

    Returns:
        (n, patches, voxels per patch), both in C order: the last axis varies fastest.
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
    """Interpolate position embeddings (n, width) linearly to another number of patches: (size, width)."""
    if len(table) == size:
        return table
    return functional.interpolate(table.T[None], size=size, mode="linear", align_corners=False)[0].T


class ModalityEmbedder(nn.Module):
    """Patch embedding of one modality: (n, *grid) to (n, patches, width).

    The position embedding of a patch is the sum of one learned vector per axis. For another grid, the embeddings are
    interpolated along each axis.

    Args:
        modality: gives the patch size and the grid.
        width: hidden size.
    """

    def __init__(self, modality: Modality, width: int) -> None:
        super().__init__()
        self.patch = modality.patch
        self.projection = nn.Linear(modality.patch_voxels, width)
        self.positions = nn.ParameterList(nn.Parameter(torch.zeros(size, width)) for size in modality.patch_grid)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights: a z-scored patch gets an embedding of about unit variance; positions start small."""
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)
        nn.init.zeros_(self.projection.bias)
        for table in self.positions:
            nn.init.normal_(table, std=0.02)

    def fit_grid(self, patch_grid: tuple[int, ...]) -> None:
        """Replace the position embeddings by interpolated ones for a grid of ``patch_grid`` patches."""
        self.positions = nn.ParameterList(
            nn.Parameter(resize_positions(table.detach(), size).clone(), table.requires_grad)
            for table, size in zip(self.positions, patch_grid, strict=True)
        )

    def forward(self, voxels: torch.Tensor) -> torch.Tensor:
        tokens = self.projection(patchify(voxels, self.patch).to(self.projection.weight.dtype))
        sizes = [size // step for size, step in zip(voxels.shape[1:], self.patch, strict=True)]
        tables = [resize_positions(table, size) for table, size in zip(self.positions, sizes, strict=True)]
        # Index, do not broadcast: broadcast tables of equal shape would get views of one gradient and accumulate in it.
        indices = torch.meshgrid(*(torch.arange(size, device=tokens.device) for size in sizes), indexing="ij")
        position = torch.stack([table[index] for table, index in zip(tables, indices, strict=True)]).sum(0)
        # Under autocast, the hidden states of the tower keep the dtype of its input.
        return (tokens + position.reshape(-1, tokens.shape[-1])).to(tokens.dtype)


class VolumeEmbedder(nn.Module):
    """Replacement for the 2D embeddings of a vision tower, with one ``ModalityEmbedder`` per modality.

    Args:
        modalities: modality by name.
        width: hidden size of the tower.
        class_token: whether the tower (CLIP) has a class token. It precedes the patches; its embedding includes its
            position.
    """

    def __init__(self, modalities: Mapping[str, Modality], width: int, class_token: bool = False) -> None:
        super().__init__()
        self.by_modality = nn.ModuleDict({name: ModalityEmbedder(m, width) for name, m in modalities.items()})
        self.class_embedding = nn.Parameter(torch.randn(width)) if class_token else None

    def forward(self, pixel_values: tuple[str, torch.Tensor], **unused: object) -> torch.Tensor:
        """Embed volumes of one modality.

        Args:
            pixel_values: name of the modality, and voxels (n, *grid).
            unused: options that the tower passes to 2D embeddings.

        Returns:
            (n, tokens, width).
        """
        name, voxels = pixel_values
        tokens = self.by_modality[name](voxels)
        if self.class_embedding is None:
            return tokens
        return torch.cat([self.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], 1)

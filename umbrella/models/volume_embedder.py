"""Patch embeddings of volumes with learned position embeddings per axis, and their initialization from 2D weights."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from umbrella.modality import Modality


def patchify(voxels: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """Cut volumes (n, X, Y, Z) or (n, X, Y, Z, T) into patches.

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

    The position embedding of a patch is the sum of one learned vector per axis.
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

    @property
    def num_tokens(self) -> int:
        """Patches per volume."""
        return prod(len(table) for table in self.positions)

    def fit_grid(self, patch_grid: tuple[int, ...]) -> None:
        """Interpolate the position embeddings along each axis to a grid of ``patch_grid`` patches. In place."""
        self.positions = nn.ParameterList(
            nn.Parameter(resize_positions(table.detach(), size).clone(), table.requires_grad)
            for table, size in zip(self.positions, patch_grid, strict=True)
        )

    def forward(self, voxels: torch.Tensor) -> torch.Tensor:
        tokens = self.projection(patchify(voxels, self.patch).to(self.projection.weight.dtype))
        # Index, do not broadcast: broadcast tables of equal shape would get views of one gradient and accumulate in it.
        places = [torch.arange(len(table), device=tokens.device) for table in self.positions]
        indices = torch.meshgrid(*places, indexing="ij")
        position = torch.stack([table[index] for table, index in zip(self.positions, indices, strict=True)]).sum(0)
        # Under autocast, the hidden states of the tower keep the dtype of its input.
        return (tokens + position.reshape(-1, tokens.shape[-1])).to(tokens.dtype)


class VolumeEmbedder(nn.Module):
    """Replacement for the 2D embeddings of a vision tower, with one ``ModalityEmbedder`` per modality.

    The ``class_token`` of CLIP precedes the patches. Its embedding includes its position.
    """

    def __init__(self, modalities: Mapping[str, Modality], width: int, class_token: bool = False) -> None:
        super().__init__()
        self.by_modality = nn.ModuleDict({name: ModalityEmbedder(m, width) for name, m in modalities.items()})
        self.class_embedding = nn.Parameter(torch.randn(width)) if class_token else None

    def forward(self, pixel_values: tuple[str, torch.Tensor], **unused: object) -> torch.Tensor:
        """Embed the voxels (n, *grid) of a modality, given by name: (n, tokens, width)."""
        name, voxels = pixel_values
        tokens = self.by_modality[name](voxels)
        if self.class_embedding is None:
            return tokens
        return torch.cat([self.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], 1)


@torch.no_grad()
def inflate(embedder: VolumeEmbedder, embeddings_2d: Any) -> None:
    """Overwrite the weights of all modalities with inflated 2D embeddings of SigLIP or CLIP. In place.

    The first axis of a volume is depth; the second and third correspond to the rows and columns of an image. For a
    volume that repeats one slice, the embedder then returns the 2D embedding of that slice as a grey RGB image.
    """
    positions = embeddings_2d.position_embedding.weight.float()
    if embedder.class_embedding is not None:
        positions = positions[1:]
    side = round(len(positions) ** 0.5)
    table = positions.reshape(side, side, -1)
    weight, bias = embeddings_2d.patch_embedding.weight.float(), embeddings_2d.patch_embedding.bias
    for modality in embedder.by_modality.values():
        assert isinstance(modality, ModalityEmbedder)
        modality.projection.weight.copy_(inflate_patches(weight, modality.patch))
        modality.projection.bias.copy_(bias if bias is not None else torch.zeros(()))
        factors = factorise_positions(table, [len(position) for position in modality.positions])
        for position, factor in zip(modality.positions, factors, strict=True):
            position.copy_(factor)


def inflate_patches(weight: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """Inflate 2D patch weights to 3D or 4D.

    Channels are summed, because a grey image has equal channels. Rows and columns are resized so that the product with
    a resized patch is preserved (PI-resize of FlexiViT, Beyer et al., CVPR 2023). Weights are divided evenly over depth
    and time (I3D, Carreira and Zisserman, CVPR 2017).

    Args:
        weight: (width, channels, rows, columns).
        patch: (depth, height, width) or (depth, height, width, frames) in voxels.

    Returns:
        (width, voxels per patch).
    """
    depth, height, width, *frames = patch
    plane = _pi_resize_matrix(weight.shape[2], height) @ weight.sum(1) @ _pi_resize_matrix(weight.shape[3], width).T
    time = frames[0] if frames else 1
    even = plane[:, None, :, :, None] / (depth * time)
    return even.expand(-1, depth, -1, -1, time).flatten(1)


def _pi_resize_matrix(old: int, new: int) -> torch.Tensor:
    """Return the matrix (new, old) that resizes weights: the pseudo-inverse of linear interpolation."""
    return torch.linalg.pinv(resize_positions(torch.eye(old), new).T)


def factorise_positions(table: torch.Tensor, patch_grid: Sequence[int]) -> list[torch.Tensor]:
    """Approximate 2D position embeddings by a sum of one table per axis of a volume (least squares).

    Depth gets the mean, rows and columns get their deviations from the mean, and time gets zeros.

    Args:
        table: (rows, columns, width).
        patch_grid: number of patches along each axis.

    Returns:
        One table (patches, width) per axis.
    """
    mean = table.mean((0, 1))
    rows, columns = table.mean(1) - mean, table.mean(0) - mean
    depth, height, width, *frames = patch_grid
    factors = [mean.expand(depth, -1), resize_positions(rows, height), resize_positions(columns, width)]
    return factors + [mean.new_zeros(n, len(mean)) for n in frames]

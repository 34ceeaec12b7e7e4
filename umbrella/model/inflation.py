"""A volume embedder from a checkpoint's 2D one: patch weights spread over depth and time, positions taken apart.

The first axis of a volume is its depth; the second and third are an image's rows and columns. What is inflated gives,
for a volume made of one repeated slice, what the 2D embedder gives for that slice as a grey image of three channels.
"""

from typing import Any

import torch
from torch import nn

from umbrella.model.volume_embedder import ModalityEmbedder, VolumeEmbedder, resize_positions


@torch.no_grad()
def inflate(embedder: VolumeEmbedder, flat: Any) -> None:
    """Overwrite every modality's weights with those of a SigLIP's or CLIP's 2D embeddings, ``flat``."""
    positions = flat.position_embedding.weight.float()
    if embedder.class_embedding is not None:
        positions = positions[1:]
    side = round(len(positions) ** 0.5)
    table = positions.reshape(side, side, -1)
    weight, bias = flat.patch_embedding.weight.float(), flat.patch_embedding.bias
    for modality in embedder.by_modality.values():
        assert isinstance(modality, ModalityEmbedder)
        modality.projection.weight.copy_(inflate_patches(weight, modality.patch))
        modality.projection.bias.copy_(bias if bias is not None else torch.zeros(()))
        for own, factor in zip(modality.positions, factorise_positions(table, modality.positions), strict=True):
            own.copy_(factor)


def inflate_patches(weight: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """2D patch weights (width, channels, rows, columns) to (width, voxels of ``patch``): (d, h, w) or (d, h, w, t).

    Channels are summed, since a grey image has the same value in each. Rows and columns of another number are resized
    so that a resized patch keeps its product with them (PI-resize of FlexiViT, Beyer et al., CVPR 2023). Depth and time
    share the weight evenly (I3D, Carreira and Zisserman, CVPR 2017).
    """
    depth, height, width, *frames = patch
    plane = _resizing(weight.shape[2], height) @ weight.sum(1) @ _resizing(weight.shape[3], width).T
    time = frames[0] if frames else 1
    even = plane[:, None, :, :, None] / (depth * time)
    return even.expand(-1, depth, -1, -1, time).flatten(1)


def _resizing(old: int, new: int) -> torch.Tensor:
    """(new, old): weights of ``new`` pixels from those of ``old``, by the pseudo-inverse of linear interpolation."""
    return torch.linalg.pinv(resize_positions(torch.eye(old), new).T)


def factorise_positions(table: torch.Tensor, axes: nn.ParameterList) -> list[torch.Tensor]:
    """2D positions (rows, columns, width) as one table per axis of a volume, summed when used: (patches, width) each.

    The least-squares fit: the mean goes to depth, the rows' and the columns' deviations from it to their axes, and time
    starts at nothing. Exact where the 2D positions are such a sum.
    """
    mean = table.mean((0, 1))
    rows, columns = table.mean(1) - mean, table.mean(0) - mean
    factors = [
        mean.expand(len(axes[0]), -1),
        resize_positions(rows, len(axes[1])),
        resize_positions(columns, len(axes[2])),
    ]
    return factors + [torch.zeros_like(time) for time in list(axes)[3:]]

"""Initialize a volume embedder from the 2D embeddings of a checkpoint (inflation).

The first axis of a volume is depth; the second and third axis correspond to the rows and columns of an image. For a
volume that repeats one slice, an inflated embedder returns the 2D embedding of that slice as a grey RGB image.
"""

from typing import Any

import torch
from torch import nn

from umbrella.models.volume_embedder import ModalityEmbedder, VolumeEmbedder, resize_positions


@torch.no_grad()
def inflate(embedder: VolumeEmbedder, embeddings_2d: Any) -> None:
    """Overwrite the weights of all modalities with inflated 2D embeddings of SigLIP or CLIP. In place."""
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
        for position, factor in zip(modality.positions, factorise_positions(table, modality.positions), strict=True):
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


def factorise_positions(table: torch.Tensor, axes: nn.ParameterList) -> list[torch.Tensor]:
    """Approximate 2D position embeddings by a sum of one table per axis of a volume (least squares).

    Depth gets the mean, rows and columns get their deviations from the mean, and time gets zeros.

    Args:
        table: (rows, columns, width).
        axes: current tables of the volume's axes, (patches, width) each. Only their shapes are used.

    Returns:
        One table (patches, width) per axis.
    """
    mean = table.mean((0, 1))
    rows, columns = table.mean(1) - mean, table.mean(0) - mean
    factors = [
        mean.expand(len(axes[0]), -1),
        resize_positions(rows, len(axes[1])),
        resize_positions(columns, len(axes[2])),
    ]
    return factors + [torch.zeros_like(time) for time in list(axes)[3:]]

"""A simple fully convolutional network (SFCN) after Peng et al., Medical Image Analysis 68:101871, 2021."""

from collections.abc import Sequence

import torch
from torch import nn


class Sfcn(nn.Module):
    """Blocks that halve the grid, one of 1x1x1 kernels, the mean over what is left of the grid, and a linear map.

    Args:
        grid: (X, Y, Z); how many blocks there are follows from it, see ``blocks_of``.
        channels: after each halving block, and after the one of 1x1x1 kernels. Of more than the grid has room for, the
            first ones and the last.
        outputs: numbers per volume.
        inputs: channels of a volume: 1, or the frames of a series.
    """

    def __init__(
        self, grid: Sequence[int], channels: Sequence[int], outputs: int, dropout: float = 0.5, inputs: int = 1
    ) -> None:
        super().__init__()
        halving = channels[: blocks_of(grid, channels)]
        self.blocks = len(halving)
        layers: list[nn.Module] = []
        for before, after in zip([inputs, *halving], halving, strict=False):
            layers += [nn.Conv3d(before, after, 3, padding=1), nn.BatchNorm3d(after), nn.MaxPool3d(2), nn.ReLU()]
        last = channels[-1]
        layers += [nn.Conv3d([inputs, *halving][-1], last, 1), nn.BatchNorm3d(last), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, outputs)  # a 1x1x1 kernel on a grid of one voxel

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Volumes (n, inputs, X, Y, Z) to log probabilities (n, outputs), float32."""
        pooled = self.features(volumes).mean((2, 3, 4))
        return self.head(self.dropout(pooled)).float().log_softmax(1)


def blocks_of(grid: Sequence[int], channels: Sequence[int]) -> int:
    """Blocks that halve a grid (X, Y, Z): as many as there are channels for, while its shortest axis keeps 2 voxels."""
    return min(len(channels) - 1, max(0, min(grid).bit_length() - 2))

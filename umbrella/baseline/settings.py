"""Settings of the baseline."""

from typing import Literal

from pydantic import Field

from umbrella.base import Section


class BaselineSettings(Section):
    """The baseline: a small 3D CNN (SFCN) on the same data.

    It shares all other settings with the language model: optim.warmup, .schedule and .clip; train.augment,
    .evaluate_every, .evaluation_batch_size and .patience; seed, data, evaluate, resources, tracking.
    """

    target: str = ""
    """The target to predict, as in metadata.target ("sex"). Empty: one network for each target of the training data."""
    modality: str = "sMRI"
    """The modality of the input volume."""
    channels: list[int] = Field([32, 64, 128, 256, 256, 64], min_length=1)
    """Output channels of each block; the last block is 1x1x1. Each other block halves the grid, down to 2 voxels."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout probability of the features."""
    bins: int = Field(40, ge=10)
    """Number of bins for a numeric target such as age."""
    epochs: int = Field(30, ge=1)
    """Passes over the training volumes."""
    batch_size: int = Field(8, ge=2)
    """Volumes per worker and optimizer step."""
    lr: float = Field(0.03, gt=0)
    """Peak learning rate of SGD."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(1e-3, ge=0)
    """Weight decay of SGD, on all weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the forward pass."""

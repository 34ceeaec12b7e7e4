"""Settings of the baseline."""

from typing import Literal

from pydantic import Field

from umbrella.base import Section


class BaselineSettings(Section):
    """A small 3D CNN (SFCN) that is trained on the same data, for comparison.

    All other settings are shared with the language model: optim.warmup, optim.schedule and optim.clip; train.augment,
    train.evaluate_every, train.evaluation_batch_size and train.patience; seed, data, evaluate, resources, tracking.
    """

    target: str = ""
    """Target to predict, as in metadata.target ("sex"). Empty: each target with labels in the training data, one after another."""  # noqa: E501
    modality: str = "sMRI"
    """Modality of the input volumes; the network reads one volume at a time."""
    channels: list[int] = Field([32, 64, 128, 256, 256, 64], min_length=1)
    """Output channels of each block; the last block has a kernel of 1x1x1. Small grids use fewer blocks: each block halves the grid, down to 2 voxels."""  # noqa: E501
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout probability of the features."""
    bins: int = Field(40, ge=10)
    """Bins that the range of a numeric target, such as age, is divided into."""
    epochs: int = Field(30, ge=1)
    """Passes over the training volumes."""
    batch_size: int = Field(8, ge=2)
    """Volumes per worker and step."""
    lr: float = Field(0.03, gt=0)
    """Peak learning rate of SGD."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(1e-3, ge=0)
    """Weight decay of all weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the forward pass."""

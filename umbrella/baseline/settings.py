"""Settings of the baseline."""

from typing import Literal

from pydantic import Field

from umbrella.base import Section


class BaselineSettings(Section):
    """A small 3D CNN (SFCN) on the same data: what the field would use.

    Where these say nothing it goes by the same settings as a language model: optim.warmup, .schedule and .clip;
    train.augment, .evaluate_every, .evaluation_batch_size and .patience; seed, data, evaluate, resources, tracking.
    """

    target: str = ""
    """What is learned, as in metadata.target ("sex"). Empty: each target that the training data have labels of, in turn."""  # noqa: E501
    modality: str = "sMRI"
    """The kind of volumes that it looks at, one at a time."""
    channels: list[int] = Field([32, 64, 128, 256, 256, 64], min_length=1)
    """Channels after each block, the last one of 1x1x1. Small grids have fewer blocks: halved as long as 2 voxels are left."""  # noqa: E501
    dropout: float = Field(0.5, ge=0, lt=1)
    """Part of the features that is left out at random in training."""
    bins: int = Field(40, ge=10)
    """Bins that the range of a number, as an age, is cut into."""
    epochs: int = Field(30, ge=1)
    """Passes over the training volumes."""
    batch_size: int = Field(8, ge=2)
    """Volumes per worker and step."""
    lr: float = Field(0.03, gt=0)
    """Peak learning rate of stochastic gradient descent."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Part of the last step that goes on in the next."""
    weight_decay: float = Field(1e-3, ge=0)
    """Decay of all weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass."""

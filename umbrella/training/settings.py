"""Settings of the optimizer, of training, and of resources."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from umbrella.base import PathOrAddress, Section, mask_secrets, reject_secrets


class OptimSettings(Section):
    """The AdamW optimizer with warm-up."""

    lr: float = Field(7e-4, gt=0)
    """Peak learning rate."""
    embedder_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the volume embedder. null: the same as lr."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices. Norms, biases, position embeddings and the class token have none."""
    warmup: int = Field(20, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up: decays to a tenth of the peak (cosine), to zero (linear), or stays constant."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient; a larger gradient is scaled down to it."""


class LossSettings(Section):
    """The loss of supervised tokens."""

    numbers: Literal["cross_entropy", "regression_aware"] = "regression_aware"
    """Loss of the tokens of numbers: cross_entropy, as of all others; regression_aware also counts how far the predicted numbers are from the true one."""  # noqa: E501


class AugmentSettings(Section):
    """Random augmentation of the volumes in training. 0 disables a transform. Evaluation uses the original volumes."""

    flip_left_right: float = Field(0, ge=0, le=1)
    """Probability of a left-right flip of a sample. Use it only if no answer depends on the side."""
    flip_other: float = Field(0, ge=0, le=1)
    """Probability of a front-back flip of a sample, and independently of a top-bottom flip."""
    rotate: float = Field(0, ge=0, le=180)
    """Largest rotation around each of the three axes, in degrees."""
    scale: float = Field(0, ge=0, lt=1)
    """Largest relative change of size: 0.1 scales the content by 0.9 to 1.1."""
    shift: float = Field(0, ge=0, le=1)
    """Largest shift along each axis, as a fraction of its length."""
    contrast: float = Field(0, ge=0, lt=1)
    """Largest relative change of contrast: 0.2 scales a volume around its mean by 0.8 to 1.2."""
    brightness: float = Field(0, ge=0)
    """Largest offset of the intensities, in standard deviations of the volume."""
    noise: float = Field(0, ge=0)
    """Standard deviation of Gaussian noise per voxel, in standard deviations of the volume."""


class TrainSettings(Section):
    """Training of one model."""

    augment: AugmentSettings = AugmentSettings()
    epochs: int = Field(20, ge=1)
    """Passes over the training conversations."""
    batch_size: int = Field(4, ge=1)
    """Conversations per worker and forward pass (micro-batch)."""
    tokens_per_batch: int = Field(0, ge=0)
    """Largest number of tokens per worker and forward pass, padding included (with data.pack, without). A micro-batch has as many conversations as fit, at least one. 0: batch_size."""  # noqa: E501
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    checkpoint_activations: bool = False
    """Activation checkpointing: recompute activations in the backward pass. Less memory, more time."""
    shard: bool = False
    """Shard weights, gradients and optimizer state over the workers (FSDP2), for models that do not fit on one GPU."""
    compile: bool = False
    """Compile the layers of vision tower and language model (torch.compile): a slow start, then faster steps."""
    max_loss_ratio: float = Field(10.0, ge=0)
    """Largest loss, as a multiple of the median of the last 50 losses, or of 1 nat if that is more; above it the run ends. 0: only NaN or infinity ends it."""  # noqa: E501
    evaluate_every: int = Field(0, ge=0)
    """Steps between evaluations. 0: after each epoch."""
    evaluation_batch_size: int = Field(32, ge=1)
    """Conversations per worker and forward pass in evaluation."""
    patience: int = Field(0, ge=0)
    """Early stopping: stop after this many evaluations without a better tune.metric. 0: never."""


class ResourceSettings(Section):
    """Workers, storage and the Ray cluster."""

    address: str = ""
    """Address of a running Ray cluster. Empty: RAY_ADDRESS if it is set, else a local Ray on this machine."""
    workers: int = Field(1, ge=1)
    """Data-parallel workers per training."""
    min_workers: int = Field(0, ge=0)
    """Smallest number of workers with which a training starts or continues if not all are available. 0: all are required."""  # noqa: E501
    grow_every: float = Field(60.0, gt=0)
    """Seconds between checks for resources for more workers, with min_workers. The training then restarts from its last checkpoint."""  # noqa: E501
    cpus_per_worker: float = Field(0.5, gt=0)
    """CPUs reserved for each worker. Ray needs one more CPU for its own processes."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs reserved for each worker. With a fraction, trials share a GPU."""
    max_failures: int = Field(3, ge=0)
    """How often a training restarts from its last checkpoint after a worker died."""
    keep_checkpoints: int = Field(1, ge=1)
    """Number of newest checkpoints to keep, besides the best one by tune.metric."""
    storage: PathOrAddress = "runs"
    """Folder for all output: phantom cohort, volume store, checkpoints, sweeps, MLflow's database."""
    upload: PathOrAddress = ""
    """Address, such as s3://bucket/runs, to which trainings and sweeps are uploaded while they run. One that is missing on this machine is downloaded from there. Empty: no upload."""  # noqa: E501
    store: PathOrAddress = ""
    """Volume store, shared by all nodes: a folder or an address such as s3://bucket/volumes. Empty: <storage>/volumes."""  # noqa: E501
    node_store: PathOrAddress = ""
    """Local folder on each node, on a fast disk, that caches volumes of the store when they are read. Empty: none."""

    @property
    def ray_address(self) -> str:
        """Address of the Ray cluster to join; "local" starts one on this machine."""
        return self.address or os.environ.get("RAY_ADDRESS") or "local"

    @property
    def threads(self) -> int:
        """Threads per worker. Fixed by a setting, not by the machine, because sums depend on their number."""
        return max(1, int(self.cpus_per_worker))

    @property
    def least_workers(self) -> int:
        """Smallest number of workers of a training."""
        return self.min_workers or self.workers

    @property
    def single_worker(self) -> bool:
        """Whether a training always has one worker. In a sweep, it then runs in the trial's process."""
        return self.workers == self.least_workers == 1

    @field_validator("storage", mode="before")
    @classmethod
    def _check_storage(cls, storage: Any) -> Any:
        if "://" in str(storage):
            raise ValueError(
                "storage is a folder that is written to, not an address; give a folder of this machine, and"
                f" resources.upload={mask_secrets(str(storage))} to have trainings and sweeps uploaded there"
            )
        return storage

    @field_validator("address")
    @classmethod
    def _reject_secrets(cls, address: str) -> str:
        return reject_secrets(address, "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token")

    @field_validator("storage", "upload", "store", "node_store")
    @classmethod
    def _absolute(cls, place: str) -> str:
        """Make paths absolute, because Ray gives workers and trials other working directories."""
        return place if not place or "://" in place else str(Path(place).absolute())

    @model_validator(mode="after")
    def _check_min_workers(self) -> "ResourceSettings":
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self

"""Settings of the optimizer, of one training, and of what it runs on."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from umbrella.base import PathOrAddress, Section, mask_secrets, reject_secrets


class OptimSettings(Section):
    """AdamW with warm-up."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    embedder_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the volume embedder. null: the same as lr."""
    weight_decay: float = Field(0.01, ge=0)
    """Decay of matrices; norms, biases, positions and the class token have none."""
    warmup: int = Field(20, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after warm-up: to a tenth of the peak, to zero, or not at all."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient; a larger one is scaled down to this."""


class AugmentSettings(Section):
    """Random changes of the volumes in training, each off at 0; evaluation sees the volumes as they are."""

    flip_left_right: float = Field(0, ge=0, le=1)
    """Probability that a sample is mirrored left to right. Only where no answer depends on the side."""
    flip_other: float = Field(0, ge=0, le=1)
    """Probability that a sample is mirrored back to front, and the same again for bottom to top."""
    rotate: float = Field(0, ge=0, le=180)
    """Largest angle of a turn around each of the three axes, in degrees."""
    scale: float = Field(0, ge=0, lt=1)
    """Largest relative change of size: 0.1 makes the content 0.9 to 1.1 times as large."""
    shift: float = Field(0, ge=0, le=1)
    """Largest shift along each axis, as a share of the axis."""
    contrast: float = Field(0, ge=0, lt=1)
    """Largest relative change of each volume's contrast: 0.2 stretches it around its mean by 0.8 to 1.2."""
    brightness: float = Field(0, ge=0)
    """Largest value added to each volume or taken from it, in its standard deviations."""
    noise: float = Field(0, ge=0)
    """Standard deviation of the Gaussian noise added to each voxel, in standard deviations of its volume."""


class TrainSettings(Section):
    """One training."""

    augment: AugmentSettings = AugmentSettings()
    epochs: int = Field(8, ge=1)
    """Passes over the training conversations."""
    batch_size: int = Field(4, ge=1)
    """Conversations per worker and forward pass."""
    accumulate: int = Field(2, ge=1)
    """Forward passes per optimizer step."""
    checkpoint_activations: bool = False
    """Keep only what enters each layer, and compute the rest again in the backward pass: less memory, more time."""
    shard: bool = False
    """Each worker holds a share of weights, gradients and optimizer state (FSDP2): for what does not fit on one GPU."""
    compile: bool = False
    """Compile the layers of tower and language model (torch.compile): a slow start, then faster steps."""
    max_loss_ratio: float = Field(10.0, ge=0)
    """A loss over this many times the median of the last 50, and over as many nats, ends the run. 0: only NaN does."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between evaluations. 0: after each epoch."""
    evaluation_batch_size: int = Field(32, ge=1)
    """Conversations per worker and forward pass in evaluation."""
    patience: int = Field(0, ge=0)
    """Evaluations in a row without a better tune.metric after which a training stops. 0: it never does."""


class ResourceSettings(Section):
    """What runs on what."""

    address: str = ""
    """Address of a running Ray cluster. Empty: RAY_ADDRESS if it is set, else a Ray of its own on this machine."""
    workers: int = Field(1, ge=1)
    """Data-parallel workers per training."""
    min_workers: int = Field(0, ge=0)
    """With fewer workers than ``workers`` a training starts or goes on too, down to this many. 0: it waits for all."""
    grow_every: float = Field(60.0, gt=0)
    """Seconds between two looks for room for more workers, with ``min_workers``: they start anew from the last checkpoint."""  # noqa: E501
    cpus_per_worker: float = Field(0.5, gt=0)
    """CPUs reserved for each worker. Ray's own helpers need one whole CPU beside all workers."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs reserved for each worker; a fraction lets trials share a card."""
    max_failures: int = Field(3, ge=0)
    """How often a training starts again from its last checkpoint after a worker died."""
    keep_checkpoints: int = Field(1, ge=1)
    """Newest checkpoints of a training that are kept, beside the best by tune.metric."""
    storage: PathOrAddress = "runs"
    """Folder for everything that runs write: cohort, volume store, checkpoints, sweeps, MLflow's database."""
    upload: PathOrAddress = ""
    """An address, such as s3://bucket/runs, to which trainings and sweeps are uploaded while they run, and from which one that is not on this machine is downloaded. Empty: none."""  # noqa: E501
    store: PathOrAddress = ""
    """Where prepared volumes are kept for all: a folder, or an address such as s3://bucket/volumes. Empty: <storage>/volumes."""  # noqa: E501
    node_store: PathOrAddress = ""
    """A folder of each node's own, on a fast disk, to which volumes come from the store when asked for. Empty: none."""

    @property
    def ray_address(self) -> str:
        """Address of the cluster to join; "local" for a Ray of this machine's own."""
        return self.address or os.environ.get("RAY_ADDRESS") or "local"

    @property
    def threads(self) -> int:
        """Threads of a worker's arithmetic. Sums depend on how many share them, so that is not left to the machine."""
        return max(1, int(self.cpus_per_worker))

    @property
    def least_workers(self) -> int:
        """The fewest workers that a training runs on."""
        return self.min_workers or self.workers

    @property
    def single_worker(self) -> bool:
        """Whether a training always has one worker. A trial's then runs in the trial's own process."""
        return self.workers == self.least_workers == 1

    @field_validator("storage", mode="before")
    @classmethod
    def _storage_is_a_folder(cls, storage: Any) -> Any:
        if "://" in str(storage):
            raise ValueError(
                "storage is a folder that is written to, not an address; give a folder of this machine, and"
                f" resources.upload={mask_secrets(str(storage))} to have trainings and sweeps uploaded there"
            )
        return storage

    @field_validator("address")
    @classmethod
    def _holds_no_secret(cls, address: str) -> str:
        return reject_secrets(address, "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token")

    @field_validator("storage", "upload", "store", "node_store")
    @classmethod
    def _means_the_same_in_every_process(cls, place: str) -> str:
        """Ray gives workers and trials working folders of their own; a relative path is of where the script runs."""
        return place if not place or "://" in place else str(Path(place).absolute())

    @model_validator(mode="after")
    def _least_is_not_most(self) -> "ResourceSettings":
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self

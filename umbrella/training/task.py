"""The description of a training, ``Job``, and the interface between the training loop and a model, ``Task``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
import torch

from umbrella.config import Settings
from umbrella.data.masking import Redact
from umbrella.data.pipeline import Plan, count_processes
from umbrella.evaluation.candidates import Candidates
from umbrella.evaluation.predictions import Prediction


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """One training of any model, as every rank gets it.

    With Ray Train, three processes unpickle it: the script or trial, the controller, and the rank. Importing the model
    takes seconds, so only the rank does it.
    """

    task: Callable[[], Callable[..., Any]]
    """Returns the class of the task, see ``task.Task``. It is a function so that only the ranks import the class."""
    settings: Settings
    data: Mapping[str, str | int]
    """Parameters of the run in MLflow: the fingerprint of the data, and the number of samples in quarantine."""
    tracking: dict[str, str | None]
    """Arguments of ``MlflowLogger.start``."""
    folder: str
    """Folder of the training."""
    start_time: float = 0.0
    """Start of this attempt, in seconds since 1970."""
    datasets: Sequence[Mapping[str, Any]] = ()
    """The splits as inputs of the run in MLflow, see ``tracking.provenance.describe``."""
    is_trial: bool = False
    """Whether Ray Tune runs it."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Sections of the settings that have no effect on this kind of training."""

    @abstractmethod
    def plan(self, workers: int, sorted_by: int = 0) -> Plan:
        """Return the order of samples.

        Args:
            workers: number of ranks.
            sorted_by: of the checkpoint, see ``Plan``.
        """

    @abstractmethod
    def maker(self, plan: Plan, decode: bool) -> Callable[[int, int], Any]:
        """Return a function that makes a micro-batch, without its volumes, of the positions ``start`` to ``stop``.

        Other processes may call it, so it can be pickled.

        Args:
            decode: whether it also decodes volumes that the store lacks.
        """

    def loader_processes(self, on_gpu: bool) -> int:
        """Return the number of processes that call ``maker`` for a rank; 0: its threads do."""
        return 0

    @property
    def in_trial(self) -> bool:
        """Whether it runs in the process of a trial, without workers of Ray Train."""
        return self.is_trial and self.settings.resources.single_worker

    @property
    def name(self) -> str:
        """The name on Ray's dashboard: short and without a slash, because Ray uses it in file names."""
        return str(self.tracking["name"]).replace("/", "_")[:100]


@dataclass(frozen=True, kw_only=True)
class LanguageModelJob(Job):
    """The training of a language model that reads volumes."""

    train: ray.ObjectRef
    """Table of the training conversations, see ``data.pipeline.to_table``."""
    validation: ray.ObjectRef
    """Table of the questions of the validation conversations."""
    train_lengths: np.ndarray
    """See ``data.splits.Splits.lengths``."""
    train_tokens: np.ndarray
    """See ``data.splits.Splits.tokens``."""
    train_groups: np.ndarray | None = None
    """See ``data.pipeline.group_samples``."""
    validation_lengths: np.ndarray
    candidates: Candidates
    """The candidate answers of the validation split."""
    modalities: Sequence[str]
    """Names of the modalities that occur in the training split."""
    longest_answer: int
    """See ``data.splits.Splits.longest_answer``."""
    unused: ClassVar[tuple[str, ...]] = ("tune", "baseline")

    def plan(self, workers: int, sorted_by: int = 0) -> Plan:
        """See ``Job.plan``."""
        return make_plan(self.settings, workers, self.train_lengths, self.train_tokens, self.train_groups, sorted_by)

    def maker(self, plan: Plan, decode: bool) -> Callable[[int, int], Any]:
        """See ``Job.maker``."""
        from umbrella.data.batch_maker import BatchMaker  # imports torch, which only the ranks need

        return BatchMaker(self.settings, self.train, plan, decode)

    def loader_processes(self, on_gpu: bool) -> int:
        """See ``Job.loader_processes``."""
        return count_processes(self.settings.data.loader, on_gpu)


def make_plan(
    settings: Settings,
    workers: int,
    lengths: np.ndarray,
    tokens: np.ndarray,
    groups: np.ndarray | None = None,
    sorted_by: int = 0,
) -> Plan:
    """Make the plan of a training of N conversations; ``lengths``, ``tokens`` and ``groups`` are (N,), see ``Plan``."""
    train = settings.train
    return Plan(
        size=len(lengths),
        seed=settings.seed,
        epochs=train.epochs,
        workers=workers,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        lengths=lengths,
        groups=groups,
        tokens=tokens,
        max_tokens=train.tokens_per_batch,
        packed=settings.data.pack > 0,
        window=settings.data.bucket_batches,
        sorted_by=sorted_by,
    )


@dataclass(frozen=True)
class Summary:
    """The description of a task that a run logs before its first step."""

    text: str
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """File name to content."""


class Task(ABC):
    """A model with its batches, steps, evaluations and checkpoints.

    Every rank has a task. ``augment``, ``step``, ``evaluate``, ``load_weights`` and ``finish`` are collective:
    every rank calls them.
    """

    optimizer: torch.optim.Optimizer
    files: Mapping[str, bytes] = {}
    """Files of every checkpoint beside its weights: name to content. Used on rank 0."""
    predictions: Sequence[Prediction] = ()
    """Predictions of the last evaluation for the whole validation split."""

    @abstractmethod
    def load(self, made: Any) -> Any:
        """Read the volumes of a micro-batch of ``Job.maker``. The threads of the data pipeline call it.

        Returns:
            An object with ``sample_indices``, an (N,) int64 tensor of indices in the training split; N ``task_ids``;
            and ``apply(change)``, which returns a batch with ``change`` applied to every tensor.
        """

    @abstractmethod
    def augment(self, batch: Any) -> Any:
        """Return a batch with augmented volumes."""

    @abstractmethod
    def step(self, batches: Sequence[Any], schedule: torch.optim.lr_scheduler.LRScheduler) -> dict[str, float]:
        """Make one optimizer step with the micro-batches of one global batch.

        Returns:
            Metrics by name: at least train/loss and train/lr, the learning rate of this step; for text also
            train/supervised_tokens, the number of targets in the global batch.

        Raises:
            FloatingPointError: the loss or the gradient is not finite, on every rank alike. Nothing is changed.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the validation split, the same on every rank."""

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that a checkpoint holds, on any device and maybe sharded."""

    @abstractmethod
    def save_weights(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Write copies of the ``weights``. The thread of ``CheckpointWriter`` calls it."""

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Load the weights of a checkpoint."""

    @abstractmethod
    def summary(self, redact: Redact) -> Summary:
        """Describe the task. Rank 0 calls it.

        Args:
            redact: applied to texts that name subjects.
        """

    def finish(self, best: Path | None) -> None:  # noqa: B027  # most tasks end with their last step
        """Finish the task after the last step.

        Args:
            best: the best checkpoint.
        """

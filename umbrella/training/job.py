"""The description of a training that every rank gets.

Where Ray Train starts them, three processes of a training unpickle a job: the script or trial, the controller and the
rank. Only the rank needs the model, so only the rank imports it: seconds each time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import ray

from umbrella.config import Settings


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training, whatever is trained."""

    task: Callable[[], Callable[..., Any]]
    """Returns the class of the task, see ``task.Task``. A function, so that only the ranks import the class."""
    settings: Settings
    data: Mapping[str, str | int]
    """Facts about the data for MLflow: their fingerprint, and the number of samples in quarantine."""
    tracking: dict[str, str | None]
    """Arguments of ``MlflowLogger.start``."""
    folder: str
    """Where this training's checkpoints lie."""
    start_time: float = 0.0
    """When this attempt at the training began, in seconds since 1970."""
    datasets: Sequence[Mapping[str, Any]] = ()
    """The splits as MLflow is told of them, see ``tracking.datasets``."""
    is_trial: bool = False
    """Whether Ray Tune runs it."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Sections of the settings that do not act in such a training."""

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
    train_lengths: np.ndarray
    """See ``data.ingest.Splits.lengths``."""
    validation_lengths: np.ndarray
    candidates: Mapping[str, Mapping[str, str]]
    """See ``evaluation.scoring.Candidates``."""
    modalities: Sequence[str]
    """Names of the modalities that occur in the training split."""
    longest_answer: int
    """See ``data.ingest.Splits.longest_answer``."""
    unused: ClassVar[tuple[str, ...]] = ("tune", "baseline")

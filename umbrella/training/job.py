"""The description of a training that every rank gets.

With Ray Train, three processes unpickle a job: the script or trial, the controller, and the rank. Importing the model
takes seconds, so only the rank does it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import ray

from umbrella.config import Settings


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training of any model."""

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

"""What the workers of a baseline's training are told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import ray

from umbrella.baseline.labels import Bins, Classes
from umbrella.evaluation.prediction import Prediction
from umbrella.training.job import AnyJob, Runs

Question = tuple[Prediction, str]
"""A conversation that nobody has answered yet, and the path of the volume that answers it."""
PREDICTIONS = "predictions.jsonl"
"""The file in the training's folder with the answers of its best checkpoint, see ``evaluation.prediction``."""


@dataclass(frozen=True, kw_only=True)
class BaselineJob(AnyJob):
    """The training of one network for one target. What it takes from ``settings`` is as ``run.resolved`` says."""

    target: str
    head: Classes | Bins
    samples: ray.ObjectRef
    """Sequence of ``Sample``, to learn from."""
    validation: ray.ObjectRef
    """Sequence of ``Question``."""
    asked: ray.ObjectRef
    """Sequence of ``Question``: of the split that is evaluated at the end."""
    idle: ClassVar[tuple[str, ...]] = ("tune", "mask", "model")

    def worker(self) -> Runs:
        """See ``baseline.train``."""
        from umbrella.baseline.train import Worker

        return Worker(self)


def paths_of(questions: Sequence[Question]) -> list[str]:
    """Each volume once, in order."""
    return list(dict.fromkeys(path for _, path in questions))

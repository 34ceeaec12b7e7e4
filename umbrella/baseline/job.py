"""The description of a baseline's training that every rank gets. Only the ranks import the network."""

from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import ClassVar

import ray

from umbrella.baseline.targets import Bins, Classes
from umbrella.evaluation.predictions import Prediction
from umbrella.training.job import Job

BASELINE = partial(resolve_name, "umbrella.baseline.task:BaselineTask")
"""The task of a ``BaselineJob``."""
Question = tuple[Prediction, str]
"""A conversation that nobody has answered yet, and the path of the volume that answers it."""


@dataclass(frozen=True, kw_only=True)
class BaselineJob(Job):
    """The training of one network for one target. What it takes from ``settings`` is as ``run.resolved`` says."""

    target: str
    head: Classes | Bins
    samples: ray.ObjectRef
    """Sequence of ``Sample``, to learn from."""
    validation: ray.ObjectRef
    """Sequence of ``Question``."""
    asked: ray.ObjectRef
    """Sequence of ``Question``: of the split that is evaluated at the end."""
    unused: ClassVar[tuple[str, ...]] = ("tune", "mask", "model")

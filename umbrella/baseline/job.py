"""The training job of a baseline, as every rank receives it. This module does not import torch."""

from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import ClassVar

import ray

from umbrella.baseline.targets import LabelEncoding
from umbrella.evaluation.predictions import Prediction
from umbrella.training.task import Job

BASELINE_TASK = partial(resolve_name, "umbrella.baseline.task:BaselineTask")
"""Import the task of a ``BaselineJob``."""
EvaluationSample = tuple[Prediction, str]
"""A prediction without an answer yet, and the path of the volume to predict it from."""


@dataclass(frozen=True, kw_only=True)
class BaselineJob(Job):
    """The training of one network for one target. ``settings`` come from ``run.training_settings``."""

    target: str
    encoding: LabelEncoding
    samples: ray.ObjectRef
    """Sequence of ``Sample`` to train on."""
    validation: ray.ObjectRef
    """Sequence of ``EvaluationSample`` of the validation split."""
    evaluation: ray.ObjectRef
    """Sequence of ``EvaluationSample`` of ``evaluate.split``, predicted after the training."""
    unused: ClassVar[tuple[str, ...]] = ("tune", "mask", "model")

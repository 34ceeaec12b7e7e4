"""Labels of volumes, their encoding as distributions over the outputs of the network, and the job of a training."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pkgutil import resolve_name
from typing import Any, ClassVar

import numpy as np
import ray
from scipy.special import erf

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation, questions_of
from umbrella.data.pipeline import Plan
from umbrella.evaluation.predictions import Prediction
from umbrella.training.task import Job

MARGIN = 4
"""Number of bins beyond the smallest and the largest training label, so that their distributions are not cut off."""
BASELINE_TASK = partial(resolve_name, "umbrella.baseline.task:BaselineTask")
"""Import the task of a ``BaselineJob``."""
Sample = tuple[Prediction, str]
"""A prediction without an answer yet, and the path of its volume."""


@dataclass(frozen=True)
class LabelEncoding:
    """The encoding of the labels of a target, of classes or of numbers, as distributions over outputs.

    Each class has one output. The range of the numbers is divided into bins of equal width with one output each. As in
    the SFCN paper (Peng et al. 2021), a number becomes a normal distribution with a standard deviation of one width.
    """

    classes: tuple[str, ...] = ()
    start: float = 0.0
    """Lower edge of the first bin."""
    width: float = 0.0
    bins: int = 0

    @property
    def num_outputs(self) -> int:
        """Number of network outputs."""
        return len(self.classes) or self.bins

    @property
    def description(self) -> str:
        """The valid labels, for messages."""
        return ", ".join(self.classes) or "numbers"

    def is_valid(self, label: str | float | None) -> bool:
        """Return whether the label can be encoded."""
        return label in self.classes if self.classes else isinstance(label, int | float)

    def encode(self, label: str | float | None) -> np.ndarray:
        """Return the distribution of a valid label, (num_outputs,). Numbers are clipped to the range of training."""
        if self.classes:
            return np.array([float(name == label) for name in self.classes])
        lowest, highest = self.start + MARGIN * self.width, self.start + (self.bins - MARGIN) * self.width
        centre = np.clip(float(label or 0), lowest, highest)
        edges = self.start + self.width * np.arange(self.bins + 1)
        masses = np.diff(erf((edges - centre) / (sqrt(2) * self.width)))
        return masses / masses.sum()

    def decode(self, probabilities: Sequence[float]) -> dict[str, float] | float:
        """Return the probability of each class by name, or the expected number."""
        if self.classes:
            return dict(zip(self.classes, probabilities, strict=True))
        return float(np.dot(probabilities, self.start + self.width * (np.arange(self.bins) + 0.5)))


def fit_encoding(target: str, labels: Sequence[str | float | None], bins: int) -> LabelEncoding:
    """Choose the encoding of a target from its training labels.

    Args:
        bins: number of bins for a numeric target.

    Raises:
        UserError: if the labels mix classes and numbers, or are all the same.
    """
    names = sorted({label for label in labels if isinstance(label, str)})
    numbers = [float(label) for label in labels if isinstance(label, int | float)]
    if names and numbers:
        raise UserError(f"target {target!r}: data.train has classes ({', '.join(names[:3])}) and numbers as its labels")
    if len({*names, *numbers}) < 2:
        raise UserError(f"target {target!r}: all labels in data.train are {labels[0]!r}, so there is nothing to learn")
    if names:
        return LabelEncoding(tuple(names))
    width = (max(numbers) - min(numbers)) / (bins - 2 * MARGIN)
    return LabelEncoding(start=min(numbers) - MARGIN * width, width=width, bins=bins)


def pair_with_volumes(
    conversations: Iterable[Conversation], target: str, modality: str
) -> list[tuple[Conversation, str]]:
    """Return the labelled conversations about a target that have a volume of the modality, with its path.

    The volume is the last one of the modality in ``Conversation.subject_volumes``. A conversation with several labels
    is replaced by its ``questions``.
    """
    pairs = []
    for c in questions_of(conversations):
        if c.target == target and c.label is not None:
            paths = [volume.image_path for volume in c.subject_volumes if volume.modality == modality]
            pairs += [(c, path) for path in paths[-1:]]
    return pairs


def make_samples(pairs: Iterable[tuple[Conversation, str]]) -> list[Sample]:
    """Return one sample per distinct volume, in the order of the conversations.

    Raises:
        UserError: if a volume has two different labels.
    """
    samples: dict[str, Prediction] = {}
    for conversation, path in pairs:
        sample = samples.setdefault(path, Prediction.from_conversation(conversation))
        if sample.label != conversation.label:
            raise UserError(
                f"{path}: its {sample.target} is {sample.label!r} in {sample.task_id} and {conversation.label!r} in"
                f" {conversation.task_id}; one of them is wrong"
            )
    return [(sample, path) for path, sample in samples.items()]


@dataclass(frozen=True, kw_only=True)
class BaselineJob(Job):
    """The training of one network for one target. ``settings`` come from ``run.training_settings``."""

    target: str
    encoding: LabelEncoding
    samples: ray.ObjectRef
    """List of each ``Sample`` to train on."""
    validation: ray.ObjectRef
    """The same of the validation split."""
    evaluation: ray.ObjectRef
    """The same of ``evaluate.split``, predicted after the training."""
    unused: ClassVar[tuple[str, ...]] = ("tune", "mask", "loss", "model")

    def plan(self, workers: int, sorted_by: int = 0) -> Plan:
        """See ``Job.plan``. Samples are not sorted by length."""
        train = self.settings.train
        return Plan(len(ray.get(self.samples)), self.settings.seed, train.epochs, workers, train.batch_size, 1)

    def maker(self, plan: Plan, decode: bool) -> Callable[[int, int], Any]:
        """See ``Job.maker``."""
        return plan.rows

"""Labels of volumes, and their encoding as distributions over the outputs of the network."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.special import erf

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation

MARGIN = 4
"""Number of bins beyond the smallest and the largest training label, so that their distributions are not cut off."""


@dataclass(frozen=True)
class ClassEncoding:
    """One-hot encoding of a categorical target, with one output per class."""

    names: tuple[str, ...]

    @property
    def num_outputs(self) -> int:
        """Number of network outputs."""
        return len(self.names)

    @property
    def description(self) -> str:
        """The valid labels, for messages."""
        return ", ".join(self.names)

    def is_valid(self, label: str | float | None) -> bool:
        """Return whether the label is one of the classes."""
        return label in self.names

    def encode(self, label: str | float) -> np.ndarray:
        """Return the one-hot distribution of a label, (num_outputs,)."""
        return np.array([float(name == label) for name in self.names])

    def decode(self, probabilities: Sequence[float]) -> dict[str, float]:
        """Return the probability of each class by name."""
        return dict(zip(self.names, probabilities, strict=True))


@dataclass(frozen=True)
class BinEncoding:
    """Soft encoding of a numeric target over bins of equal width.

    As in the SFCN paper (Peng et al. 2021), a label becomes a normal distribution with a standard deviation of one bin
    width. ``start`` is the lower edge of the first bin.
    """

    start: float
    width: float
    num_outputs: int

    @property
    def centres(self) -> np.ndarray:
        """The centre of each bin, (num_outputs,)."""
        return self.start + self.width * (np.arange(self.num_outputs) + 0.5)

    @property
    def description(self) -> str:
        """The valid labels, for messages."""
        return "numbers"

    def is_valid(self, label: str | float | None) -> bool:
        """Return whether the label is a number."""
        return isinstance(label, int | float)

    def encode(self, label: str | float) -> np.ndarray:
        """Return the normal distribution around a label, (num_outputs,), with sum 1.

        Labels outside the range of the training labels are clipped to it.
        """
        lowest, highest = self.start + MARGIN * self.width, self.start + (self.num_outputs - MARGIN) * self.width
        centre = np.clip(float(label), lowest, highest)
        edges = self.start + self.width * np.arange(self.num_outputs + 1)
        masses = np.diff(erf((edges - centre) / (sqrt(2) * self.width)))
        return masses / masses.sum()

    def decode(self, probabilities: Sequence[float]) -> float:
        """Return the expected value of the distribution."""
        return float(np.dot(probabilities, self.centres))


LabelEncoding = ClassEncoding | BinEncoding


def fit_encoding(target: str, labels: Sequence[str | float], bins: int) -> LabelEncoding:
    """Choose the encoding of a target from its training labels.

    Args:
        target: name of the target, for messages.
        labels: labels of the training samples.
        bins: number of bins for a numeric target.

    Raises:
        UserError: if the labels mix classes and numbers, or are all the same.
    """
    names = sorted({label for label in labels if isinstance(label, str)})
    numbers = [float(label) for label in labels if not isinstance(label, str)]
    if names and numbers:
        raise UserError(f"target {target!r}: data.train has classes ({', '.join(names[:3])}) and numbers as its labels")
    if len({*names, *numbers}) < 2:
        raise UserError(f"target {target!r}: all labels in data.train are {labels[0]!r}, so there is nothing to learn")
    if names:
        return ClassEncoding(tuple(names))
    width = (max(numbers) - min(numbers)) / (bins - 2 * MARGIN)
    return BinEncoding(min(numbers) - MARGIN * width, width, bins)


@dataclass(frozen=True)
class Sample:
    """A volume and its label."""

    path: str
    subject_id: str
    label: str | float


def find_targets(conversations: Iterable[Conversation]) -> list[str]:
    """Return the targets that have at least one label, in alphabetical order."""
    return sorted({c.target for c in conversations if c.label is not None})


def find_volume(conversation: Conversation, modality: str) -> str | None:
    """Return the path of the volume that the label describes, or None if the modality has none.

    This is the last volume of the modality in ``Conversation.subject_volumes``.
    """
    paths = [volume.image_path for volume in conversation.subject_volumes if volume.modality == modality]
    return paths[-1] if paths else None


def pair_with_volumes(
    conversations: Iterable[Conversation], target: str, modality: str
) -> list[tuple[Conversation, str]]:
    """Return the labelled conversations about a target that have a volume of the modality, with its path."""
    labelled = [c for c in conversations if c.target == target and c.label is not None]
    return [(c, path) for c in labelled if (path := find_volume(c, modality))]


def make_samples(conversations: Sequence[Conversation], target: str, modality: str) -> list[Sample]:
    """Return one sample per distinct volume, in the order of the conversations.

    Raises:
        UserError: if a volume has two different labels.
    """
    first: dict[str, tuple[Conversation, Sample]] = {}
    for conversation, path in pair_with_volumes(conversations, target, modality):
        assert conversation.label is not None
        other, sample = first.setdefault(
            path, (conversation, Sample(path, conversation.subject_id, conversation.label))
        )
        if sample.label != conversation.label:
            raise UserError(
                f"{path}: its {target} is {sample.label!r} in {other.task_id} and {conversation.label!r} in"
                f" {conversation.task_id}; one of them is wrong"
            )
    return [sample for _, sample in first.values()]

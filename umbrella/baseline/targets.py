"""Targets of the baseline: the labels of volumes, and the distributions over classes or bins that stand for them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.special import erf

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation

MARGIN = 4
"""Bins on either side of the labels seen in training: the bell around the outermost one lies within the bins."""


@dataclass(frozen=True)
class Classes:
    """One output per class."""

    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """Outputs of the network."""
        return len(self.names)

    @property
    def in_words(self) -> str:
        """The possible labels in words."""
        return ", ".join(self.names)

    def knows(self, label: str | float | None) -> bool:
        """Whether a label is one of these."""
        return label in self.names

    def soft(self, label: str | float) -> np.ndarray:
        """The distribution that a label stands for, (size,): all of it at the class."""
        return np.array([float(name == label) for name in self.names])

    def read(self, probabilities: Sequence[float]) -> dict[str, float]:
        """Each class with its probability."""
        return dict(zip(self.names, probabilities, strict=True))


@dataclass(frozen=True)
class Bins:
    """Equal bins of a number, the first one from ``start`` on; as in the paper a label is a bell one bin wide."""

    start: float
    width: float
    size: int

    @property
    def centres(self) -> np.ndarray:
        """(size,): the number that each bin stands for."""
        return self.start + self.width * (np.arange(self.size) + 0.5)

    @property
    def in_words(self) -> str:
        """The possible labels in words."""
        return "numbers"

    def knows(self, label: str | float | None) -> bool:
        """Whether a label is one of these: any number."""
        return isinstance(label, int | float)

    def soft(self, label: str | float) -> np.ndarray:
        """The distribution that a label stands for, (size,): normal, a bin's width its deviation; the sum is 1.

        What lies beyond the labels seen in training counts as the nearest number that the bins can hold.
        """
        inner = self.start + MARGIN * self.width, self.start + (self.size - MARGIN) * self.width
        centre = np.clip(float(label), *inner)
        edges = self.start + self.width * np.arange(self.size + 1)
        parts = np.diff(erf((edges - centre) / (sqrt(2) * self.width)))
        return parts / parts.sum()

    def read(self, probabilities: Sequence[float]) -> float:
        """The expected number."""
        return float(np.dot(probabilities, self.centres))


def fit(target: str, labels: Sequence[str | float], bins: int) -> Classes | Bins:
    """Classes or bins for the labels of the training samples.

    Raises:
        UserError: classes and numbers are mixed, or all labels are the same.
    """
    names = sorted({label for label in labels if isinstance(label, str)})
    numbers = [float(label) for label in labels if not isinstance(label, str)]
    if names and numbers:
        raise UserError(f"target {target!r}: data.train has classes ({', '.join(names[:3])}) and numbers as its labels")
    if len({*names, *numbers}) < 2:
        raise UserError(f"target {target!r}: all labels in data.train are {labels[0]!r}, so there is nothing to learn")
    if names:
        return Classes(tuple(names))
    width = (max(numbers) - min(numbers)) / (bins - 2 * MARGIN)
    return Bins(min(numbers) - MARGIN * width, width, bins)


@dataclass(frozen=True)
class Sample:
    """A volume, and what is true of it."""

    path: str
    subject_id: str
    label: str | float


def targets_of(conversations: Iterable[Conversation]) -> list[str]:
    """The targets that some conversation has a label of, in alphabetical order."""
    return sorted({c.target for c in conversations if c.label is not None})


def own_volume(conversation: Conversation, modality: str) -> str | None:
    """The volume of a modality that the label belongs to: the last one of ``Conversation.asked_volumes``."""
    of_modality = [volume.image_path for volume in conversation.asked_volumes if volume.modality == modality]
    return of_modality[-1] if of_modality else None


def asked(conversations: Iterable[Conversation], target: str, modality: str) -> list[tuple[Conversation, str]]:
    """The conversations about a target that a volume of the modality can answer, each with that volume."""
    about = [c for c in conversations if c.target == target and c.label is not None]
    return [(c, path) for c in about if (path := own_volume(c, modality))]


def samples_of(conversations: Sequence[Conversation], target: str, modality: str) -> list[Sample]:
    """Each volume that is asked about once, in the order of the data.

    Raises:
        UserError: the same volume has two labels.
    """
    first: dict[str, tuple[Conversation, Sample]] = {}
    for conversation, path in asked(conversations, target, modality):
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

"""What a cohort asks and of whom: task types, labels and subjects, split by split."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import frexp, isfinite

import numpy as np

from umbrella.conversations.schema import Conversation

RARE = 0.1
"""A class of a smaller part than this of its split is marked."""
BINS = 20


@dataclass(frozen=True)
class Classes:
    """How often each label of a target occurs in a split."""

    counts: Mapping[str, int]

    def share(self, label: str) -> float:
        """The part of the split that has the label, 0 to 1."""
        return self.counts[label] / sum(self.counts.values())

    def is_rare(self, label: str) -> bool:
        """Whether so few have it that a model may well never say it."""
        return self.share(label) < RARE


@dataclass(frozen=True)
class Numbers:
    """The numbers that a target's labels are in a split. histogram: counts in bins that all splits share."""

    n: int
    mean: float
    deviation: float
    minimum: float
    maximum: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """The labels of one target, by split. A target has classes or numbers; with both, somebody mixed them up."""

    name: str
    classes: Mapping[str, Classes]
    numbers: Mapping[str, Numbers]
    low: float = 0.0
    high: float = 0.0
    """Where the histograms begin and end."""


@dataclass(frozen=True)
class Split:
    """One split in numbers."""

    name: str
    conversations: int
    task_types: Mapping[str, int]
    labelled: int
    answer_subjects: frozenset[str]
    """Whom the last answers are about."""
    subjects: frozenset[str]
    """Everybody who is shown."""


@dataclass(frozen=True)
class Shared:
    """Subjects that two splits have both."""

    splits: tuple[str, str]
    role: str
    subjects: tuple[str, ...]


def count_splits(splits: Mapping[str, Sequence[Conversation]]) -> list[Split]:
    """The numbers of each split."""
    return [
        Split(
            name=name,
            conversations=len(conversations),
            task_types=dict(sorted(Counter(c.task_type for c in conversations).items())),
            labelled=sum(_label(c) is not None for c in conversations),
            answer_subjects=frozenset(c.subject_id for c in conversations),
            subjects=frozenset(subject for c in conversations for subject in c.subjects),
        )
        for name, conversations in splits.items()
    ]


def shared_subjects(splits: Sequence[Split]) -> list[Shared]:
    """For each two splits: subjects of answers in both, and subjects shown in both. There should be none."""
    return [
        Shared((one.name, two.name), role, tuple(sorted(both)))
        for one, two in combinations(splits, 2)
        for role, both in (
            ("subject of an answer", one.answer_subjects & two.answer_subjects),
            ("anywhere in a conversation", one.subjects & two.subjects),
        )
    ]


def count_labels(splits: Mapping[str, Sequence[Conversation]]) -> list[Target]:
    """The labels of each target, targets by name. What has no label is left out."""
    labels: dict[str, dict[str, list[str | float]]] = defaultdict(lambda: defaultdict(list))
    for split, conversations in splits.items():
        for c in conversations:
            label = _label(c)
            if label is not None:
                labels[c.target][split].append(label)
    targets = []
    for name, by_split in sorted(labels.items()):
        numbers = {split: [x for x in found if isinstance(x, float)] for split, found in by_split.items()}
        words = {split: [x for x in found if isinstance(x, str)] for split, found in by_split.items()}
        every = [x for found in numbers.values() for x in found]
        low, high = (min(every), max(every)) if every else (0.0, 0.0)
        # A class that one split lacks is worth a row of zero there.
        known = sorted({word for found in words.values() for word in found})
        classes = {split: Classes({k: Counter(found)[k] for k in known}) for split, found in words.items() if found}
        summed = {split: _summary(found, low, high) for split, found in numbers.items() if found}
        targets.append(Target(name, classes, summed, low, high))
    return targets


def _summary(values: list[float], low: float, high: float) -> Numbers:
    # Halved, because the difference of two numbers may be more than a float can hold.
    half = high / 2 - low / 2
    places = [(x / 2 - low / 2) / half if half else 0.5 for x in values]
    counts, _ = np.histogram(places, bins=BINS, range=(0, 1))
    # Brought below 1 by a power of two, which changes no digit, because so may their sum and their squares.
    exponent = frexp(max(map(abs, values)))[1]
    small = np.ldexp(values, -exponent)
    mean, deviation = (float(np.ldexp(of(small), exponent)) for of in (np.mean, np.std))
    return Numbers(len(values), mean, deviation, min(values), max(values), tuple(int(n) for n in counts))


def _label(conversation: Conversation) -> str | float | None:
    """A class as text, a number as float; None for no label, and for a number that is none."""
    label = conversation.label
    if isinstance(label, int | float) and not isinstance(label, bool):
        try:
            return float(label) if isfinite(label) else None
        except OverflowError:  # an integer beyond what a float can hold
            return None
    return None if label is None else str(label)

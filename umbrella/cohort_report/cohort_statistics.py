"""Statistics of a cohort: task types, labels and subjects of each split, and unusual volumes."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import frexp, isfinite
from typing import Any, TypeVar

import numpy as np

from umbrella.base import ProgressBar, UserError
from umbrella.conversations.schema import Conversation
from umbrella.data.splits import Splits
from umbrella.volumes.store import VolumeInfo, VolumeStore

RARE_SHARE = 0.1
"""Classes with a smaller share of their split are marked as rare."""
BINS = 20


@dataclass(frozen=True)
class ClassCounts:
    """Number of conversations with each label of a target, in one split."""

    counts: Mapping[str, int]

    def share(self, label: str) -> float:
        """Share of conversations with the label, 0 to 1."""
        return self.counts[label] / sum(self.counts.values())

    def is_rare(self, label: str) -> bool:
        """Whether the share of the label is below RARE_SHARE."""
        return self.share(label) < RARE_SHARE


@dataclass(frozen=True)
class NumberSummary:
    """Summary of the numeric labels of a target, in one split. ``histogram``: counts; all splits have the same bins."""

    n: int
    mean: float
    deviation: float
    minimum: float
    maximum: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class TargetLabels:
    """Labels of one target, by split. A target should have either classes or numbers; both indicate an error."""

    name: str
    classes: Mapping[str, ClassCounts]
    numbers: Mapping[str, NumberSummary]
    low: float = 0.0
    high: float = 0.0
    """Range of the histograms."""


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split."""

    name: str
    conversations: int
    task_types: Mapping[str, int]
    labelled: int
    answer_subjects: frozenset[str]
    """Subjects of the last answers."""
    subjects: frozenset[str]
    """All subjects with a volume or an answer."""


@dataclass(frozen=True)
class SharedSubjects:
    """Subjects that occur in two splits."""

    splits: tuple[str, str]
    role: str
    subjects: tuple[str, ...]


def count_splits(splits: Mapping[str, Sequence[Conversation]]) -> list[SplitSummary]:
    """Count conversations, task types, labels and subjects of each split."""
    return [
        SplitSummary(
            name=name,
            conversations=len(conversations),
            task_types=dict(sorted(Counter(c.task_type for c in conversations).items())),
            labelled=sum(_label(c) is not None for c in conversations),
            answer_subjects=frozenset(c.subject_id for c in conversations),
            subjects=frozenset(subject for c in conversations for subject in c.subjects),
        )
        for name, conversations in splits.items()
    ]


def shared_subjects(splits: Sequence[SplitSummary]) -> list[SharedSubjects]:
    """Find subjects that occur in two splits, as subject of an answer or anywhere. There should be none."""
    return [
        SharedSubjects((one.name, two.name), role, tuple(sorted(both)))
        for one, two in combinations(splits, 2)
        for role, both in (
            ("subject of an answer", one.answer_subjects & two.answer_subjects),
            ("anywhere in a conversation", one.subjects & two.subjects),
        )
    ]


def count_labels(splits: Mapping[str, Sequence[Conversation]]) -> list[TargetLabels]:
    """Count the labels of each target, sorted by name. Conversations without a label are omitted."""
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
        # A class that is missing in one split has a row with 0 there.
        known = sorted({word for found in words.values() for word in found})
        classes = {split: ClassCounts({k: Counter(found)[k] for k in known}) for split, found in words.items() if found}
        summed = {split: _summarise(found, low, high) for split, found in numbers.items() if found}
        targets.append(TargetLabels(name, classes, summed, low, high))
    return targets


def _summarise(values: list[float], low: float, high: float) -> NumberSummary:
    # Halved, because the difference of two numbers may overflow.
    half = high / 2 - low / 2
    places = [(x / 2 - low / 2) / half if half else 0.5 for x in values]
    counts, _ = np.histogram(places, bins=BINS, range=(0, 1))
    # Scaled below 1 by a power of two, which is exact, because the sum and the squares may overflow.
    exponent = frexp(max(map(abs, values)))[1]
    small = np.ldexp(values, -exponent)
    mean, deviation = (float(np.ldexp(of(small), exponent)) for of in (np.mean, np.std))
    return NumberSummary(len(values), mean, deviation, min(values), max(values), tuple(int(n) for n in counts))


def _label(conversation: Conversation) -> str | float | None:
    """A class as a string, a number as a float; None without a label or if the number is not finite."""
    label = conversation.label
    if isinstance(label, int | float) and not isinstance(label, bool):
        try:
            return float(label) if isfinite(label) else None
        except OverflowError:  # an integer that is too large for a float
            return None
    return None if label is None else str(label)


T = TypeVar("T")
OUTLIER_Z = 5.0
"""Absolute robust z-score, within a modality, above which a volume is an outlier."""
MEASURED = ("mean", "deviation", "foreground")


@dataclass(frozen=True)
class VolumeRow:
    """One volume, read as one modality: its path, its use and its properties."""

    path: str
    file: str
    """The path relative to the common folder of all volumes."""
    modality: str
    content: str
    """Hash of the content of the file; empty if the file cannot be read any more."""
    conversations: int
    splits: tuple[str, ...]
    subjects: tuple[str, ...]
    info: VolumeInfo | None
    """None if the store does not hold the volume."""
    flags: tuple[str, ...] = ()
    """Unusual properties of its header, and properties that differ from other volumes of the modality."""


def collect_volumes(raw: Splits, store: VolumeStore, progress: ProgressBar) -> list[VolumeRow]:
    """Collect the volumes that conversations use, sorted: volumes with flags first, then by file."""
    uses: dict[tuple[str, str], list[tuple[str, set[str]]]] = defaultdict(list)
    for split, conversations in raw.splits.items():
        for c in conversations:
            for volume in {(v.image_path, v.modality) for v in c.volumes}:
                uses[volume].append((split, c.subjects))
    top = os.path.commonpath([os.path.dirname(path) for path, _ in uses]) if uses else ""
    rows = []
    for path, modality in progress(sorted(uses), "checking volumes"):
        used_by = [subjects for _, subjects in uses[path, modality]]
        place = _from_store(store.path, path, modality)
        row = VolumeRow(
            path=path,
            file=os.path.relpath(path, top),
            modality=modality,
            content=place.stem if place else "",
            conversations=len(used_by),
            splits=tuple(dict.fromkeys(split for split, _ in uses[path, modality])),
            # A comparison shows two subjects without the owner of each volume: it is the one in all conversations.
            subjects=tuple(sorted(set.intersection(*used_by) or set.union(*used_by))),
            info=_from_store(store.info, path, modality),
            flags=_from_store(lambda path, _: store.notes(path), path, modality) or (),
        )
        rows.append(row)
    names = {row.modality for row in rows}
    flagged = [row for name in names for row in flag_outliers(row for row in rows if row.modality == name)]
    return sorted(flagged, key=lambda row: (not row.flags, row.file, row.modality))


def flag_outliers(rows: Iterable[VolumeRow]) -> list[VolumeRow]:
    """Add flags to volumes of one modality: unusual geometry and outliers of the intensity statistics."""
    rows = list(rows)
    info = [row.info for row in rows if row.info]
    flags: list[list[str]] = [[] for _ in info]
    for name, of in GEOMETRY.items():
        usual = Counter(map(of, info)).most_common(1)
        for own, seen in zip(flags, info, strict=True):
            own += [name] if of(seen) != usual[0][0] else []
    for name in MEASURED if info else ():
        scores = robust_z_scores([getattr(seen, name) for seen in info])
        for own, score in zip(flags, scores, strict=True):
            own += [f"{name} {score:+.1f} σ"] if abs(score) > OUTLIER_Z else []
    found = iter(flags)
    return [replace(row, flags=(*row.flags, *next(found))) if row.info else row for row in rows]


def robust_z_scores(values: Sequence[float]) -> np.ndarray:
    """Distance of each value from the median, in standard deviations estimated from the median absolute deviation.

    The mean absolute deviation is used if the median absolute deviation is 0 (more than half of the values are equal).
    """
    away = np.asarray(values, np.float64) - np.median(values)
    scale = 1.4826 * np.median(np.abs(away)) or 1.2533 * np.abs(away).mean()
    return away / scale if scale else away


def find_duplicates(rows: Iterable[VolumeRow]) -> list[list[str]]:
    """Find files with the same content; one list of paths for each content."""
    files: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        files[row.content].add(row.file)
    return sorted(sorted(alike) for content, alike in files.items() if content and len(alike) > 1)


def _from_store(query: Callable[[str, str], T], path: str, modality: str) -> T | None:
    """Query the store; None if it no longer holds the volume or cannot read it."""
    try:
        return query(path, modality)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


GEOMETRY: dict[str, Callable[[VolumeInfo], Any]] = {
    "shape": lambda info: info.shape,
    "spacing": lambda info: tuple(round(edge, 2) for edge in info.spacing),
    "orientation": lambda info: info.orientation,
}
"""Properties that are usually equal in all volumes of a modality."""

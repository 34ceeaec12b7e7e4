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
from umbrella.data.splits import RawSplits
from umbrella.volumes.store import VolumeInfo, VolumeStore

RARE_SHARE = 0.1
"""A class of a smaller part than this of its split is marked."""
BINS = 20


@dataclass(frozen=True)
class ClassCounts:
    """How often each label of a target occurs in a split."""

    counts: Mapping[str, int]

    def share(self, label: str) -> float:
        """The part of the split that has the label, 0 to 1."""
        return self.counts[label] / sum(self.counts.values())

    def is_rare(self, label: str) -> bool:
        """Whether so few have it that a model may well never say it."""
        return self.share(label) < RARE_SHARE


@dataclass(frozen=True)
class NumberSummary:
    """The numbers that a target's labels are in a split. histogram: counts in bins that all splits share."""

    n: int
    mean: float
    deviation: float
    minimum: float
    maximum: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class TargetLabels:
    """The labels of one target, by split. A target has classes or numbers; with both, somebody mixed them up."""

    name: str
    classes: Mapping[str, ClassCounts]
    numbers: Mapping[str, NumberSummary]
    low: float = 0.0
    high: float = 0.0
    """Where the histograms begin and end."""


@dataclass(frozen=True)
class SplitSummary:
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
class SharedSubjects:
    """Subjects that two splits have both."""

    splits: tuple[str, str]
    role: str
    subjects: tuple[str, ...]


def count_splits(splits: Mapping[str, Sequence[Conversation]]) -> list[SplitSummary]:
    """The numbers of each split."""
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
    """For each two splits: subjects of answers in both, and subjects shown in both. There should be none."""
    return [
        SharedSubjects((one.name, two.name), role, tuple(sorted(both)))
        for one, two in combinations(splits, 2)
        for role, both in (
            ("subject of an answer", one.answer_subjects & two.answer_subjects),
            ("anywhere in a conversation", one.subjects & two.subjects),
        )
    ]


def count_labels(splits: Mapping[str, Sequence[Conversation]]) -> list[TargetLabels]:
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
        classes = {split: ClassCounts({k: Counter(found)[k] for k in known}) for split, found in words.items() if found}
        summed = {split: _summarise(found, low, high) for split, found in numbers.items() if found}
        targets.append(TargetLabels(name, classes, summed, low, high))
    return targets


def _summarise(values: list[float], low: float, high: float) -> NumberSummary:
    # Halved, because the difference of two numbers may be more than a float can hold.
    half = high / 2 - low / 2
    places = [(x / 2 - low / 2) / half if half else 0.5 for x in values]
    counts, _ = np.histogram(places, bins=BINS, range=(0, 1))
    # Brought below 1 by a power of two, which changes no digit, because so may their sum and their squares.
    exponent = frexp(max(map(abs, values)))[1]
    small = np.ldexp(values, -exponent)
    mean, deviation = (float(np.ldexp(of(small), exponent)) for of in (np.mean, np.std))
    return NumberSummary(len(values), mean, deviation, min(values), max(values), tuple(int(n) for n in counts))


def _label(conversation: Conversation) -> str | float | None:
    """A class as text, a number as float; None for no label, and for a number that is none."""
    label = conversation.label
    if isinstance(label, int | float) and not isinstance(label, bool):
        try:
            return float(label) if isfinite(label) else None
        except OverflowError:  # an integer beyond what a float can hold
            return None
    return None if label is None else str(label)


T = TypeVar("T")
OUTLIER_Z = 5.0
"""Robust deviations from the median of its modality from which on a volume is an outlier."""
MEASURED = ("mean", "deviation", "foreground")


@dataclass(frozen=True)
class VolumeRow:
    """One volume as one modality: where it is, who uses it, what it is."""

    path: str
    file: str
    """The path below the folder that all volumes share."""
    modality: str
    content: str
    """Names the bytes of the file; empty where they cannot be read any more."""
    conversations: int
    splits: tuple[str, ...]
    subjects: tuple[str, ...]
    info: VolumeInfo | None
    """None where the store has none."""
    flags: tuple[str, ...] = ()
    """What is unusual in its header, and in what it is unlike the other volumes of its modality."""


def collect_volumes(raw: RawSplits, store: VolumeStore, progress: ProgressBar) -> list[VolumeRow]:
    """A row for each volume that the conversations use: those with flags first, then by file."""
    uses: dict[tuple[str, str], list[tuple[str, set[str]]]] = defaultdict(list)
    for split, conversations in raw.splits.items():
        for c in conversations:
            for volume in {(v.image_path, v.modality) for v in c.volumes}:
                uses[volume].append((split, c.subjects))
    top = os.path.commonpath([os.path.dirname(path) for path, _ in uses]) if uses else ""
    rows = []
    for path, modality in progress(sorted(uses), "looking at volumes"):
        used_by = [subjects for _, subjects in uses[path, modality]]
        place = _from_store(store.path, path, modality)
        row = VolumeRow(
            path=path,
            file=os.path.relpath(path, top),
            modality=modality,
            content=place.stem if place else "",
            conversations=len(used_by),
            splits=tuple(dict.fromkeys(split for split, _ in uses[path, modality])),
            # A comparison shows two subjects, and does not say which volume is whose: whoever is always there is.
            subjects=tuple(sorted(set.intersection(*used_by) or set.union(*used_by))),
            info=_from_store(store.info, path, modality),
            flags=_from_store(lambda path, _: store.notes(path), path, modality) or (),
        )
        rows.append(row)
    names = {row.modality for row in rows}
    flagged = [row for name in names for row in flag_outliers(row for row in rows if row.modality == name)]
    return sorted(flagged, key=lambda row: (not row.flags, row.file, row.modality))


def flag_outliers(rows: Iterable[VolumeRow]) -> list[VolumeRow]:
    """The same volumes of one modality, with what is unlike the others added to the flags of each."""
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
    """How far each value is from the median, in standard deviations as the median absolute deviation tells them.

    Where more than half of the values are alike that deviation is 0, and the mean absolute one takes its place.
    """
    away = np.asarray(values, np.float64) - np.median(values)
    scale = 1.4826 * np.median(np.abs(away)) or 1.2533 * np.abs(away).mean()
    return away / scale if scale else away


def find_duplicates(rows: Iterable[VolumeRow]) -> list[list[str]]:
    """Files of the same content under different paths, a list for each content."""
    files: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        files[row.content].add(row.file)
    return sorted(sorted(alike) for content, alike in files.items() if content and len(alike) > 1)


def _from_store(ask: Callable[[str, str], T], path: str, modality: str) -> T | None:
    """What the store answers; None where it has lost it since, which a report survives."""
    try:
        return ask(path, modality)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


GEOMETRY: dict[str, Callable[[VolumeInfo], Any]] = {
    "shape": lambda info: info.shape,
    "spacing": lambda info: tuple(round(edge, 2) for edge in info.spacing),
    "orientation": lambda info: info.orientation,
}
"""What the volumes of a modality share as a rule."""

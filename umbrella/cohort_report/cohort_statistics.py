"""Statistics of a cohort: task types, labels and subjects of each split, and unusual volumes."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from umbrella.base import ProgressBar, UserError
from umbrella.conversations.schema import Conversation, questions_of
from umbrella.data.splits import Splits
from umbrella.volumes.store import VolumeInfo, VolumeStore

BINS = 20
OUTLIER_Z = 5.0
"""Smallest absolute robust z-score of an outlier."""
RARE, MANY = 0.05, 0.1
"""Largest share of a group with an unusual geometry or intensity, beside single volumes: more volumes are a kind."""
SMALL = 10
"""Least size of a group with a usual geometry, and of a site that is a group of its own."""
MEASURED = ("mean", "deviation", "foreground")
GEOMETRY: dict[str, Callable[[VolumeInfo], Any]] = {
    "shape": lambda info: info.shape,
    "spacing": lambda info: tuple(round(edge, 2) for edge in info.spacing),
    "orientation": lambda info: info.orientation,
}
"""Properties that are usually equal in all volumes of a group."""


@dataclass(frozen=True)
class VolumeRow:
    """One volume, read as one modality: its path, its use and its properties."""

    path: str
    file: str
    """The path relative to the common folder of all volumes."""
    modality: str
    content: str
    """Hash of the content of the file; empty if the store does not hold the volume."""
    conversations: int
    splits: tuple[str, ...]
    subjects: tuple[str, ...]
    info: VolumeInfo | None
    """None if the store does not hold the volume."""
    flags: tuple[str, ...] = ()
    """Unusual properties of its header, and properties that differ from other volumes of its group."""
    site: str = ""
    """``metadata.site`` of the conversations about its subject alone; empty if unknown."""


def count_splits(splits: Mapping[str, Sequence[Conversation]]) -> list[dict[str, Any]]:
    """Count conversations, task types, labels and subjects (of the last answers, and all) of each split."""
    return [
        {
            "name": name,
            "conversations": len(conversations),
            "task_types": Counter(c.task_type for c in conversations),
            "labelled": sum(any(q.label is not None for q in c.questions()) for c in conversations),
            "answer_subjects": {c.subject_id for c in conversations},
            "subjects": {subject for c in conversations for subject in c.subjects},
        }
        for name, conversations in splits.items()
    ]


def shared_subjects(splits: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """Find subjects that occur in two splits, as subject of an answer or anywhere. There should be none.

    Returns:
        (names of the splits, role, subjects) for each pair of splits and role.
    """
    roles = {"answer_subjects": "subject of an answer", "subjects": "anywhere in a conversation"}
    return [
        (f"{one['name']} and {two['name']}", role, sorted(one[key] & two[key]))
        for one, two in combinations(splits, 2)
        for key, role in roles.items()
    ]


def count_labels(splits: Mapping[str, Sequence[Conversation]]) -> list[dict[str, Any]]:
    """Count the labels of each target, sorted by name. Conversations without a label are omitted.

    Returns:
        For each target: ``name``; ``classes``, split to label to count; ``numbers``, split to a summary of the numeric
        labels; ``low`` and ``high``, the range of the histograms. A target should have either classes or numbers.
    """
    labels: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for split, conversations in splits.items():
        for c in questions_of(conversations):
            if c.label is not None:
                labels[c.target][split].append(c.label)
    targets = []
    for name, by_split in sorted(labels.items()):
        words = {split: Counter(x for x in found if isinstance(x, str)) for split, found in by_split.items()}
        numbers = {split: [float(x) for x in found if not isinstance(x, str)] for split, found in by_split.items()}
        every = [x for found in numbers.values() for x in found]
        low, high = (min(every), max(every)) if every else (0.0, 0.0)
        # A class that is missing in one split has a row with 0 there.
        known = sorted({word for counts in words.values() for word in counts})
        classes = {split: {word: counts[word] for word in known} for split, counts in words.items() if counts}
        summaries = {split: _summarise(found, low, high) for split, found in numbers.items() if found}
        targets.append({"name": name, "classes": classes, "numbers": summaries, "low": low, "high": high})
    return targets


def _summarise(values: list[float], low: float, high: float) -> dict[str, Any]:
    exact = np.asarray(values, np.longdouble)  # sums and squares of float64 may overflow
    places = (exact - low) / (np.longdouble(high) - low) if high > low else np.full(len(values), 0.5)
    return {
        "n": len(values),
        "mean": float(exact.mean()),
        "deviation": float(exact.std()),
        "minimum": min(values),
        "maximum": max(values),
        "histogram": np.histogram(places.astype(float), bins=BINS, range=(0, 1))[0].tolist(),
    }


def collect_volumes(raw: Splits, store: VolumeStore, progress: ProgressBar) -> list[VolumeRow]:
    """Collect the volumes that conversations use, sorted: volumes with flags first, then by file."""
    uses: dict[tuple[str, str], list[tuple[str, set[str]]]] = defaultdict(list)
    sites: dict[tuple[str, str], str] = {}
    for split, conversations in raw.splits.items():
        for c in conversations:
            for volume in {(v.image_path, v.modality) for v in c.volumes}:
                uses[volume].append((split, c.subjects))
                if len(c.subjects) == 1:
                    sites[volume] = str(c.metadata.get("site", ""))
    top = os.path.commonpath([os.path.dirname(path) for path, _ in uses]) if uses else ""
    rows: dict[str, list[VolumeRow]] = defaultdict(list)
    for path, modality in progress(sorted(uses), "checking volumes"):
        used_by = [subjects for _, subjects in uses[path, modality]]
        try:
            info = store.info(path, modality)
            content, flags = store.path(path, modality).stem, store.notes(path)
        except (UserError, OSError):  # removed after the check
            content, info, flags = "", None, ()
        row = VolumeRow(
            path=path,
            file=os.path.relpath(path, top),
            modality=modality,
            content=content,
            conversations=len(used_by),
            splits=tuple(dict.fromkeys(split for split, _ in uses[path, modality])),
            # A comparison shows two subjects without the owner of each volume: it is the one in all conversations.
            subjects=tuple(sorted(set.intersection(*used_by) or set.union(*used_by))),
            info=info,
            flags=flags,
            site=sites.get((path, modality), ""),
        )
        rows[modality].append(row)
    flagged = [row for of_modality in rows.values() for row in flag_outliers(of_modality)]
    return sorted(flagged, key=lambda row: (not row.flags, row.file, row.modality))


def flag_outliers(rows: Sequence[VolumeRow]) -> list[VolumeRow]:
    """Add flags to volumes of one modality: unusual geometry and outliers of the intensity statistics.

    A volume is compared with those of its site, or with all of them if the site is unknown or small.
    """
    known, sites = [row for row in rows if row.info], defaultdict[str, list[VolumeRow]](list)
    for row in known:
        sites[row.site].append(row)
    flags = _compare(known)
    for site, of_site in sites.items():
        if site and len(of_site) >= SMALL:
            flags |= _compare(of_site)
    return [replace(row, flags=(*row.flags, *flags.get(row.path, ()))) for row in rows]


def _compare(rows: Sequence[VolumeRow]) -> dict[str, list[str]]:
    """Path to what is unusual about a volume among these rows."""
    info, flags = [row.info for row in rows if row.info], {row.path: list[str]() for row in rows}
    for name, of in GEOMETRY.items() if len(rows) >= SMALL else ():
        counts = Counter(map(of, info))
        for own, seen in zip(flags.values(), info, strict=True):
            own += [name] if counts[of(seen)] <= max(1, RARE * len(rows)) else []
    for name in MEASURED if rows else ():
        values = np.array([getattr(seen, name) for seen in info], np.float64)
        if (middle := np.median(values)) > 0:  # intensities of scanners differ by factors
            values = np.log(np.maximum(values, middle / 1000))
        scores = robust_z_scores(values)
        odd = np.abs(scores) > outlier_threshold(len(rows))
        for own, score, is_odd in zip(flags.values(), scores, odd, strict=True):
            own += [f"{name} {score:+.1f} σ"] if is_odd and odd.sum() <= max(1, MANY * len(rows)) else []
    return flags


def outlier_threshold(size: int) -> float:
    """The robust z-score that any of ``size`` normal values exceeds with a probability of at most 5% (Bonferroni).

    A median absolute deviation has about half the degrees of freedom of a standard deviation.
    """
    from scipy.special import stdtrit

    return max(OUTLIER_Z, float(stdtrit(max(1.0, (size - 1) / 2), 1 - 0.025 / (len(MEASURED) * max(size, 1)))))


def robust_z_scores(values: Sequence[float] | np.ndarray) -> np.ndarray:
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

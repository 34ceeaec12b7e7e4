"""What a cohort's volumes are, who uses them, and which of them are unlike the others."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from umbrella.base import ProgressBar, UserError
from umbrella.data.splits import RawSplits
from umbrella.volumes.store import VolumeInfo, VolumeStore

Answer = TypeVar("Answer")
FAR = 5.0
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
    facts: VolumeInfo | None
    """None where the store has none."""
    flags: tuple[str, ...] = ()
    """What is unusual in its header, and in what it is unlike the other volumes of its modality."""


def survey(raw: RawSplits, store: VolumeStore, progress: ProgressBar) -> list[VolumeRow]:
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
        place = _known(store.path, path, modality)
        row = VolumeRow(
            path=path,
            file=os.path.relpath(path, top),
            modality=modality,
            content=place.stem if place else "",
            conversations=len(used_by),
            splits=tuple(dict.fromkeys(split for split, _ in uses[path, modality])),
            # A comparison shows two subjects, and does not say which volume is whose: whoever is always there is.
            subjects=tuple(sorted(set.intersection(*used_by) or set.union(*used_by))),
            facts=_known(store.info, path, modality),
            flags=_known(lambda path, _: store.notes(path), path, modality) or (),
        )
        rows.append(row)
    names = {row.modality for row in rows}
    flagged = [row for name in names for row in flag(row for row in rows if row.modality == name)]
    return sorted(flagged, key=lambda row: (not row.flags, row.file, row.modality))


def flag(rows: Iterable[VolumeRow]) -> list[VolumeRow]:
    """The same volumes of one modality, with what is unlike the others added to the flags of each."""
    rows = list(rows)
    facts = [row.facts for row in rows if row.facts]
    flags: list[list[str]] = [[] for _ in facts]
    for name, of in GEOMETRY.items():
        usual = Counter(map(of, facts)).most_common(1)
        for own, seen in zip(flags, facts, strict=True):
            own += [name] if of(seen) != usual[0][0] else []
    for name in MEASURED if facts else ():
        scores = robust_z([getattr(seen, name) for seen in facts])
        for own, score in zip(flags, scores, strict=True):
            own += [f"{name} {score:+.1f} σ"] if abs(score) > FAR else []
    found = iter(flags)
    return [replace(row, flags=(*row.flags, *next(found))) if row.facts else row for row in rows]


def robust_z(values: Sequence[float]) -> np.ndarray:
    """How far each value is from the median, in standard deviations as the median absolute deviation tells them.

    Where more than half of the values are alike that deviation is 0, and the mean absolute one takes its place.
    """
    away = np.asarray(values, np.float64) - np.median(values)
    scale = 1.4826 * np.median(np.abs(away)) or 1.2533 * np.abs(away).mean()
    return away / scale if scale else away


def duplicates(rows: Iterable[VolumeRow]) -> list[list[str]]:
    """Files of the same content under different paths, a list for each content."""
    files: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        files[row.content].add(row.file)
    return sorted(sorted(alike) for content, alike in files.items() if content and len(alike) > 1)


def _known(ask: Callable[[str, str], Answer], path: str, modality: str) -> Answer | None:
    """What the store answers; None where it has lost it since, which a report survives."""
    try:
        return ask(path, modality)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


GEOMETRY: dict[str, Callable[[VolumeInfo], Any]] = {
    "shape": lambda facts: facts.shape,
    "spacing": lambda facts: tuple(round(edge, 2) for edge in facts.spacing),
    "orientation": lambda facts: facts.orientation,
}
"""What the volumes of a modality share as a rule."""

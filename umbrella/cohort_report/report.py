"""The report of a cohort: an HTML page and CSV tables."""

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from umbrella.base import ProgressBar, UserError
from umbrella.cohort_report.cohort_statistics import (
    BINS,
    VolumeRow,
    collect_volumes,
    count_labels,
    count_splits,
    find_duplicates,
    shared_subjects,
)
from umbrella.data.splits import Splits
from umbrella.fileio import write_csv
from umbrella.html import number, render
from umbrella.volumes.slices import THUMBNAIL_SIZE, orthogonal_slices, save_thumbnail
from umbrella.volumes.store import VolumeStore

MAX_ROWS = 500
"""Maximum number of volumes and of problems on the page; the tables hold all."""
MAX_NAMES = 20
"""Maximum number of subjects in two splits, and of files with the same content, that a row of the page names."""
INFO_FIELDS = ("shape", "spacing", "orientation", "dtype", "minimum", "maximum", "mean", "deviation", "foreground")


def write_report(folder: Path, raw: Splits, store: VolumeStore, progress: ProgressBar) -> Path:
    """Write ``index.html``, ``volumes.csv``, ``conversations.csv``, ``problems.csv`` and ``thumbnails/``.

    An existing report is replaced only after the new one is complete.

    Args:
        folder: created if it does not exist. All other content of the folder is deleted.
        raw: the conversations of each split, and the problems that were found.
        store: holds the volumes. The cells of a volume that it does not hold are empty.
        progress: wraps slow loops in a progress bar.

    Returns:
        The path of ``index.html``.
    """
    rows = collect_volumes(raw, store, progress)
    fresh = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
    try:
        (fresh / "thumbnails").mkdir(parents=True)
        drawn = _thumbnails(rows[:MAX_ROWS], store, fresh / "thumbnails", progress)
        # File names may hold bytes that are not valid UTF-8.
        (fresh / "index.html").write_text(_page(raw, rows, drawn), encoding="utf-8", errors="backslashreplace")
        _write_tables(fresh, raw, rows)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder / "index.html"


def _thumbnails(rows: Sequence[VolumeRow], store: VolumeStore, folder: Path, progress: ProgressBar) -> set[str]:
    """Draw a thumbnail for each content, and return the hashes of those that could be drawn."""
    drawn = set()
    for row in progress(rows, "drawing thumbnails"):
        if row.content and row.content not in drawn:
            with suppress(UserError, OSError):  # the file was removed after the check
                array = store.get(row.path, row.modality)
                planes = orthogonal_slices(array, store.modalities[row.modality], row.info)
                save_thumbnail(planes, folder / f"{row.content}.png")
                drawn.add(row.content)
    return drawn


def _page(raw: Splits, rows: Sequence[VolumeRow], drawn: set[str]) -> str:
    splits = count_splits(raw.splits)
    return render(
        Path(__file__).with_name("report.html"),
        {"by": lambda values: " × ".join(map(number, values))},
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        splits=splits,
        task_types=sorted({kind for split in splits for kind in split["task_types"]}),
        shared=shared_subjects(splits),
        targets=count_labels(raw.splits),
        problems=raw.problems,
        notices=raw.notices,
        rows=rows,
        flagged=sum(bool(row.flags) for row in rows),
        duplicates=find_duplicates(rows),
        drawn=drawn,
        max_rows=MAX_ROWS,
        max_names=MAX_NAMES,
        tile=THUMBNAIL_SIZE,
        bins=BINS,
    )


def _write_tables(folder: Path, raw: Splits, rows: Sequence[VolumeRow]) -> None:
    files = {row.path: row.file for row in rows}
    write_csv(
        folder / "volumes.csv",
        ["file", "modality", "conversations", "splits", "subjects", *INFO_FIELDS, "flags", "content", "path"],
        (
            [r.file, r.modality, r.conversations, _join(r.splits), _join(r.subjects)]
            + [_join(v) if isinstance(v := getattr(r.info, name, None), tuple) else v for name in INFO_FIELDS]
            + [_join(r.flags), r.content, r.path]
            for r in rows
        ),
    )
    write_csv(
        folder / "conversations.csv",
        ["split", "task_id", "task_type", "target", "label", "subject_id", "subjects", "turns", "volumes", "place"],
        (
            (
                *(split, c.task_id, c.task_type, _join(q.target for q in c.questions())),
                _join("" if q.label is None else q.label for q in c.questions()),
                *(c.subject_id, _join(sorted(c.subjects))),
                *(len(c.conversations), _join(files[v.image_path] for v in c.volumes)),
                raw.locations[split, c.task_id],
            )
            for split, conversations in raw.splits.items()
            for c in conversations
        ),
    )
    problems = ([p.where, p.field, p.message, json.dumps(p.sample)] for p in raw.problems)
    write_csv(folder / "problems.csv", ["place", "field", "reason", "sample"], problems)


def _join(values: Iterable[Any]) -> str:
    return "; ".join(map(str, values))

"""What the volume store holds, and how to make room."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella.modality import Modality
from umbrella.volumes.files import is_current, read_json
from umbrella.volumes.preparing import recipe

ABANDONED = 24 * 3600
"""Seconds after which a file that nobody finished writing counts as left behind."""


@dataclass(frozen=True)
class Holding:
    """The arrays of one recipe: their folder, what it does, how many there are, bytes, and who uses it now."""

    folder: Path
    recipe: dict[str, Any]
    arrays: int
    size: int
    modalities: tuple[str, ...]
    """Modalities of the present settings that have this recipe; none when only older settings had it."""


def holdings(folder: Path, modalities: Mapping[str, Modality]) -> list[Holding]:
    """What lies in a store, largest first."""
    found = []
    for file in folder.glob("*/recipe.json"):
        made = read_json(file)
        sizes = [_size(array) for array in file.parent.glob("*.npy")]
        users = tuple(name for name, modality in modalities.items() if recipe(modality) == made)
        found.append(Holding(file.parent, made, len(sizes), sum(sizes), users))
    return sorted(found, key=lambda holding: -holding.size)


def prune(folder: Path, modalities: Mapping[str, Modality], dry_run: bool = False) -> tuple[int, int]:
    """Delete what nothing can ask for any more: (files deleted, bytes). A dry run only counts them.

    That is: arrays of recipes that no modality of the settings has; arrays whose every source file is gone or has
    changed; records of such sources; and what a process left half-written more than a day ago. A run that uses the
    store with other settings makes its arrays again. Sources that this machine cannot see count as gone.
    """
    doomed = [f for f in folder.rglob("*.partial") if _age(f) > ABANDONED]
    living = set()
    for record in (folder / "sources").glob("*.json"):
        source = read_json(record)
        if is_current(source):
            living.add(source["content"])
        else:
            doomed.append(record)
    for holding in holdings(folder, modalities):
        files = [f for f in holding.folder.iterdir() if f.suffix in (".npy", ".json") and f.name != "recipe.json"]
        doomed += [f for f in files if not holding.modalities or f.stem not in living]
        if not holding.modalities:
            doomed.append(holding.folder / "recipe.json")
    size = sum(map(_size, doomed))
    for file in [] if dry_run else doomed:
        file.unlink(missing_ok=True)
        if file.name == "recipe.json":
            with suppress(OSError):  # another process is writing there
                file.parent.rmdir()
    return len(doomed), size


def _size(file: Path) -> int:
    """Bytes; none where another process has taken the file away meanwhile."""
    with suppress(OSError):
        return file.stat().st_size
    return 0


def _age(file: Path) -> float:
    """Seconds since a file was written; none where it has been renamed meanwhile."""
    with suppress(OSError):
        return time.time() - file.stat().st_mtime
    return 0

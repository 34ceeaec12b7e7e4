"""The files of the store, and when those that they are made from have changed."""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes.image_formats import image_files
from umbrella.volumes.preprocessing import recipe

HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f2', 'fortran_order': False, 'shape': \((\d+(?:, \d+)*)\), \} *\n", re.DOTALL
)
"""How a file of NumPy's begins that holds an array of the store: two bytes say how long the braces are."""
LONGEST = 256
"""Bytes of a header, at most."""


def write_atomic(path: Path, content: bytes | np.ndarray) -> None:
    """Write a file that other processes find either whole or not at all.

    Only a crash of the machine may leave it cut short, which whoever reads the store notices: waiting for the disk
    would take three times as long as preparing a small volume.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        # Not tempfile, whose files no other user may read: the umask decides.
        with partial.open("xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], int]:
    """The shape of an array of the store, and where in its file the values begin.

    NumPy takes this header for a Python expression, and Python's parser now and then fails in one of several threads
    (python/cpython#106905): a trial of ours died of that.

    Raises:
        ValueError: it is no such array, or is cut short in its header.
    """
    found = HEADER.match(file.read(LONGEST))
    if not found:
        raise ValueError("not an array of the store")
    return tuple(map(int, found[1].split(b", "))), found.end()


def map_array(path: Path) -> np.ndarray:
    """An array of the store: float16, memory-mapped and read-only.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no such array, or is cut short.
    """
    with path.open("rb") as file:
        shape, start = read_header(file)
        return np.memmap(file, np.float16, "r", start, shape)


def is_current(record: Mapping[str, Any]) -> bool:
    """Whether the file of a record in ``sources/`` is still as it was when it was read."""
    try:
        return file_stamp(record["path"]) == (record["size"], record["time"])
    except (UserError, KeyError):
        return False


def file_stamp(source: str | Path) -> tuple[int, int]:
    """Size and time of an image's files, which change when the image does."""
    try:
        stats = [os.stat(file) for file in image_files(source)]
    except OSError as error:
        missing = "" if str(error.filename) == str(source) else f"{error.filename}: "
        raise UserError(f"{source}: {missing}{error.strerror}; see data.root and data.path_map") from None
    return sum(stat.st_size for stat in stats), sum(stat.st_mtime_ns for stat in stats)


def read_json(path: Path) -> dict[str, Any]:
    """A small file of the store; nothing where it is missing or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _is_array(file: Path) -> bool:
    try:
        map_array(file)
    except ValueError:
        return False
    return True


READERS: Mapping[str, Callable[[Path], bool]] = {".npy": _is_array, ".json": lambda file: bool(read_json(file))}
"""Ending of a file of the store to whether one is whole."""

ABANDONED = 24 * 3600
"""Seconds after which a file that nobody finished writing counts as left behind."""


@dataclass(frozen=True)
class StoredRecipe:
    """The arrays of one recipe: their folder, what it does, how many there are, bytes, and who uses it now."""

    folder: Path
    recipe: dict[str, Any]
    arrays: int
    size: int
    modalities: tuple[str, ...]
    """Modalities of the present settings that have this recipe; none when only older settings had it."""


def stored_recipes(folder: Path, modalities: Mapping[str, Modality]) -> list[StoredRecipe]:
    """What lies in a store, largest first."""
    found = []
    for file in folder.glob("*/recipe.json"):
        made = read_json(file)
        sizes = [_size(array) for array in file.parent.glob("*.npy")]
        users = tuple(name for name, modality in modalities.items() if recipe(modality) == made)
        found.append(StoredRecipe(file.parent, made, len(sizes), sum(sizes), users))
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
    for holding in stored_recipes(folder, modalities):
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

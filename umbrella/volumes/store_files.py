"""Files of the volume store: reading, writing, validation and pruning."""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes.preprocessing import recipe
from umbrella.volumes.reading import image_files

HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f2', 'fortran_order': False, 'shape': \((\d+(?:, \d+)*)\), \} *\n", re.DOTALL
)
"""The NPY 1.0 header of a float16 array in C order. Two bytes after the version are the length of the dictionary."""
MAX_HEADER_BYTES = 256


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], int]:
    """Return the shape of an array of the store and the offset of its values in bytes. Raises ValueError if truncated.

    NumPy parses this header as a Python expression, which can fail with several threads (python/cpython#106905).
    """
    header = HEADER.match(file.read(MAX_HEADER_BYTES))
    if not header:
        raise ValueError("not an array of the store")
    shape = tuple(map(int, header[1].split(b", ")))
    if os.fstat(file.fileno()).st_size != header.end() + 2 * prod(shape):
        raise ValueError("truncated")
    return shape, header.end()


@dataclass(frozen=True)
class ArrayPart:
    """A volume, or some frames of a series, in an array of the store."""

    path: str | Path
    offsets: tuple[int, ...]
    """Start of each frame in the file, in bytes. A volume has one frame."""

    def copy(self, into: np.ndarray) -> bool:
        """Read into a contiguous float16 array of a volume (X, Y, Z), or of frames (T, X, Y, Z).

        Returns:
            Whether the file is there and has all bytes.
        """
        try:
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            return self.read(file, into)
        finally:
            os.close(file)

    def read(self, file: int, into: np.ndarray) -> bool:
        """Read as ``copy`` does, from an open file."""
        frames = into.reshape(len(self.offsets), -1)
        read = [os.preadv(file, [frame.data], at) for frame, at in zip(frames, self.offsets, strict=True)]
        return read == [frames[0].nbytes] * len(frames)


def is_array(path: Path) -> bool:
    """Return whether a file is a complete array of the store."""
    try:
        with path.open("rb") as file:
            return bool(read_header(file))
    except ValueError:
        return False


def content_hash(path: str | Path) -> str:
    """Return a hash of the bytes of an image's file, or of both files of a pair. Raises UserError."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in image_files(path):
            with file.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    return digest.hexdigest()


def file_stamp(source: str | Path) -> tuple[int, int]:
    """Return the total size in bytes and the modification time in nanoseconds (a sum for two files) of an image."""
    try:
        stats = [os.stat(file) for file in image_files(source)]
    except OSError as error:
        missing = "" if str(error.filename) == str(source) else f"{error.filename}: "
        raise UserError(f"{source}: {missing}{error.strerror}; see data.root and data.path_map") from None
    return sum(stat.st_size for stat in stats), sum(stat.st_mtime_ns for stat in stats)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of the store. Return an empty dictionary if it is missing or truncated."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


MAX_PARTIAL_AGE = 24 * 3600
"""Age in seconds above which a partial file counts as abandoned."""


@dataclass(frozen=True)
class StoredRecipe:
    """The arrays of one recipe in the store."""

    folder: Path
    recipe: dict[str, Any]
    """Content of ``recipe.json``, see ``preprocessing.recipe``."""
    arrays: int
    """Number of arrays."""
    size: int
    """Bytes of all arrays."""
    modalities: tuple[str, ...]
    """Modalities of the current settings with this recipe. Empty if only other settings use it."""


def stored_recipes(folder: Path, modalities: Mapping[str, Modality]) -> list[StoredRecipe]:
    """List the recipes of a store, largest first."""
    recipes = []
    for file in folder.glob("*/recipe.json"):
        content = read_json(file)
        sizes = [_size_and_age(array)[0] for array in file.parent.glob("*.npy")]
        users = tuple(name for name, modality in modalities.items() if recipe(modality) == content)
        recipes.append(StoredRecipe(file.parent, content, len(sizes), sum(sizes), users))
    return sorted(recipes, key=lambda stored: -stored.size)


def prune(folder: Path, modalities: Mapping[str, Modality], dry_run: bool = False) -> tuple[int, int]:
    """Delete the files of a store that the current settings and source files do not use.

    These are: arrays of recipes that no modality of the settings has; arrays whose source files are all missing or
    changed; records of such source files; partial files older than a day. Source files that this machine cannot access
    count as missing. A run with other settings decodes its volumes again.

    Returns:
        The number of deleted files and their total size in bytes. A dry run only counts them.
    """
    unused = [file for file in folder.rglob("*.partial") if _size_and_age(file)[1] > MAX_PARTIAL_AGE]
    current_contents = set()
    for record_file in (folder / "sources").glob("*.json"):
        record = read_json(record_file)
        with suppress(UserError, KeyError):
            if file_stamp(record["path"]) == (record["size"], record["time"]):
                current_contents.add(record["content"])
                continue
        unused.append(record_file)
    for stored in stored_recipes(folder, modalities):
        files = [file for file in stored.folder.iterdir() if file.suffix in (".npy", ".json")]
        files.sort(key=lambda file: file.name == "recipe.json")  # last: its folder is removed with it
        kept = {"recipe", *current_contents} if stored.modalities else set()
        unused += [file for file in files if file.stem not in kept]
    size = sum(_size_and_age(file)[0] for file in unused)
    for file in [] if dry_run else unused:
        file.unlink(missing_ok=True)
        if file.name == "recipe.json":
            with suppress(OSError):  # another process is writing to the folder
                file.parent.rmdir()
    return len(unused), size


def _size_and_age(file: Path) -> tuple[int, float]:
    """Return size in bytes and age in seconds, or zeros if another process has deleted or renamed the file."""
    with suppress(OSError):
        stat = file.stat()
        return stat.st_size, time.time() - stat.st_mtime
    return 0, 0.0

"""The files of the store, and when those that they are made from have changed."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from umbrella.base import UserError
from umbrella.volumes.reading import image_files

HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f2', 'fortran_order': False, 'shape': \((\d+(?:, \d+)*)\), \} *\n", re.DOTALL
)
"""How a file of NumPy's begins that holds an array of the store: two bytes say how long the braces are."""
LONGEST = 256
"""Bytes of a header, at most."""


def write_whole(path: Path, content: bytes | np.ndarray) -> None:
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

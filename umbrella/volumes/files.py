"""The files of the store, and when those that they are made from have changed."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from umbrella.base import UserError
from umbrella.volumes.reading import image_files


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
        np.load(file, mmap_mode="r")
    except (ValueError, EOFError):
        return False
    return True


READERS: Mapping[str, Callable[[Path], bool]] = {".npy": _is_array, ".json": lambda file: bool(read_json(file))}
"""Ending of a file of the store to whether one is whole."""

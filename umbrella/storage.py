"""Whether a folder can be written, and what an error says of a disk that is full, read-only or gone."""

import csv
import errno
import fcntl
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from umbrella.base import UserError, printable

FAULTS = {
    getattr(errno, name)
    for name in [
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EROFS",
        "EACCES",
        "EPERM",
        "ENOENT",
        "ENOTDIR",
        "EEXIST",
        "EIO",
        "ESTALE",
        "ENODEV",
        "ENXIO",
        "ENOTCONN",
    ]
    if hasattr(errno, name)
}
"""What the storage, and no program, is to blame for: doing the same again would not help."""
SQLITE = re.compile("full|I/O|unable to open|readonly|malformed|no such table")
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What a file system without locks says."""

FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # spreadsheets take the wide ones, too
"""What a formula in a spreadsheet begins with."""


class NoLocks(UserError):
    """Files cannot be locked here: Lustre that is mounted without, some network folders. Names the folder."""


def storage_fault(error: BaseException | None) -> str:
    """What is wrong with the storage, in words, if that is what an error or one of its causes says; else empty.

    Libraries wrap the system's error, each in its own way: safetensors in a text, torch and MLflow in another error.
    """
    while error:
        text = str(error)
        number = re.search(r"\(os error (\d+)\)", text)
        if isinstance(error, OSError) and error.errno is not None and error.errno in FAULTS:
            return f"{os.strerror(error.errno)}{f': {error.filename}' if error.filename else ''}"
        if number and int(number[1]) in FAULTS:
            return os.strerror(int(number[1]))
        if isinstance(error, sqlite3.Error) and SQLITE.search(text):
            return f"SQLite says {text}"
        error = error.__cause__ or error.__context__
    return ""


def put_text(file: str | Path, text: str) -> None:
    """Write a file that is there whole, or as it was before. Several processes may write the same one at once."""
    file = Path(file)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table for spreadsheets, which must not take a text for a formula: ``'`` goes before one that looks so."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        csv.writer(out).writerows([_cell(value) for value in row] for row in chain([header], rows))


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(FORMULA) else text
    return text


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Let a file that nobody changes have a second name, or copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def check_writable(folder: str | Path, what: str) -> None:
    """Make a folder if need be, and write there.

    Args:
        what: what the folder is called in the error.

    Raises:
        UserError: that did not work; says why.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{what} cannot be written to: {storage_fault(error) or error}") from None


def lock(file: IO[Any], wait: bool = False) -> bool:
    """Lock an open file for this process, until it is closed; returns False where another one has it.

    Args:
        wait: for the other one to give it back.

    Raises:
        NoLocks: its file system has none.
        OSError: something else is wrong with the storage.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise NoLocks(
            f"{Path(file.name).absolute().parent}: files cannot be locked here ({error.strerror}), by which scripts"
            " know of each other; have it mounted with locks (Lustre: -o flock), or take another folder"
        ) from None
    return True

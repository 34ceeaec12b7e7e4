"""Atomic writes, file locks, CSV tables, and clear messages for storage errors."""

import csv
import errno
import fcntl
import os
import re
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO
from uuid import uuid4

from umbrella.base import UserError, printable
from umbrella.paths import storage_of

STORAGE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
    errno.EEXIST, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN,
}  # fmt: skip
"""Error numbers that come from the storage, not from a program. A second try would fail, too."""
SQLITE_ERRORS = re.compile("full|I/O|unable to open|readonly|malformed|no such table")
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Error numbers of ``flock`` on a file system without locks."""
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # spreadsheets accept the full-width characters, too
"""First characters of a formula in a spreadsheet."""


class LocksUnavailable(UserError):
    """The file system does not support locks, as Lustre without ``-o flock`` and some network folders."""


def lock(file: IO[Any], wait: bool = False) -> bool:
    """Lock an open file for this process until the file is closed or the process ends.

    Args:
        wait: wait until another process has released the lock.

    Returns:
        False if another process holds the lock.

    Raises:
        LocksUnavailable: the file system does not support locks.
        OSError: another storage error.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise LocksUnavailable(
            f"{Path(file.name).absolute().parent}: files cannot be locked here ({error.strerror}), by which scripts"
            " know of each other; have it mounted with locks (Lustre: -o flock), or take another folder"
        ) from None
    return True


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a training or sweep, so that only one script at a time runs it.

    It is a lock on a file beside the folder, which need not exist: it may be downloaded. The file stays: a script that
    deleted it could lock the deleted file while another locks a new one.

    Raises:
        UserError: another process holds the lock; the storage cannot be written to, or does not support locks.
    """
    storage, path = storage_of(folder), folder.with_name(f".{folder.name}.lock")
    check_writable(storage, f"resources.storage={storage}")
    path.parent.mkdir(exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        if not lock(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            remedy = f"stop it first, or delete {path} if its machine is lost"
            raise UserError(f"{folder.name} is in use by {owner}; {remedy}")
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield


def describe_storage_error(error: BaseException | None) -> str:
    """Describe the storage error that an exception or one of its causes reports.

    Libraries wrap the system's error in different ways: safetensors in a text, torch and MLflow in another exception.

    Returns:
        One line; empty if the exception has another reason.
    """
    while error:
        text = str(error)
        number = re.search(r"\(os error (\d+)\)", text)
        if isinstance(error, OSError) and error.errno is not None and error.errno in STORAGE_ERRORS:
            return f"{os.strerror(error.errno)}{f': {error.filename}' if error.filename else ''}"
        if number and int(number[1]) in STORAGE_ERRORS:
            return os.strerror(int(number[1]))
        if isinstance(error, sqlite3.Error) and SQLITE_ERRORS.search(text):
            return f"SQLite says {text}"
        error = error.__cause__ or error.__context__
    return ""


def write_atomic(file: str | Path, content: str | bytes | Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name and rename it, so that other processes never see a partial file.

    There is no ``fsync``: it would take three times as long as preparing a small volume. A crash of the machine can
    therefore truncate a file.

    Args:
        content: text, bytes, or a function that writes the content to the open file.
    """
    partial = Path(file).with_name(f".{Path(file).name}.{uuid4().hex}.partial")
    try:
        # tempfile would make the file unreadable for other users; here the umask applies.
        with partial.open("xb") as out:
            if callable(content):
                content(out)
            else:
                out.write(content.encode() if isinstance(content, str) else content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def dataset_hint(path: str | Path) -> str:
    """Return what to do with a BIDS dataset, or a table, that is given where settings or conversations belong.

    Empty if the path is something else.
    """
    place = Path(path)
    folder = place.parent if place.name == "participants.tsv" else place
    is_dataset = folder.is_dir() and (
        any((folder / name).is_file() for name in ("dataset_description.json", "participants.tsv"))
        or any(entry.is_dir() for entry in folder.glob("sub-*"))
    )
    if not is_dataset and not (place.is_file() and place.suffix.lower() in (".tsv", ".csv")):
        return ""
    command = f"umbrella make-conversations {folder} --targets sex,age --output conversations/"
    return (
        f"{path}: is a {'BIDS dataset' if is_dataset else 'table'}; first {command}, and give conversations/data.yaml"
    )


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV table. Texts that a spreadsheet would read as a formula get a leading ``'``."""
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
    """Create a hard link to a file, or a copy if the file system does not allow one."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def check_writable(folder: str | Path, name: str) -> None:
    """Create a folder if it does not exist, and check that files can be written to it.

    Args:
        name: name of the folder in the error message.

    Raises:
        UserError: the folder cannot be created or written to; the message has the reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{name} cannot be written to: {describe_storage_error(error) or error}") from None

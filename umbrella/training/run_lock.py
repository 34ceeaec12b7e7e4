"""A lock that lets only one script at a time run a training or sweep."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from umbrella.base import UserError
from umbrella.fileio import check_writable, lock
from umbrella.paths import lock_file, storage_of


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a training or sweep. The system releases it when the process ends.

    It is a lock on a file beside the folder. The folder need not exist and is not made, because it may be downloaded.

    Raises:
        UserError: another process holds the lock; the storage cannot be written to, or does not support locks.
    """
    storage = storage_of(folder)
    check_writable(storage, f"resources.storage={storage}")
    path = lock_file(folder)
    is_new = not path.parent.exists()
    try:
        with _open_locked(path) as file:
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
            try:
                yield
            finally:
                with suppress(OSError):  # the storage was moved or deleted
                    if _is_same_file(file, path):
                        path.unlink()
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty any more
                path.parent.rmdir()


def _open_locked(path: Path) -> IO[str]:
    """Open and lock a file."""
    while True:
        with suppress(FileNotFoundError):  # another process may delete the empty folder
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
            try:
                is_locked = lock(file)
            except UserError:  # the file system does not support locks
                path.unlink()
                raise
            if not is_locked:
                with file:
                    file.seek(0)
                    owner = file.read().strip() or "another process"
                name = path.name.removeprefix(".").removesuffix(".lock")
                remedy = f"stop it first, or delete {path} if its machine is lost"
                raise UserError(f"{name} is in use by {owner}; {remedy}")
            if _is_same_file(file, path):
                return file
            file.close()


def _is_same_file(file: IO[str], path: Path) -> bool:
    """Whether a path is that of the open file. Another process may have deleted the file and made a new one."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False

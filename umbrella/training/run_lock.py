"""Whose a training or sweep is: one script's at a time, of all that have its storage."""

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
    """While in here, the training or sweep is this process's. The claim goes with the process, however that ends.

    It is a lock on a file beside the folder, which need not be there yet, and is not made: it may be downloaded.

    Raises:
        UserError: it is another one's; says whose. The storage cannot be written to, or has no locks.
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
                with suppress(OSError):  # the storage was moved or is gone
                    if _is_same_file(file, path):
                        path.unlink()
    finally:
        if is_new:
            with suppress(OSError):  # there is something in it now
                path.parent.rmdir()


def _open_locked(path: Path) -> IO[str]:
    """The file, open and locked."""
    while True:
        with suppress(FileNotFoundError):  # whoever leaves may take the empty folder along
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
            try:
                is_mine = lock(file)
            except UserError:  # no locks here
                path.unlink()
                raise
            if not is_mine:
                with file:
                    file.seek(0)
                    whose = file.read().strip() or "another process"
                name = path.name.removeprefix(".").removesuffix(".lock")
                remedy = f"stop that first, or, if its machine is lost, delete {path}"
                raise UserError(f"{name} is being run already, by {whose}; {remedy}")
            if _is_same_file(file, path):
                return file
            file.close()


def _is_same_file(file: IO[str], path: Path) -> bool:
    """Whether the path is that of the open file: one who left may have deleted it, and another one made it anew."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False

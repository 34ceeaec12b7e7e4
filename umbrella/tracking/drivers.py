"""Which scripts are alive: a run that a killed one left RUNNING can be told from one that goes on elsewhere.

A script holds a lock on a file of its own in the storage folder for as long as it lives; however it ends, the system
takes the lock away.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

import psutil

from umbrella.locking import NoLocks, lock

_held: dict[Path, IO[str]] = {}


@cache
def driver_id() -> str:
    """Names this process: host, process id and when it began."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.2f}"


def announce(storage: str | Path, what: str) -> None:
    """Let others see, for as long as this process lives, that it does. ``what``: names what it works on."""
    path = _folder(storage, what) / driver_id()
    if path not in _held:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        with suppress(NoLocks):  # then nobody can see it
            lock(file)  # or this process has it already, if the storage was moved
        _held[path] = file


def gone(storage: str | Path, what: str) -> Iterator[str]:
    """The processes of this host that announced the same and have ended since.

    Each is forgotten when the next one is asked for. Others of this host look at it later, while this one does.
    """
    for path in sorted(_folder(storage, what).glob("*")):
        if path in _held or path.name.split(" ")[0] != socket.gethostname():
            continue
        with path.open("r+") as file:
            try:
                lives = not lock(file)
            except NoLocks:  # nothing can be said
                continue
            if lives:
                continue
            yield path.name
            path.unlink(missing_ok=True)


def _folder(storage: str | Path, what: str) -> Path:
    return Path(storage).absolute() / ".drivers" / what

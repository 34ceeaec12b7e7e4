"""Locks on open files. The system takes one away with the process that holds it, however that ends."""

import errno
import fcntl
from pathlib import Path
from typing import IO, Any

from umbrella.base import UserError

NONE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What a file system without locks says."""


class NoLocks(UserError):
    """Files cannot be locked here: Lustre that is mounted without, some network folders. Names the folder."""


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
        if error.errno not in NONE:
            raise
        raise NoLocks(
            f"{Path(file.name).absolute().parent}: files cannot be locked here ({error.strerror}), by which scripts"
            " know of each other; have it mounted with locks (Lustre: -o flock), or take another folder"
        ) from None
    return True

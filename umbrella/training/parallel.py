"""What the workers of one training have to say to each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from umbrella.base import UserError
from umbrella.storage import storage_fault


def gathered(own: Any) -> list[Any]:
    """Every worker's, by rank, on each of them."""
    if not distributed.is_initialized():
        return [own]
    everyones: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyones, own)
    return everyones


@contextmanager
def together() -> Iterator[None]:
    """What ends the work in here on one worker, ends it on all: none waits for one that is gone. Each has to enter.

    Raises:
        UserError: what one of them met: a UserError, or storage that cannot be written or read.
    """
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    except Exception as error:
        problem = storage_fault(error)
        if not problem:
            raise
    for everyones in gathered(problem):
        if everyones:
            raise UserError(everyones)

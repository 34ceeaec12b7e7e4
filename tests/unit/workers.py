"""Processes that train together, as the workers of a training do."""

import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

# Each worker starts as a copy of one process with these imports. A fresh process would take six seconds for them.
multiprocessing.set_forkserver_preload(
    ["umbrella.models.build", "umbrella.training.language_model", "torch.distributed.fsdp", "peft"]
)


def run_workers(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call ``work(rank, *arguments)`` in so many processes at once; raises what one of them raises."""
    # As bytes: torch would pass an open file for each tensor, which are too many here.
    start_processes(_run, (work, pickle.dumps(arguments)), nprocs=count, start_method="forkserver")


def _run(rank: int, work: Callable[..., None], arguments: bytes) -> None:
    work(rank, *pickle.loads(arguments))

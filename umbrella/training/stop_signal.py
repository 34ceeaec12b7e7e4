"""How the workers of a training heed what is asked of it: to stop, or to save what it has, as its node is taken away.

How a stop is asked for: see ``requests``. That a node is to be taken away Ray says, where it knows: see
``ray.train.get_preemption_info``.
"""

import os
import time
from enum import IntEnum
from math import inf
from pathlib import Path

import ray.train
import torch

from umbrella.training.distributed import agreed
from umbrella.training.requests import stop_file, workers_file

FILE_INTERVAL = 0.5
"""Seconds between two looks for the file."""
RAY_INTERVAL = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))
"""Seconds between two questions to Ray, as between two of its own to the cluster: each takes as long as several
messages between processes do, while the GPUs wait. Nodes are drained with more notice than that."""


class Request(IntEnum):
    """What the workers are to do after this step."""

    NOTHING = 0
    LOOK = 1
    """Ask Ray, all together; ``look`` never returns it."""
    SAVE = 2
    STOP = 3
    """Save and return."""


class Requests:
    """Where the workers of a training look for requests. All must: what one did alone, the others would wait for.

    Args:
        of_ray_train: whether Ray Train started this process, and not Ray Tune.
    """

    def __init__(self, folder: str | Path, rank: int, device: torch.device, of_ray_train: bool = True) -> None:
        self._file, self._rank, self._device = stop_file(folder), rank, device
        self._next_look, self._next_question, self._known = 0.0, 0.0, None
        if not of_ray_train:  # it knows nothing of other processes
            self._next_question = inf
        if rank == 0:
            workers_file(folder).touch()

    def look(self) -> Request:
        """What is asked, the same on every worker. To be called by all of them after each step."""
        request = Request(agreed(self._own() if self._rank == 0 else Request.NOTHING, self._device))
        if request is not Request.LOOK:
            return request
        preemption = ray.train.get_preemption_info()  # waits for all workers
        if preemption is None or preemption == self._known:
            return Request.NOTHING
        self._known = preemption
        return Request.SAVE

    def _own(self) -> Request:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + FILE_INTERVAL
            if self._file.exists():
                return Request.STOP
        if now < self._next_question:
            return Request.NOTHING
        self._next_question = now + RAY_INTERVAL
        return Request.LOOK

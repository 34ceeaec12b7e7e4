"""Requests to a training from outside: to stop, or to save a checkpoint because its node will be removed.

A script that receives SIGTERM asks its training to stop with an empty file in the training's folder, which all nodes
share. A second file exists while workers run that check for the first. ``ray.train.get_preemption_info`` reports that
a node will be removed.
"""

import os
import time
from enum import IntEnum
from math import inf
from pathlib import Path

import ray.train
import torch

from umbrella.paths import STOP, WORKERS
from umbrella.training.distributed import broadcast

FILE_INTERVAL = 0.5
"""Seconds between two checks for the file."""
PREEMPTION_INTERVAL = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))
"""Seconds between two calls of ``get_preemption_info``; Ray itself asks the cluster as often. A call takes several
messages between processes while the GPUs wait, and a node is drained with more notice than that."""


class Request(IntEnum):
    """What the workers do after a step."""

    NOTHING = 0
    CHECK_PREEMPTION = 1
    """Call ``get_preemption_info`` on all ranks. ``StopSignal.check`` never returns it."""
    SAVE = 2
    STOP = 3
    """Save and return."""


class StopSignal:
    """Checks for requests. It is collective: every rank makes one and calls ``check``.

    Args:
        folder: of the training.
        uses_ray_train: whether Ray Train started this process. Ray Tune gives no preemption info.
    """

    def __init__(self, folder: str | Path, rank: int, device: torch.device, uses_ray_train: bool = True) -> None:
        self._file, self._rank, self._device = Path(folder) / STOP, rank, device
        self._next_file_check, self._next_preemption_check = 0.0, 0.0 if uses_ray_train else inf
        self._last_preemption: ray.train.PreemptionInfo | None = None
        if rank == 0:
            (Path(folder) / WORKERS).touch()

    def check(self) -> Request:
        """Return the current request, the same on every rank. All ranks call it after each step."""
        request = Request(broadcast(self._check_on_rank_0() if self._rank == 0 else Request.NOTHING, self._device))
        if request is not Request.CHECK_PREEMPTION:
            return request
        preemption = ray.train.get_preemption_info()  # waits for all ranks
        if preemption is None or preemption == self._last_preemption:
            return Request.NOTHING
        self._last_preemption = preemption
        return Request.SAVE

    def _check_on_rank_0(self) -> Request:
        now = time.monotonic()
        if now >= self._next_file_check:
            self._next_file_check = now + FILE_INTERVAL
            if self._file.exists():
                return Request.STOP
        if now < self._next_preemption_check:
            return Request.NOTHING
        self._next_preemption_check = now + PREEMPTION_INTERVAL
        return Request.CHECK_PREEMPTION

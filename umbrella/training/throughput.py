"""Throughput of a training, its time waiting for data, and its memory."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch

MIB = 2**20
RECENT = 50
"""Steps that ``Throughput.recent`` covers."""


class _Mark(NamedTuple):
    time: float
    waited: float = 0.0
    samples: int = 0
    tokens: int = 0


class Throughput:
    """Samples and supervised tokens per second, counted from the start or from the last ``take``."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start = _Mark(time.perf_counter())
        self._steps = deque([self._start], maxlen=RECENT + 1)
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of this context as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def step(self, samples: int, supervised_tokens: int) -> None:
        """Count a step of the global batch.

        Args:
            supervised_tokens: 0 for a model without tokens.
        """
        last = self._steps[-1]
        now = time.perf_counter()
        self._steps.append(_Mark(now, self._waited, last.samples + samples, last.tokens + supervised_tokens))

    def recent(self) -> dict[str, float]:
        """Return the metrics of ``take`` over the last ``RECENT`` steps, without a reset."""
        return _metrics(self._steps[0], self._steps[-1])

    def take(self) -> dict[str, float]:
        """Return samples and supervised tokens per second and the share of time spent waiting for data, and reset."""
        metrics = _metrics(self._start, self._steps[-1]._replace(time=time.perf_counter(), waited=self._waited))
        self._reset()
        return metrics


def _metrics(first: _Mark, last: _Mark) -> dict[str, float]:
    spent = last.time - first.time
    if not spent:  # no step yet
        return {}
    tokens = {"train/supervised_tokens_per_second": (last.tokens - first.tokens) / spent} if last.tokens else {}
    return {
        "train/samples_per_second": (last.samples - first.samples) / spent,
        **tokens,
        "train/waiting_for_data": (last.waited - first.waited) / spent,
    }


def memory(device: torch.device) -> dict[str, float]:
    """Return MiB of this process: resident memory of the host, and the peak of tensors on the GPU."""
    used = {"train/memory_host_mib": psutil.Process().memory_info().rss / MIB}
    if device.type == "cuda":
        used["train/memory_device_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return used

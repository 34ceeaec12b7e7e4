"""How fast a training goes, how much of its time it waits, and what memory it holds."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch

MIB = 2**20
RECENT = 50
"""Steps that ``Pace.recent`` looks back over."""


class _Mark(NamedTuple):
    time: float
    waited: float = 0.0
    samples: int = 0
    tokens: int = 0


class Throughput:
    """Counts from its making, or from when it was last taken."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._since = _Mark(time.perf_counter())
        self._steps = deque([self._since], maxlen=RECENT + 1)
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens in here is waiting for data."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked

    def step(self, samples: int, supervised_tokens: int) -> None:
        """Count a step of the global batch. ``supervised_tokens``: 0 for a model without tokens."""
        last = self._steps[-1]
        now = time.perf_counter()
        self._steps.append(_Mark(now, self._waited, last.samples + samples, last.tokens + supervised_tokens))

    def recent(self) -> dict[str, float]:
        """What ``take`` gives, over the last steps only and without beginning anew."""
        return _figures(self._steps[0], self._steps[-1])

    def take(self) -> dict[str, float]:
        """Samples and, if any were counted, supervised tokens per second; the share of time spent waiting for data."""
        taken = _figures(self._since, self._steps[-1]._replace(time=time.perf_counter(), waited=self._waited))
        self._begin()
        return taken


def _figures(first: _Mark, last: _Mark) -> dict[str, float]:
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
    """MiB of this process: what it holds on the host, and the most that its tensors have held on the GPU so far."""
    held = {"train/memory_host_mib": psutil.Process().memory_info().rss / MIB}
    if device.type == "cuda":
        held["train/memory_device_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return held

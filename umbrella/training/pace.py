"""How fast a training goes, and how much of its time it waits."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Counts from its making, or from when it was last taken."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._since = time.perf_counter()
        self._waited, self._samples, self._tokens = 0.0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens in here is waiting for data."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked

    def step(self, samples: int, supervised_tokens: int) -> None:
        """Count a step of the global batch."""
        self._samples += samples
        self._tokens += supervised_tokens

    def take(self) -> dict[str, float]:
        """Samples and supervised tokens per second, and the share of time in which a step had no batch yet."""
        spent = time.perf_counter() - self._since
        taken = {
            "train/samples_per_second": self._samples / spent,
            "train/supervised_tokens_per_second": self._tokens / spent,
            "train/waiting_for_data": self._waited / spent,
        }
        self._begin()
        return taken

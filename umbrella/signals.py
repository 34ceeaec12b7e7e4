"""Handling of SIGTERM in scripts."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from umbrella.base import Stopped


@contextmanager
def on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` at the first SIGTERM in this context. A second one has the effect that it has outside.

    Outside of the main thread, which alone receives signals, it does nothing.

    Raises:
        Stopped: as ``action``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    outcome: list[Stopped] = []

    def handle(*unused: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        try:
            action()
        except Stopped as stopped:
            outcome.append(stopped)
            raise KeyboardInterrupt from None  # Ray loses any other exception while it waits

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except KeyboardInterrupt:
        if outcome:
            raise outcome[0] from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)

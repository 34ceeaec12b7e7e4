"""What a script does when it is asked to end."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from umbrella.base import Stopped


@contextmanager
def on_sigterm(do: Callable[[], None]) -> Iterator[None]:
    """While in here, the first SIGTERM does this; a second one does what it would have done outside.

    Raises:
        Stopped: as ``do``.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return

    outcome: list[Stopped] = []

    def first(*unused: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        try:
            do()
        except Stopped as stopped:
            outcome.append(stopped)
            raise KeyboardInterrupt from None  # any other exception is lost where Ray waits for something

    before = signal.signal(signal.SIGTERM, first)
    try:
        yield
    except KeyboardInterrupt:
        if outcome:
            raise outcome[0] from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)

"""What the machine of a run does, as MLflow's own monitors see it: CPU, memory, disk, network, GPUs."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

INTERVAL = 10.0
"""Seconds between looks, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise."""
WRITE = 60.0
"""Seconds after which they are written though no evaluation comes."""

SYSTEM = "system/"
"""What the names of these metrics begin with."""
Point = tuple[str, float, int, int]
"""Name, value, time in ms, step."""


class Machine(threading.Thread):
    """Looks at the machine from a thread; steps are seconds since the run began.

    MLflow's own thread asks the store at each look whether the run goes on, and ends for good when it has no answer;
    and it makes a database where the process stands, which took more than a second of each trial. This one also sends
    what waits in the outbox, so that a store that is back need not wait for an evaluation.

    Args:
        start: when the run began, ms.
        put, deliver: a tracker's.
    """

    def __init__(self, start: int, put: Callable[[Mapping[str, Any]], None], deliver: Callable[[], None]) -> None:
        super().__init__(name="umbrella-machine", daemon=True)
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # else a line per look
        self.monitors = _monitors()
        self.interval = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or INTERVAL
        self.may_write = False
        """Not before the first evaluation: MLflow's compare page opens with the metric that was written first."""
        self._start_ms, self._put, self._deliver = start, put, deliver
        self._points: list[Point] = []
        self._over = threading.Event()

    def run(self) -> None:
        """Look until ``stop``. What goes wrong in here ends no training: it is met again where that flushes."""
        written = time.monotonic()
        while not self._over.is_set():
            try:
                self._look()
                if self.may_write and time.monotonic() - written >= WRITE:
                    written = time.monotonic()
                    if points := self.taken():
                        self._put({"do": "metrics", "values": points})
                    self._deliver()
            except Exception:
                logging.getLogger(__name__).debug("looking at the machine", exc_info=True)
            self._over.wait(self.interval)

    def taken(self) -> list[Point]:
        """What was seen since this was asked last."""
        points, self._points = self._points, []
        return points

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self.join(timeout=2 * self.interval)

    def _look(self) -> None:
        now = int(time.time() * 1000)
        for monitor in self.monitors:
            monitor.collect_metrics()
            values = monitor.aggregate_metrics()
            monitor.clear_metrics()
            step = max(0, (now - self._start_ms) // 1000)
            self._points += [(f"{SYSTEM}{name}", float(value), now, step) for name, value in values.items()]


def _monitors() -> list[BaseMetricsMonitor]:
    """Those of MLflow's that see something here; GPUs where nvidia-ml-py, or pyrsmi for AMD's, is installed."""
    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        with suppress(Exception):  # there is no such card, or no library for it
            monitors.append(kind())
            break
    return monitors

"""The progress of a training while it runs: lines on the console, which Ray sends to the script, and Ray's gauges."""

import time
from collections.abc import Mapping
from math import nan
from typing import Any

from ray.util.metrics import Gauge

BUILDING, FIRST, FINISHED, STOPPED_EARLY = "building the model", "first step", "finished", "stopped early"
"""States of a training; it ends in one of the last two."""
EVALUATION_GAUGE = "umbrella_evaluation"
"""The gauge of the metrics of the validation split."""
LINE_INTERVAL = 30.0
"""Seconds between two lines of metrics."""
FORMATS = {
    "train/loss": "loss {:.4g}",
    "train/lr": "rate {:.3g}",
    "train/samples_per_second": "{:.3g} samples/s",
    "train/supervised_tokens_per_second": "{:.0f} supervised tokens/s",
    "train/waiting_for_data": "waiting for data {:.0%}",
    "train/memory_device_mib": "GPU peak {:.0f} MiB",
    "train/memory_host_mib": "host {:.0f} MiB",
}


class ProgressLog:
    """Prints the progress of a training, and sets Ray's gauges. Only rank 0 has one.

    Args:
        run, trial: tags of the gauges.
        start_time: of the training, in seconds since 1970.
        every: seconds between two updates of the gauges.
    """

    def __init__(self, run: str, trial: str, start_time: float, every: float = 0.5) -> None:
        self.tags, self.start_time, self.every = {"run": run, "trial": trial}, start_time, every
        self._gauges: dict[str, Gauge] = {}
        self._series: dict[tuple[str, str | None], tuple[Gauge, dict[str, str]]] = {}
        self._updated, self._printed = -every, time.monotonic()
        self._first_step: tuple[float, float] | None = None

    @property
    def due(self) -> bool:
        """Whether ``update`` should be called."""
        return time.monotonic() - self._updated >= self.every

    def seconds_left(self, position: Mapping[str, float]) -> float | None:
        """Estimate the seconds to the end. Call it after each step; it returns None after the first one.

        The estimate starts at the end of the first step, which includes what happens once, such as compilation.

        Args:
            position: step and steps.
        """
        now, step = time.monotonic(), position["step"]
        start, first = self._first_step = self._first_step or (now, step)
        return (now - start) / (step - first) * (position["steps"] - step) if step > first else None

    def print_state(self, state: str, note: str = "") -> None:
        """Print a new state of the training, with a note if there is one."""
        self._print(": ".join(filter(None, (state, note))))

    def update(self, metrics: Mapping[str, float], position: Mapping[str, float | None]) -> None:
        """Update the gauges, and print a line every ``LINE_INTERVAL`` seconds.

        Args:
            metrics: the newest values by their names in MLflow.
            position: step, steps, epoch, and left, the seconds to the end or None.
        """
        self._updated = time.monotonic()
        for name, value in metrics.items():
            self._set(gauge_name(name), f"{name} of a training", float(value))
        if self._updated - self._printed >= LINE_INTERVAL:
            self._print(format_figures(metrics, position))

    def update_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Update the gauge of the validation split, whose tag ``metric`` is the name in MLflow."""
        self._printed = time.monotonic()  # the evaluation prints its own line
        for name, value in metrics.items():
            self._set(EVALUATION_GAUGE, "A metric of the validation split", float(value), metric=name)

    def close(self) -> None:
        """End the curves of the gauges: the process may train again, and would continue them."""
        for gauge, tags in self._series.values():
            gauge.set(nan, tags)

    def _set(self, gauge: str, description: str, value: float, **more: str) -> None:
        tags = self.tags | more
        if gauge not in self._gauges:
            self._gauges[gauge] = Gauge(gauge, description, tuple(tags))
        self._gauges[gauge].set(value, tags)
        self._series[gauge, more.get("metric")] = self._gauges[gauge], tags

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        print(f"{format_duration(time.time() - self.start_time)}  {text}", flush=True)


def gauge_name(metric: str) -> str:
    """Return the name of the gauge of a metric: ``umbrella_loss`` for ``train/loss``."""
    return f"umbrella_{metric.removeprefix('train/')}"


def format_figures(metrics: Mapping[str, float], position: Mapping[str, float | None]) -> str:
    """Format the position and the metrics of a training as one line."""
    figures = [form.format(metrics[name]) for name, form in FORMATS.items() if name in metrics]
    left = [f"{format_duration(position['left'])} left"] if position.get("left") else []
    step = f"step {position['step']}/{position['steps']}"
    return "  ".join([step, f"epoch {position['epoch']:.2f}", *figures, *left])


def format_duration(seconds: float | None) -> str:
    """Format seconds as mm:ss, or h:mm:ss from one hour on."""
    minutes, rest = divmod(int(seconds or 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes:02d}:{rest:02d}"


def progress_line(report: Mapping[str, Any]) -> str:
    """Format the report of an evaluation as one line."""
    wanted = ("train/loss", "train/lr", "train/samples_per_second", "train/waiting_for_data")
    shown = [name for name in report if name in wanted or name.startswith("eval/")]
    values = "  ".join(f"{name.removeprefix('train/')} {report[name]:.4g}" for name in shown)
    return f"step {report['step']}/{report['steps']}  epoch {report['epoch']:.2f}  {values}"

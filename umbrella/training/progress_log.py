"""What a training reports while it runs: lines on its output, which Ray sends to the script, and Ray's gauges."""

import time
from collections.abc import Mapping
from math import nan
from typing import Any

from ray.util.metrics import Gauge

BUILDING, FIRST, FINISHED, STOPPED_EARLY = "building the model", "first step", "finished", "stopped early"
"""States of a training; the last two also are how it ends."""
EVALUATION_GAUGE = "umbrella_evaluation"
"""The gauge of the validation split's metrics."""
LINE = 30.0
"""Seconds between two lines of figures."""
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
    """Prints how far a training is, and sets Ray's gauges. Rank 0 has one.

    Args:
        run, trial: tags of the gauges.
        start_time: when the training began, in seconds since 1970.
        every: seconds between two updates of the gauges.
    """

    def __init__(self, run: str, trial: str, start_time: float, every: float = 0.5) -> None:
        self.tags, self.start_time, self.every = {"run": run, "trial": trial}, start_time, every
        self._gauges: dict[str, Gauge] = {}
        self._drawn: dict[tuple[str, str | None], tuple[Gauge, dict[str, str]]] = {}
        self._updated, self._printed = -every, time.monotonic()
        self._first_step: tuple[float, float] | None = None

    @property
    def due(self) -> bool:
        """Whether it is time for new figures."""
        return time.monotonic() - self._updated >= self.every

    def seconds_left(self, place: Mapping[str, float]) -> float | None:
        """Seconds to the end, to be asked after each step; None after the first one.

        Time is counted from the end of the first step, because what comes before, such as compilation, comes once.

        Args:
            place: step and steps.
        """
        now, step = time.monotonic(), place["step"]
        began, first = self._first_step = self._first_step or (now, step)
        return (now - began) / (step - first) * (place["steps"] - step) if step > first else None

    def say(self, state: str, note: str = "") -> None:
        """Print a new state, and why the training is in it."""
        self._print(": ".join(filter(None, (state, note))))

    def figures(self, metrics: Mapping[str, float], place: Mapping[str, float | None]) -> None:
        """Update the gauges, and print a line every ``LINE`` seconds.

        Args:
            metrics: the newest figures by their names in MLflow.
            place: step, steps, epoch, and left, the seconds to the end, None where it is not known yet.
        """
        self._updated = time.monotonic()
        for name, value in metrics.items():
            self._set(gauge_name(name), f"{name} of a training", float(value))
        if self._updated - self._printed >= LINE:
            self._print(format_figures(metrics, place))

    def evaluation(self, measured: Mapping[str, float]) -> None:
        """Update the gauge of the validation split, whose tag ``metric`` is the name in MLflow."""
        self._printed = time.monotonic()  # the evaluation has a line of its own
        for name, value in measured.items():
            self._set(EVALUATION_GAUGE, "A metric of the validation split", float(value), metric=name)

    def forget(self) -> None:
        """End the lines of the gauges: the process may go on with another training, and would draw them on."""
        for gauge, tags in self._drawn.values():
            gauge.set(nan, tags)

    def _set(self, gauge: str, meaning: str, value: float, **more: str) -> None:
        tags = self.tags | more
        if gauge not in self._gauges:
            self._gauges[gauge] = Gauge(gauge, meaning, tuple(tags))
        self._gauges[gauge].set(value, tags)
        self._drawn[gauge, more.get("metric")] = self._gauges[gauge], tags

    def _print(self, words: str) -> None:
        self._printed = time.monotonic()
        print(f"{format_duration(time.time() - self.start_time)}  {words}", flush=True)


def gauge_name(metric: str) -> str:
    """The gauge of a training's metric: ``train/loss`` is ``umbrella_loss``."""
    return f"umbrella_{metric.removeprefix('train/')}"


def format_figures(metrics: Mapping[str, float], place: Mapping[str, float | None]) -> str:
    """How far a training is and its figures, as one line."""
    figures = [form.format(metrics[name]) for name, form in FORMATS.items() if name in metrics]
    left = [f"{format_duration(place['left'])} left"] if place.get("left") else []
    return "  ".join([f"step {place['step']}/{place['steps']}", f"epoch {place['epoch']:.2f}", *figures, *left])


def format_duration(seconds: float | None) -> str:
    """Seconds as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(int(seconds or 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes:02d}:{rest:02d}"


def progress_line(report: Mapping[str, Any]) -> str:
    """One line on how far a training is."""
    wanted = ("train/loss", "train/lr", "train/samples_per_second", "train/waiting_for_data")
    shown = [name for name in report if name in wanted or name.startswith("eval/")]
    values = "  ".join(f"{name.removeprefix('train/')} {report[name]:.4g}" for name in shown)
    return f"step {report['step']}/{report['steps']}  epoch {report['epoch']:.2f}  {values}"

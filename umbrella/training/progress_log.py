"""The progress of a training while it runs: its throughput, lines on the console, and Ray's gauges."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
from ray.util.metrics import Gauge

if TYPE_CHECKING:
    import torch

BUILDING, FIRST, FINISHED, STOPPED_EARLY = "building the model", "first step", "finished", "stopped early"
"""States of a training; it ends in one of the last two."""
EVALUATION_GAUGE = "umbrella_evaluation"
"""The gauge of the metrics of the validation split."""
MIB = 2**20
RECENT = 50
"""Steps that ``Throughput.recent`` covers."""
UPDATE_INTERVAL = 0.5
"""Seconds between two updates of the gauges."""
LINE_INTERVAL = 30.0
"""Seconds between two lines of metrics."""
SECONDARY = ("/accuracy", "/rmse", "/r")
"""Endings of the metrics of the validation split that are neither printed nor logged to MLflow."""
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
    """Prints the progress of a training, which Ray sends to the script, and sets Ray's gauges. Only rank 0 has one.

    Args:
        run, trial: tags of the gauges.
        start_time: of the training, in seconds since 1970.
    """

    def __init__(self, run: str, trial: str, start_time: float) -> None:
        self.tags, self.start_time = {"run": run, "trial": trial}, start_time
        self._gauges: dict[str, Gauge] = {}
        self._used: dict[tuple[str, ...], dict[str, str]] = {}
        self._updated, self._printed = -UPDATE_INTERVAL, time.monotonic()
        self._first_step: tuple[float, float] | None = None

    @property
    def due(self) -> bool:
        """Whether ``update`` should be called."""
        return time.monotonic() - self._updated >= UPDATE_INTERVAL

    def seconds_left(self, position: Mapping[str, float]) -> float | None:
        """Estimate the seconds to the end. Call it after each step; it returns None after the first one.

        The estimate starts at the end of the first step, which includes what happens once, such as compilation.
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
        for (gauge, *_), tags in self._used.items():
            self._gauges[gauge].set(nan, tags)

    def _set(self, gauge: str, description: str, value: float, **more: str) -> None:
        tags = self.tags | more
        if gauge not in self._gauges:
            self._gauges[gauge] = Gauge(gauge, description, tuple(tags))
        self._gauges[gauge].set(value, tags)
        self._used[gauge, *more.values()] = tags

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
    shown = [n for n in report if n in wanted or (n.startswith("eval/") and not n.endswith(SECONDARY))]
    values = "  ".join(f"{name.removeprefix('train/')} {report[name]:.4g}" for name in shown)
    return f"step {report['step']}/{report['steps']}  epoch {report['epoch']:.2f}  {values}"


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


def memory(device: "torch.device") -> dict[str, float]:
    """Return MiB of this process: resident memory of the host, and the peak of tensors on the GPU."""
    used = {"train/memory_host_mib": psutil.Process().memory_info().rss / MIB}
    if device.type == "cuda":
        import torch  # scripts use this module, and the import takes seconds

        used["train/memory_device_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return used

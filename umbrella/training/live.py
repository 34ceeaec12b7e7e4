"""What a training does at this moment: rank 0 tells, whoever started it reads. Imports little: see ``job``."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from math import nan
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ray.util.metrics import Gauge

from umbrella.storage import put_text
from umbrella.training.filenames import LIVE

STARTING, BUILDING, FIRST, TRAINING = "starting workers", "building the model", "first step", "training"
EVALUATING, FINISHED, EARLY = "evaluating", "finished", "stopped early"
"""States of a training, in their order; the last two also are how it ends."""
EVALUATION = "umbrella_evaluation"
"""The gauge of the validation split's metrics."""


class Live:
    """Tells the state and the newest figures: in a small file of the training's folder, and as Ray's gauges.

    Args:
        run, trial: tags of the gauges.
        every: seconds between two writings of figures; a new state is written at once.
    """

    def __init__(self, folder: str | Path, run: str, trial: str, every: float = 0.5) -> None:
        self.file, self.every = live_file(folder), every
        self.tags = {"run": run, "trial": trial}
        self._gauges: dict[str, Gauge] = {}
        self._drawn: dict[tuple[str, str | None], tuple[Gauge, dict[str, str]]] = {}
        self._told: dict[str, Any] = {}
        self._written = -every

    @property
    def due(self) -> bool:
        """Whether it is time for new figures."""
        return time.monotonic() - self._written >= self.every

    def say(self, state: str, place: Mapping[str, float | None] = MappingProxyType({}), note: str = "") -> None:
        """Tell a new state, how far the training is, and in a note what a person should know of it."""
        self._write({**self._told, **place} | {"state": state, "note": note})

    def figures(self, metrics: Mapping[str, float], place: Mapping[str, float | None]) -> None:
        """Tell the newest figures by their names in MLflow, and how far the training is: step, steps, epoch, left."""
        for name, value in metrics.items():
            self._set(gauge_name(name), f"{name} of a training", float(value))
        self._write({**self._told, **place} | {"state": TRAINING, "note": "", "metrics": dict(metrics)})

    def evaluation(self, measured: Mapping[str, float]) -> None:
        """Tell what an evaluation measured: one gauge, whose tag ``metric`` is the name in MLflow."""
        for name, value in measured.items():
            self._set(EVALUATION, "A metric of the validation split", float(value), metric=name)

    def _set(self, gauge: str, meaning: str, value: float, **more: str) -> None:
        tags = self.tags | more
        if gauge not in self._gauges:
            self._gauges[gauge] = Gauge(gauge, meaning, tuple(tags))
        self._gauges[gauge].set(value, tags)
        self._drawn[gauge, more.get("metric")] = self._gauges[gauge], tags

    def forget(self) -> None:
        """The training has ended: its lines end. The process may go on with another one, and would draw them on."""
        for gauge, tags in self._drawn.values():
            gauge.set(nan, tags)

    def _write(self, told: dict[str, Any]) -> None:
        self._told, self._written = told, time.monotonic()
        with suppress(OSError):  # nothing that a training should end for
            put_text(self.file, json.dumps(told))


def gauge_name(metric: str) -> str:
    """The gauge of a training's metric: ``train/loss`` is ``umbrella_loss``."""
    return f"umbrella_{metric.removeprefix('train/')}"


def live_file(folder: str | Path) -> Path:
    """Where a training with this folder tells what it does."""
    return Path(folder) / LIVE


def read_live(folder: str | Path) -> dict[str, Any]:
    """What a training told last: state, note, metrics, step, steps, epoch, seconds left. Empty before that."""
    try:
        return json.loads(live_file(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}

"""How far a training is, read from its checkpoint folders."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isnan
from pathlib import Path

from umbrella.base import note
from umbrella.paths import METRICS, PROGRESS, SIZES, checkpoints_in

LOSS = "eval/loss"
NOTHING = (-inf, -inf)
"""The ``goodness`` of what was not evaluated."""


@dataclass(frozen=True)
class Progress:
    """Optimizer steps done, the position of the next sample, and by which steps samples are sorted: see ``Plan``.

    best: the best value so far of the metric that decides. since_best: evaluations that came after it, none better.
    epoch: the position in passes over the data.
    """

    step: int = 0
    position: int = 0
    sorted_by: int = 0
    best: float | None = None
    since_best: int = 0
    epoch: float = 0.0

    def evaluated(self, value: float, mode: str) -> "Progress":
        """After an evaluation that gave this value. NaN is never better."""
        sign = 1 if mode == "max" else -1
        if not isnan(value) and (self.best is None or sign * value > sign * self.best):
            return replace(self, best=value, since_best=0)
        return replace(self, since_best=self.since_best + 1)

    def out_of_patience(self, patience: int) -> bool:
        """Whether so many evaluations were no better than the best; never with a patience of 0."""
        return 0 < patience <= self.since_best


def read_progress(folder: str | Path) -> Progress:
    """How far the training of a checkpoint is."""
    return Progress(**json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8")))


def write_files(folder: Path) -> None:
    """List a checkpoint's files with their sizes in bytes; what makes it whole. All of it is on the disk then."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    (folder / SIZES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    for path in [*files, folder / SIZES, folder]:
        to_disk(path)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def what_is_wrong(folder: str | Path) -> str:
    """Why a checkpoint cannot be used: a file is gone or has another size than it was written with. Empty: nothing."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{SIZES} cannot be read: {error.strerror if isinstance(error, OSError) else error}"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is gone"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return ""


def best_checkpoint(folder: str | Path, metric: str, mode: str) -> Path | None:
    """A training's best whole checkpoint, by the metric and then the loss; of equal ones the first.

    One that was written because of SIGTERM, without an evaluation, is never the best.
    """
    found = {path: read_metrics(path) for path in whole_checkpoints(folder)}
    good = {path: goodness(metrics.get(metric), metrics.get(LOSS), mode) for path, metrics in found.items()}
    measured = {path: value for path, value in good.items() if value > NOTHING}
    return max(measured, key=measured.__getitem__, default=None)


def goodness(metric: float | None, loss: float | None, mode: str) -> tuple[float, float]:
    """A key by which evaluations, trials and choices of settings compare, larger is better: the metric, then the loss.

    Args:
        metric, loss: None or NaN if they are not known; that is worse than any number.
        mode: "max" or "min", of the metric.
    """
    sign = 1 if mode == "max" else -1
    known = [-inf if value is None or isnan(value) else value for value in (metric and sign * metric, loss and -loss)]
    return known[0], known[1]


class Best:
    """The best evaluation so far, by its ``goodness``."""

    def __init__(self, metric: str, mode: str) -> None:
        self.metric, self.mode = metric, mode
        self._good = NOTHING

    @classmethod
    def of(cls, training: str | Path, metric: str, mode: str) -> "Best":
        """That of a training's best checkpoint."""
        best, checkpoint = cls(metric, mode), best_checkpoint(training, metric, mode)
        if checkpoint:
            best.news(read_metrics(checkpoint))
        return best

    def news(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics ``best/...`` of an evaluation that is better than all before; empty for another one.

        MLflow's tables and pages know a metric by its last value, and what is kept is the best checkpoint.
        """
        good = goodness(metrics.get(self.metric), metrics.get(LOSS), self.mode)
        if good <= self._good:
            return {}
        self._good = good
        return {f"best/{name}": metrics[name] for name in (self.metric, LOSS) if name in metrics}


def read_metrics(checkpoint: str | Path) -> dict[str, float]:
    """What the evaluation at a checkpoint gave, by the metrics' names."""
    return json.loads((Path(checkpoint) / METRICS).read_text(encoding="utf-8"))


def prune(folder: str | Path, keep: int, metric: str, mode: str) -> None:
    """Delete a training's whole checkpoints but the newest ``keep`` and the best."""
    best = best_checkpoint(folder, metric, mode)
    for path in whole_checkpoints(folder)[:-keep]:
        if path != best:
            delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that nobody finds half of it."""
    nameless = path.with_name(f".{path.name}.deleted")
    path.rename(nameless)
    shutil.rmtree(nameless)


def whole_checkpoints(folder: str | Path) -> list[Path]:
    """A training's checkpoints that can be used, by step."""
    return [path for path in checkpoints_in(folder) if not what_is_wrong(path)]


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a training; newer ones that are not whole are named on standard error."""
    broken = []
    latest = None
    for path in reversed(checkpoints_in(folder)):
        problem = what_is_wrong(path)
        if not problem:
            latest = path
            break
        broken.append(f"{path} cannot be used: {problem}")
    for words in broken:
        note(f"{words}; the training goes on from {latest or 'its start'}")
    return latest

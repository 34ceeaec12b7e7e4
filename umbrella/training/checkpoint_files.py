"""The checkpoints of a training and the history of its evaluations. Scripts and Ray Tune read them without torch."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import inf, isnan
from pathlib import Path
from typing import Any

from umbrella import paths
from umbrella.base import UserError, note
from umbrella.config import Settings
from umbrella.fileio import describe_storage_error, write_atomic
from umbrella.paths import checkpoint_folder, checkpoints_in

LOSS = "eval/loss"
NOT_EVALUATED = (-inf, -inf)
"""The ``ranking_key`` without metric and loss."""


@dataclass(frozen=True)
class TrainingState:
    """The position of a training, as its checkpoints hold it."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Of the next sample in the order of samples."""
    sorted_by: int = 0
    """See ``Plan``."""
    best: float | None = None
    """Best value so far of ``tune.metric``."""
    since_best: int = 0
    """Evaluations since the best one."""
    epoch: float = 0.0
    """Passes over the data done."""

    def evaluated(self, value: float, mode: str) -> "TrainingState":
        """Return the state after an evaluation with this value. NaN is never better."""
        sign = 1 if mode == "max" else -1
        if not isnan(value) and (self.best is None or sign * value > sign * self.best):
            return replace(self, best=value, since_best=0)
        return replace(self, since_best=self.since_best + 1)

    def out_of_patience(self, patience: int) -> bool:
        """Whether the last ``patience`` evaluations were not better than the best. Never with a patience of 0."""
        return 0 < patience <= self.since_best


def read_training_state(checkpoint: str | Path) -> TrainingState:
    """Read the state from a checkpoint."""
    return TrainingState(**json.loads((Path(checkpoint) / paths.PROGRESS).read_text(encoding="utf-8")))


def read_metrics(checkpoint: str | Path) -> dict[str, float]:
    """Read the metrics of the evaluation at a checkpoint."""
    return json.loads((Path(checkpoint) / paths.METRICS).read_text(encoding="utf-8"))


def ranking_key(metric: float | None, loss: float | None, mode: str) -> tuple[float, float]:
    """Return the key by which evaluations, trials and settings compare: the metric, then the loss. Larger is better.

    Args:
        metric, loss: None or NaN if unknown, which is worse than any number.
        mode: "max" or "min", of the metric.
    """
    sign = 1 if mode == "max" else -1
    known = [-inf if value is None or isnan(value) else value for value in (metric and sign * metric, loss and -loss)]
    return known[0], known[1]


def append_evaluation(folder: str | Path, report: Mapping[str, Any]) -> None:
    """Append an evaluation to the history of a training: step, steps, epoch, out_of_patience, and its metrics."""
    with (Path(folder) / paths.HISTORY).open("a", encoding="utf-8") as file:
        print(json.dumps(report), file=file, flush=True)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """Read the evaluations of a training by step; of a repeated step the last. A partly written line is ignored."""
    file = Path(folder) / paths.HISTORY
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n") and line.startswith("{")]
    return sorted({row["step"]: row for row in rows}.values(), key=lambda row: row["step"])


def truncate_history(folder: str | Path, step: int) -> None:
    """Delete the evaluations after a step, from which the training continues: it repeats them."""
    if rows := read_history(folder):
        kept = [f"{json.dumps(row)}\n" for row in rows if row["step"] <= step]
        write_atomic(Path(folder) / paths.HISTORY, "".join(kept))


def mark_complete(folder: Path) -> None:
    """Flush the files of a checkpoint to the disk, and write its completion marker: their sizes in bytes."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    (folder / paths.SIZES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    for path in [*files, folder / paths.SIZES, folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_damage(checkpoint: str | Path) -> str:
    """Describe why a checkpoint cannot be used: a file is missing or has another size. Return "" if it can be used."""
    folder = Path(checkpoint)
    try:
        sizes = json.loads((folder / paths.SIZES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{paths.SIZES} cannot be read: {error.strerror if isinstance(error, OSError) else error}"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return ""


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a training that can be used, by step."""
    return [path for path in checkpoints_in(folder) if not find_damage(path)]


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a training. Newer damaged ones are named on standard error."""
    damage = {path: find_damage(path) for path in checkpoints_in(folder)}
    latest = max((path for path, why in damage.items() if not why), default=None)
    for path, why in damage.items():
        if latest is None or path > latest:
            note(f"{path} cannot be used: {why}; the training continues from {latest or 'its start'}")
    return latest


def best_checkpoint(folder: str | Path, metric: str, mode: str) -> Path | None:
    """Return the best complete checkpoint of a training, by the metric and then the loss; of equal ones the first.

    A checkpoint without an evaluation, which SIGTERM caused, is never the best.
    """
    metrics = {path: read_metrics(path) for path in complete_checkpoints(folder)}
    keys = {path: ranking_key(values.get(metric), values.get(LOSS), mode) for path, values in metrics.items()}
    return max((path for path in keys if keys[path] > NOT_EVALUATED), key=keys.__getitem__, default=None)


def prune(folder: str | Path, keep: int, metric: str, mode: str) -> None:
    """Delete the complete checkpoints of a training except the newest ``keep`` and the best."""
    best = best_checkpoint(folder, metric, mode)
    for path in complete_checkpoints(folder)[:-keep]:
        if path != best:
            delete_checkpoint(path)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that no reader finds part of it."""
    renamed = path.with_name(f".{path.name}.deleted")
    path.rename(renamed)
    shutil.rmtree(renamed)


class CheckpointWriter:
    """Writes the checkpoints of a training in a thread, one at a time, and deletes those that ``prune`` does.

    Args:
        folder: of the training. It must exist; a folder that is lost is not made again.
        files: files that every checkpoint has beside its weights: name to content.
        save_weights: writes weights into a folder.
        code: the versions of the code by name.
    """

    def __init__(
        self,
        folder: str | Path,
        files: Mapping[str, bytes],
        save_weights: Callable[[Path, Mapping[str, Any]], None],
        settings: Settings,
        code: Mapping[str, str],
    ) -> None:
        self.folder, self.settings, self.save_weights = Path(folder), settings, save_weights
        code_json = json.dumps(dict(code), indent=1).encode()
        self.files = {**files, paths.SETTINGS: settings.to_yaml().encode(), paths.CODE: code_json}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        for partial in self.folder.glob(f".{paths.CHECKPOINT}*"):  # of a process that was killed
            shutil.rmtree(partial, ignore_errors=True)

    def write(
        self,
        state: TrainingState,
        metrics: Mapping[str, float],
        weights: Mapping[str, Any],
        tensors: Mapping[str, Any],
        temperatures: Mapping[str, float] = {},
    ) -> None:
        """Start to write a checkpoint, after the previous one is written. Raises as ``wait``.

        Args:
            metrics: of the evaluation at this step.
            weights: tensors by their names in the model.
            tensors: see ``distributed.copy_training_state``.
            temperatures: see ``calibration.fit_temperatures``.
        """
        self.wait()
        values = {paths.METRICS: dict(metrics), paths.PROGRESS: asdict(state), paths.CALIBRATION: dict(temperatures)}
        files = self.files | {name: json.dumps(content).encode() for name, content in values.items()}
        self._pending = self._pool.submit(self._write, state.step, files, weights, tensors)

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            UserError: it could not be written; nothing of it is left.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Wait for the last checkpoint, and print its error: the training may already end with another one."""
        try:
            self.wait()
        except Exception as error:
            note(error)

    def _write(
        self, step: int, files: Mapping[str, bytes], weights: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> None:
        import torch  # takes seconds

        training, tune = self.folder, self.settings.tune
        folder = checkpoint_folder(training, step)
        partial = training / f".{folder.name}.partial"  # in the same folder, so that the rename is atomic
        try:
            partial.mkdir()
            for name, content in files.items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes(content)
            self.save_weights(partial, weights)
            with (partial / paths.STATE).open("wb") as file:  # given a path, torch hides the system's error
                torch.save(dict(tensors), file)
            mark_complete(partial)
            if folder.exists():  # a damaged one
                delete_checkpoint(folder)
            partial.replace(folder)
            _fsync(training)
            prune(training, self.settings.resources.keep_checkpoints, tune.metric, tune.mode)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)  # it may fill the disk
            problem = describe_storage_error(error)
            if not problem:
                raise
            gone = "" if training.is_dir() else f"{training} is gone: "
            raise UserError(f"{folder} could not be written: {gone}{problem}") from None

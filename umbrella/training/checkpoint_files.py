"""The checkpoint folders of a training: write, check, find and delete them."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella import paths
from umbrella.base import UserError, note
from umbrella.config import Settings
from umbrella.fileio import describe_storage_error
from umbrella.paths import METRICS, SIZES, checkpoint_folder, checkpoints_in
from umbrella.training.training_state import LOSS, NOT_EVALUATED, ranking_key

if TYPE_CHECKING:  # scripts and Ray Tune look for checkpoints without torch, whose import takes seconds
    import torch

    from umbrella.training.checkpoint import Snapshot


def mark_complete(folder: Path) -> None:
    """Flush the files of a checkpoint to the disk, and write its completion marker: their sizes in bytes."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    (folder / SIZES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    for path in [*files, folder / SIZES, folder]:
        fsync(path)


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_damage(folder: str | Path) -> str:
    """Describe why a checkpoint cannot be used: a file is missing or has another size. Return "" if it can be used."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{SIZES} cannot be read: {error.strerror if isinstance(error, OSError) else error}"
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
    damaged = []
    latest = None
    for path in reversed(checkpoints_in(folder)):
        damage = find_damage(path)
        if not damage:
            latest = path
            break
        damaged.append(f"{path} cannot be used: {damage}")
    for text in damaged:
        note(f"{text}; the training continues from {latest or 'its start'}")
    return latest


def best_checkpoint(folder: str | Path, metric: str, mode: str) -> Path | None:
    """Return the best complete checkpoint of a training, by the metric and then the loss; of equal ones the first.

    A checkpoint without an evaluation, which SIGTERM caused, is never the best.
    """
    metrics = {path: read_metrics(path) for path in complete_checkpoints(folder)}
    keys = {path: ranking_key(values.get(metric), values.get(LOSS), mode) for path, values in metrics.items()}
    return max((path for path in keys if keys[path] > NOT_EVALUATED), key=keys.__getitem__, default=None)


def read_metrics(checkpoint: str | Path) -> dict[str, float]:
    """Read the metrics of the evaluation at a checkpoint."""
    return json.loads((Path(checkpoint) / METRICS).read_text(encoding="utf-8"))


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
        code: see ``code_versions``.
    """

    def __init__(
        self,
        folder: str | Path,
        files: Mapping[str, bytes],
        save_weights: Callable[[Path, Mapping[str, "torch.Tensor"]], None],
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

    def write(self, snapshot: "Snapshot") -> None:
        """Start to write a checkpoint, after the previous one is written. Raises as ``wait``."""
        self.wait()
        self._pending = self._pool.submit(self._write, snapshot)

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

    def _write(self, snapshot: "Snapshot") -> None:
        import torch

        training, tune = self.folder, self.settings.tune
        folder = checkpoint_folder(training, snapshot.state.step)
        partial = training / f".{folder.name}.partial"  # in the same folder, so that the rename is atomic
        try:
            partial.mkdir()
            for name, content in self.files.items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes(content)
            self.save_weights(partial, snapshot.weights)
            state = {"optimizer": snapshot.optimizer, "schedule": snapshot.schedule, "rng": list(snapshot.rng)}
            with (partial / paths.STATE).open("wb") as file:  # given a path, torch hides the system's error
                torch.save(state, file)
            (partial / METRICS).write_text(json.dumps(dict(snapshot.metrics)), encoding="utf-8")
            (partial / paths.PROGRESS).write_text(json.dumps(asdict(snapshot.state)), encoding="utf-8")
            mark_complete(partial)
            if folder.exists():  # a damaged one
                delete_checkpoint(folder)
            os.replace(partial, folder)
            fsync(training)
            prune(training, self.settings.resources.keep_checkpoints, tune.metric, tune.mode)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)  # it may fill the disk
            problem = describe_storage_error(error)
            if not problem:
                raise
            gone = "" if training.is_dir() else f"{training} is gone: "
            raise UserError(f"{folder} could not be written: {gone}{problem}") from None

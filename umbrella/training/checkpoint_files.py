"""The checkpoint folders of a training: written by a thread, checked, found, and deleted."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella.base import UserError, note
from umbrella.config import Settings
from umbrella.fileio import describe_storage_error
from umbrella.paths import (
    CHECKPOINT,
    CODE,
    METRICS,
    PROGRESS,
    SETTINGS,
    SIZES,
    STATE,
    checkpoint_folder,
    checkpoints_in,
)
from umbrella.training.training_state import LOSS, NOT_EVALUATED, ranking_key

if TYPE_CHECKING:  # the script and Ray Tune look for checkpoints without torch, whose import takes seconds
    import torch

    from umbrella.training.checkpoint import Snapshot


def mark_complete(folder: Path) -> None:
    """List a checkpoint's files with their sizes in bytes; what makes it whole. All of it is on the disk then."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    (folder / SIZES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    for path in [*files, folder / SIZES, folder]:
        fsync(path)


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_damage(folder: str | Path) -> str:
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
    found = {path: read_metrics(path) for path in complete_checkpoints(folder)}
    good = {path: ranking_key(metrics.get(metric), metrics.get(LOSS), mode) for path, metrics in found.items()}
    measured = {path: value for path, value in good.items() if value > NOT_EVALUATED}
    return max(measured, key=measured.__getitem__, default=None)


def read_metrics(checkpoint: str | Path) -> dict[str, float]:
    """What the evaluation at a checkpoint gave, by the metrics' names."""
    return json.loads((Path(checkpoint) / METRICS).read_text(encoding="utf-8"))


def prune(folder: str | Path, keep: int, metric: str, mode: str) -> None:
    """Delete a training's whole checkpoints but the newest ``keep`` and the best."""
    best = best_checkpoint(folder, metric, mode)
    for path in complete_checkpoints(folder)[:-keep]:
        if path != best:
            delete_checkpoint(path)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that nobody finds half of it."""
    nameless = path.with_name(f".{path.name}.deleted")
    path.rename(nameless)
    shutil.rmtree(nameless)


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """A training's checkpoints that can be used, by step."""
    return [path for path in checkpoints_in(folder) if not find_damage(path)]


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a training; newer ones that are not whole are named on standard error."""
    broken = []
    latest = None
    for path in reversed(checkpoints_in(folder)):
        problem = find_damage(path)
        if not problem:
            latest = path
            break
        broken.append(f"{path} cannot be used: {problem}")
    for words in broken:
        note(f"{words}; the training goes on from {latest or 'its start'}")
    return latest


class CheckpointWriter:
    """Writes a training's checkpoints, one at a time, in a thread; keeps the newest ones and the best.

    Args:
        folder: the training's. It has to be there: one that vanished is not made again.
        files: files that every checkpoint has, beside its weights: name to content.
        save_weights: writes weights into a folder.
        code: what runs, see ``code_of``.
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
        self.files = {**files, SETTINGS: settings.to_yaml().encode(), CODE: json.dumps(dict(code), indent=1).encode()}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        delete_partial_checkpoints(self.folder)

    def write(self, taken: "Snapshot") -> None:
        """Begin to write a checkpoint, once the one before is there. Raises as ``wait``."""
        self.wait()
        self._last = self._pool.submit(self._write, taken)

    def wait(self) -> None:
        """Wait until the last checkpoint is there.

        Raises:
            UserError: it could not be written, which left nothing of it; says why.
        """
        last, self._last = self._last, None
        if last:
            last.result()

    def close(self) -> None:
        """Wait for the last checkpoint on the way out of a training that ends with an error of its own."""
        try:
            self.wait()
        except Exception as error:
            note(error)

    def _write(self, taken: "Snapshot") -> None:
        """Write a checkpoint: whole, or nothing of it. Older ones go, see ``prune``."""
        import torch

        training = self.folder
        folder = checkpoint_folder(training, taken.progress.step)
        # Beside it, so that giving it its name is one step of one file system.
        partial = training / f".{folder.name}.partial"
        try:
            partial.mkdir()
            for name, content in self.files.items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes(content)
            self.save_weights(partial, taken.weights)
            with (partial / STATE).open("wb") as file:  # given a path, torch hides what the system says
                torch.save({"optimizer": taken.optimizer, "schedule": taken.schedule, "rng": list(taken.rng)}, file)
            (partial / METRICS).write_text(json.dumps(dict(taken.metrics)), encoding="utf-8")
            (partial / PROGRESS).write_text(json.dumps(asdict(taken.progress)), encoding="utf-8")
            mark_complete(partial)
            if folder.exists():  # one that was found broken
                delete_checkpoint(folder)
            os.replace(partial, folder)
            fsync(training)
            tune = self.settings.tune
            prune(training, self.settings.resources.keep_checkpoints, tune.metric, tune.mode)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)  # there must be room again for who looks into it
            problem = describe_storage_error(error)
            if not problem:
                raise
            gone = "" if training.is_dir() else f"{training} is gone: "
            raise UserError(f"{folder} could not be written: {gone}{problem}") from None


def delete_partial_checkpoints(training: Path) -> None:
    """Delete what a process that was killed had begun to write."""
    for rest in training.glob(f".{CHECKPOINT}*"):
        shutil.rmtree(rest, ignore_errors=True)

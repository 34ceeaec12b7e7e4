"""A training's checkpoint folders, written by a thread while the training goes on."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from umbrella.base import UserError, note
from umbrella.config import Settings
from umbrella.paths import CHECKPOINT, CODE, METRICS, PROGRESS, SETTINGS, STATE, checkpoint_folder
from umbrella.storage import storage_fault
from umbrella.training.checkpoint import Snapshot
from umbrella.training.checkpoint_files import delete, prune, to_disk, write_files


class Writer:
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
        save_weights: Callable[[Path, Mapping[str, torch.Tensor]], None],
        settings: Settings,
        code: Mapping[str, str],
    ) -> None:
        self.folder, self.settings, self.save_weights = Path(folder), settings, save_weights
        self.files = {**files, SETTINGS: settings.to_yaml().encode(), CODE: json.dumps(dict(code), indent=1).encode()}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        remove_rests(self.folder)

    def write(self, taken: Snapshot) -> None:
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

    def _write(self, taken: Snapshot) -> None:
        """Write a checkpoint: whole, or nothing of it. Older ones go, see ``prune``."""
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
            write_files(partial)
            if folder.exists():  # one that was found broken
                delete(folder)
            os.replace(partial, folder)
            to_disk(training)
            tune = self.settings.tune
            prune(training, self.settings.resources.keep_checkpoints, tune.metric, tune.mode)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)  # there must be room again for who looks into it
            problem = storage_fault(error)
            if not problem:
                raise
            gone = "" if training.is_dir() else f"{training} is gone: "
            raise UserError(f"{folder} could not be written: {gone}{problem}") from None


def remove_rests(training: Path) -> None:
    """Delete what a process that was killed had begun to write."""
    for rest in training.glob(f".{CHECKPOINT}*"):
        shutil.rmtree(rest, ignore_errors=True)

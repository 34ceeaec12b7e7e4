"""A training's checkpoint folders, written by a thread while the training goes on."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from umbrella.base import UserError, note
from umbrella.config import SETTINGS, Settings
from umbrella.model.partial import describe_base, is_whole, write_weights
from umbrella.model.umbrella_llava import ADAPTER, BASE, UmbrellaForConditionalGeneration
from umbrella.storage import storage_fault
from umbrella.training.checkpoint import CODE, STATE, Snapshot
from umbrella.training.progress import (
    METRICS,
    PROGRESS,
    Progress,
    checkpoint_folder,
    delete,
    prune,
    to_disk,
    write_files,
)


class Writer:
    """Writes a training's checkpoints, one at a time, in a thread; keeps the newest ones and the best.

    Args:
        folder: the training's. It has to be there: one that vanished is not made again.
        code: what runs, see ``code_of``.
    """

    def __init__(
        self,
        folder: str | Path,
        model: UmbrellaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        code: Mapping[str, str],
    ) -> None:
        self.folder, self.settings, self.whole = Path(folder), settings, is_whole(settings.model)
        self.files = _description(model, tokenizer, settings, code)
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
        def fill(folder: Path) -> None:
            for name, content in self.files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
            write_weights(folder, taken.weights, self.whole)
            save_state({"optimizer": taken.optimizer, "schedule": taken.schedule, "rng": list(taken.rng)}, folder)

        write_checkpoint(self.folder, fill, taken.progress, taken.metrics, self.settings)


def write_checkpoint(
    training: Path, fill: Callable[[Path], None], progress: Progress, metrics: Mapping[str, float], settings: Settings
) -> None:
    """Write a checkpoint into a training's folder: whole, or nothing of it. Older ones go, see ``prune``.

    Args:
        fill: puts into a folder what is the model's own.

    Raises:
        UserError: the storage is full, read-only or gone.
    """
    folder = checkpoint_folder(training, progress.step)
    # Beside it, so that giving it its name is one step of one file system.
    partial = training / f".{folder.name}.partial"
    try:
        partial.mkdir()
        fill(partial)
        (partial / METRICS).write_text(json.dumps(dict(metrics)), encoding="utf-8")
        (partial / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        write_files(partial)
        if folder.exists():  # one that was found broken
            delete(folder)
        os.replace(partial, folder)
        to_disk(training)
        prune(training, settings.resources.keep_checkpoints, settings.tune.metric, settings.tune.mode)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)  # there must be room again for who looks into it
        problem = storage_fault(error)
        if not problem:
            raise
        gone = "" if training.is_dir() else f"{training} is gone: "
        raise UserError(f"{folder} could not be written: {gone}{problem}") from None


def save_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write what a training needs to go on."""
    with (folder / STATE).open("wb") as file:  # given a path, torch hides what the system says
        torch.save(state, file)


def remove_rests(training: Path) -> None:
    """Delete what a process that was killed had begun to write."""
    for rest in training.glob(".step_*"):
        shutil.rmtree(rest, ignore_errors=True)


def _description(
    model: UmbrellaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    code: Mapping[str, str],
) -> dict[str, bytes]:
    """The files that all checkpoints of a training have alike. Made once: no thread may use model or tokenizer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = (
            [UmbrellaForConditionalGeneration.__name__],
            "float32",
        )  # sharded, it has another name
        config.save_pretrained(folder)
        if model.generation_config:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if model.has_adapters:
            (adapters,) = model.peft_config.values()
            adapters.save_pretrained(str(folder / ADAPTER))
        if not is_whole(settings.model):
            (folder / BASE).write_text(describe_base(settings.model.checkpoint), encoding="utf-8")
        (folder / SETTINGS).write_text(settings.to_yaml(), encoding="utf-8")
        (folder / CODE).write_text(json.dumps(dict(code), indent=1), encoding="utf-8")
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

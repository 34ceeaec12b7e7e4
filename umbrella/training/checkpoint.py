"""A training's checkpoint folders: what a step leaves is copied by the loop, and written by a thread."""

import copy
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from umbrella import __version__
from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.model.partial import BASE, check_base, describe_base, is_partial, is_whole, put_weights, write_weights
from umbrella.model.umbrella_llava import ADAPTER, UmbrellaForConditionalGeneration
from umbrella.storage import storage_fault
from umbrella.training.parallel import gathered
from umbrella.training.progress import METRICS, PROGRESS, Progress, delete, prune, read_progress, to_disk, write_files

STATE, SETTINGS, CODE = "state.pt", "settings.yaml", "code.json"
PACKAGES = ("torch", "transformers", "peft", "ray")


@dataclass(frozen=True)
class Snapshot:
    """What a step leaves, in memory that no later step changes."""

    weights: Mapping[str, torch.Tensor]
    """By the names of the model's parameters."""
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    rng: Sequence[torch.Tensor]
    """The state of each worker's random numbers, by rank."""
    progress: Progress
    metrics: Mapping[str, float]
    """Of the evaluation at this step."""


def snapshot(
    model: torch.nn.Module,
    names: Sequence[str],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress,
    metrics: Mapping[str, float] | None = None,
    keep: bool = True,
) -> Snapshot:
    """Copy what resuming, scoring and generating need, to this machine's memory. Every worker has to call this.

    Args:
        names: the parameters to copy, see ``model.partial.names_to_write``.
        keep: whether this worker wants the weights and the optimizer's state; one of them writes.
    """
    return Snapshot(
        weights_of(model, names, keep),
        optimizer_state(optimizer, keep),
        _copied(schedule.state_dict(), True),
        gathered(rng_state()),
        progress,
        dict(metrics or {}),
    )


def weights_of(model: torch.nn.Module, names: Sequence[str], keep: bool) -> dict[str, torch.Tensor]:
    """Copies of the model's parameters of these names; empty ones unless they are kept."""
    wanted = set(names)
    return {name: _copied(w, keep) for name, w in model.named_parameters() if name in wanted}


def optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """A copy of the optimizer's state, with empty tensors unless it is kept."""
    return _copied(optimizer.state_dict(), keep)


def _copied(value: Any, keep: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True) if keep else torch.empty(0)
    if isinstance(value, dict):
        return {key: _copied(item, keep) for key, item in value.items()}
    return [_copied(item, keep) for item in value] if isinstance(value, list) else value


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
        for rest in self.folder.glob(".step_*"):  # of a process that was killed
            shutil.rmtree(rest, ignore_errors=True)

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
            print(f"note: {error}", file=sys.stderr)

    def _write(self, taken: Snapshot) -> None:
        folder = self.folder / f"step_{taken.progress.step:07d}"
        # Beside it, so that giving it its name is one step of one file system.
        partial = self.folder / f".{folder.name}.partial"
        try:
            partial.mkdir()
            for name, content in self.files.items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes(content)
            write_weights(partial, taken.weights, self.whole)
            state = {"optimizer": taken.optimizer, "schedule": taken.schedule, "rng": list(taken.rng)}
            with (partial / STATE).open("wb") as file:  # given a path, torch hides what the system says
                torch.save(state, file)
            (partial / METRICS).write_text(json.dumps(dict(taken.metrics)), encoding="utf-8")
            (partial / PROGRESS).write_text(json.dumps(asdict(taken.progress)), encoding="utf-8")
            write_files(partial)
            if folder.exists():  # one that was found broken
                delete(folder)
            os.replace(partial, folder)
            to_disk(self.folder)
            tune = self.settings.tune
            prune(self.folder, self.settings.resources.keep_checkpoints, tune.metric, tune.mode)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)  # there must be room again for who looks into it
            problem = storage_fault(error)
            if not problem:
                raise
            gone = "" if self.folder.is_dir() else f"{self.folder} is gone: "
            raise UserError(f"{folder} could not be written: {gone}{problem}") from None


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
        config.architectures, config.dtype = [type(model).__name__], "float32"
        config.save_pretrained(folder)
        if model.generation_config:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if getattr(model, "_hf_peft_config_loaded", False):
            (adapters,) = model.peft_config.values()
            adapters.save_pretrained(str(folder / ADAPTER))
        if not is_whole(settings.model):
            (folder / BASE).write_text(describe_base(settings.model.checkpoint), encoding="utf-8")
        (folder / SETTINGS).write_text(settings.to_yaml(), encoding="utf-8")
        (folder / CODE).write_text(json.dumps(dict(code), indent=1), encoding="utf-8")
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def restore(
    folder: str | Path,
    model: torch.nn.Module,
    names: Sequence[str],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rank: int = 0,
) -> Progress:
    """Put a checkpoint's weights and states in place, and this worker's random numbers where they were.

    A worker that the checkpoint has no random numbers of keeps its own.

    Args:
        names: the parameters that must be in it, as for ``snapshot``.

    Raises:
        UserError: it does not fit, or the base that it stands on is another one now.
    """
    folder = Path(folder)
    if is_partial(folder):
        check_base(folder)
    put_weights(folder, model, names)
    state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if rank < len(state["rng"]):
        set_rng_state(state["rng"][rank])
    return read_progress(folder)


def code_of(commit: Mapping[str, str]) -> dict[str, str]:
    """What runs here, by name: ``commit`` (see ``tracking.code_version``) and the versions of Python and packages."""
    own = {"umbrella": __version__, "python": python_version()}
    return {**commit, **own, **{name: version(name) for name in PACKAGES}}


def other_code(folder: str | Path, code: Mapping[str, str]) -> str:
    """How the code that wrote a checkpoint differs from ``code``; empty if it does not."""
    file = Path(folder) / CODE
    then = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    names = [name for name in {**then, **code} if then.get(name) != code.get(name)]
    return ", ".join(f"{name} was {then.get(name, 'unknown')} and is {code.get(name, 'unknown')}" for name in names)


def rng_state() -> torch.Tensor:
    """The state of this process's random numbers in training: torch's on the CPU, and on the GPU if there is one."""
    states = [torch.get_rng_state()]
    return torch.cat([*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states)


def set_rng_state(state: torch.Tensor) -> None:
    """Put ``rng_state`` back."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size])
    if len(state) > size and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[size:])

"""A checkpoint folder: the model as transformers saves it, the training's state, and how far it is."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.parallel import put_state, put_weights, whole_state, whole_weights
from umbrella.training.progress import METRICS, PROGRESS, Progress, read_progress, write_files

STATE, SETTINGS = "state.pt", "settings.yaml"


def save_checkpoint(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress,
    settings_yaml: str,
    rng: Sequence[torch.Tensor] = (),
    metrics: Mapping[str, float] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    state_of_optimizer: Mapping[str, Any] | None = None,
) -> None:
    """Write everything that resuming, scoring and generating need. The folder appears whole, or not at all.

    Args:
        rng: the state of each worker's random numbers, by rank; see ``rng_state``.
        metrics: of the evaluation at this step.
        weights: see ``parallel.whole_weights``. To be given where weights are sharded, which takes every worker.
        state_of_optimizer: see ``parallel.whole_state``; likewise.
    """
    folder = Path(folder)
    # Beside it, so that giving it its name is one step of one file system.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial, state_dict=whole_weights(model) if weights is None else weights)
    tokenizer.save_pretrained(partial)
    moments = whole_state(optimizer) if state_of_optimizer is None else state_of_optimizer
    state = {"optimizer": moments, "schedule": schedule.state_dict(), "rng": list(rng)}
    torch.save(state, partial / STATE)
    (partial / SETTINGS).write_text(settings_yaml, encoding="utf-8")
    (partial / METRICS).write_text(json.dumps(dict(metrics or {})), encoding="utf-8")
    (partial / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
    write_files(partial)
    if folder.exists():  # one that was found broken
        shutil.rmtree(folder)
    os.replace(partial, folder)


def restore(
    folder: str | Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rank: int = 0,
) -> Progress:
    """Put a checkpoint's weights and states in place, and this worker's random numbers where they were.

    A worker that the checkpoint has no random numbers of keeps its own.
    """
    folder = Path(folder)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    put_weights(model, loaded.state_dict())
    state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    put_state(optimizer, state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if rank < len(state["rng"]):
        set_rng_state(state["rng"][rank])
    return read_progress(folder)


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

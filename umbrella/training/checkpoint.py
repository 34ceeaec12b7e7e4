"""The state of a training in a checkpoint: copied after a step, and restored."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from umbrella.paths import CODE, STATE
from umbrella.training.distributed import all_gather_object, full_tensor, load_optimizer_state
from umbrella.training.training_state import TrainingState
from umbrella.version import __version__

PACKAGES = ("torch", "transformers", "peft", "ray")


@dataclass(frozen=True)
class Snapshot:
    """The state after a step, in memory that no later step changes."""

    weights: Mapping[str, torch.Tensor]
    """By their names in the model."""
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    rng: Sequence[torch.Tensor]
    """The state of each worker's random numbers, by rank."""
    progress: TrainingState
    metrics: Mapping[str, float]
    """Of the evaluation at this step."""


def snapshot(
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    progress: TrainingState,
    metrics: Mapping[str, float] | None = None,
    keep: bool = True,
) -> Snapshot:
    """Copy what resuming needs to this machine's memory. Every worker has to call this.

    Args:
        weights: copies of the weights, see ``copy_to_host``.
        keep: whether this worker wants the optimizer's state; one of them writes.
    """
    return Snapshot(
        weights,
        optimizer_state(optimizer, keep),
        _copy_to_host(schedule.state_dict(), True),
        all_gather_object(rng_state()),
        progress,
        dict(metrics or {}),
    )


def copy_to_host(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Copy tensors to this machine's memory; empty ones unless they are kept. Every worker has to call this."""
    return {name: _copy_to_host(tensor, keep) for name, tensor in tensors.items()}


def optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """A copy of the optimizer's state, with empty tensors unless it is kept."""
    return _copy_to_host(optimizer.state_dict(), keep)


def _copy_to_host(value: Any, keep: bool) -> Any:
    if isinstance(value, torch.Tensor):
        full = full_tensor(value)  # of sharded ones, every worker sends its part
        return full.to("cpu", copy=True) if keep else torch.empty(0)
    if isinstance(value, dict):
        return {key: _copy_to_host(item, keep) for key, item in value.items()}
    return [_copy_to_host(item, keep) for item in value] if isinstance(value, list) else value


def restore(
    folder: str | Path,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rank: int = 0,
) -> None:
    """Put a checkpoint's states in place, and this worker's random numbers where they were.

    A worker that the checkpoint has no random numbers of keeps its own.
    """
    state = torch.load(Path(folder) / STATE, weights_only=True, map_location="cpu")
    load_optimizer_state(optimizer, state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if rank < len(state["rng"]):
        set_rng_state(state["rng"][rank])


def code_versions(commit: Mapping[str, str]) -> dict[str, str]:
    """Name to version of the code: ``commit`` (see ``tracking.code_version``), Python and packages."""
    own = {"umbrella": __version__, "python": python_version()}
    return {**commit, **own, **{name: version(name) for name in PACKAGES}}


def describe_code_changes(folder: str | Path, code: Mapping[str, str]) -> str:
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

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
    """The state after a step, in memory that later steps do not change."""

    weights: Mapping[str, torch.Tensor]
    """By their names in the model."""
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    rng: Sequence[torch.Tensor]
    """The state of the random number generators of each rank."""
    state: TrainingState
    metrics: Mapping[str, float]
    """Of the evaluation at this step."""


def snapshot(
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    state: TrainingState,
    metrics: Mapping[str, float] | None = None,
    keep: bool = True,
) -> Snapshot:
    """Copy the state of a training to the memory of the host. It is collective.

    Args:
        weights: copies of the weights, see ``copy_to_host``.
        keep: whether this rank needs the optimizer's state; only the rank that writes the checkpoint does.
    """
    return Snapshot(
        weights,
        copy_to_host(optimizer.state_dict(), keep),
        copy_to_host(schedule.state_dict()),
        all_gather_object(rng_state()),
        state,
        dict(metrics or {}),
    )


def copy_to_host(value: Any, keep: bool = True) -> Any:
    """Copy tensors, also in nested dictionaries and lists, to the memory of the host. It is collective.

    Args:
        keep: whether this rank needs the tensors; otherwise it gets empty ones.
    """
    if isinstance(value, torch.Tensor):
        full = full_tensor(value)  # every rank contributes its part of a sharded tensor
        return full.to("cpu", copy=True) if keep else torch.empty(0)
    if isinstance(value, dict):
        return {key: copy_to_host(item, keep) for key, item in value.items()}
    return [copy_to_host(item, keep) for item in value] if isinstance(value, list) else value


def restore(
    folder: str | Path,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rank: int = 0,
) -> None:
    """Restore optimizer, schedule and random number generators from a checkpoint.

    A rank that did not exist when the checkpoint was written keeps its random numbers.
    """
    state = torch.load(Path(folder) / STATE, weights_only=True, map_location="cpu")
    load_optimizer_state(optimizer, state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if rank < len(state["rng"]):
        set_rng_state(state["rng"][rank])


def code_versions(commit: Mapping[str, str]) -> dict[str, str]:
    """Return the versions of the code by name.

    Args:
        commit: see ``tracking.provenance.code_version``.
    """
    own = {"umbrella": __version__, "python": python_version()}
    return {**commit, **own, **{name: version(name) for name in PACKAGES}}


def describe_code_changes(folder: str | Path, code: Mapping[str, str]) -> str:
    """Describe how ``code`` differs from the code that wrote a checkpoint. Return "" if it does not."""
    file = Path(folder) / CODE
    then = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    names = [name for name in {**then, **code} if then.get(name) != code.get(name)]
    return ", ".join(f"{name} was {then.get(name, 'unknown')} and is {code.get(name, 'unknown')}" for name in names)


def rng_state() -> torch.Tensor:
    """Return the state of torch's random number generators: on the CPU, then on the GPU if there is one."""
    states = [torch.get_rng_state()]
    return torch.cat([*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states)


def set_rng_state(state: torch.Tensor) -> None:
    """Restore what ``rng_state`` returned."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size])
    if len(state) > size and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[size:])

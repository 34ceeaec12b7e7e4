"""What a training's checkpoint holds: copied from a step, and put back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from umbrella import __version__
from umbrella.model.partial import check_base, is_partial, put_weights
from umbrella.training.parallel import gathered, put, put_state, whole
from umbrella.training.progress import Progress, read_progress

STATE, CODE = "state.pt", "code.json"
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
        full = whole(value)  # of sharded ones, every worker sends its part
        return full.to("cpu", copy=True) if keep else torch.empty(0)
    if isinstance(value, dict):
        return {key: _copied(item, keep) for key, item in value.items()}
    return [_copied(item, keep) for item in value] if isinstance(value, list) else value


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
    put_weights(folder, model, names, put)
    state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    put_state(optimizer, state["optimizer"])
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

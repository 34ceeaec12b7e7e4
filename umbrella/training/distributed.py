"""Data-parallel and sharded models, collective operations between ranks, and the state of a training on all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from umbrella.base import UserError
from umbrella.fileio import describe_storage_error
from umbrella.paths import STATE


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks: (0, 1) without a process group."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def parallelise(model: Any, device: torch.device, world_size: int, shard: bool = False) -> nn.Module:
    """Move a model to ``device`` and average its gradients over the ranks, which must have equal weights.

    Args:
        shard: whether a language model is sharded in place (FSDP2), layer by layer from the memory of the host, so that
            no device ever holds all of it. Its parameters become other objects: build the optimizer afterwards.
    """
    if world_size > 1 and shard:
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # The rest is one group, gathered once per forward pass. A vision tower sharded by layers would be gathered once
        # per modality of a batch, and ranks whose batches differ in modalities would deadlock.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return model
    model.to(device)
    return model if world_size == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)


def autocast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the autocast context of a dtype; it does nothing for float32."""
    # Its cache keeps a half-precision copy of every trained weight until the forward pass ends. Sharded weights must
    # not be kept: they are gathered one layer at a time.
    cached = not isinstance(model, FSDPModule)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cached)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, gathered if it is sharded, detached. It is collective."""
    own = tensor.detach()
    return own.full_tensor() if isinstance(own, DTensor) else own


@torch.no_grad()
def copy_into_shard(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full tensor, the same on every rank, into a weight that may be sharded."""
    weight.copy_(_shard_like(weight, value))


def _shard_like(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Shard a tensor as a weight is; each rank takes its part of its own copy."""
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


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


def copy_training_state(
    optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, keep: bool = True
) -> dict[str, Any]:
    """Copy optimizer, schedule and the random number generators of all ranks. It is collective.

    Args:
        keep: whether this rank needs the copy; only the rank that writes the checkpoint does.

    Returns:
        The content of ``state.pt`` in a checkpoint, in memory that later steps do not change.
    """
    rng = torch.get_rng_state()
    if torch.cuda.is_available():
        rng = torch.cat([rng, torch.cuda.get_rng_state()])
    optimizer_state, schedule_state = copy_to_host(optimizer.state_dict(), keep), copy_to_host(schedule.state_dict())
    return {"optimizer": optimizer_state, "schedule": schedule_state, "rng": all_gather_object(rng)}


def restore_training_state(
    folder: str | Path,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rank: int = 0,
) -> None:
    """Restore what ``copy_training_state`` copied from a checkpoint, written with any number of ranks.

    A rank that did not exist when the checkpoint was written keeps its random numbers.
    """
    state = torch.load(Path(folder) / STATE, weights_only=True, map_location="cpu")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, of_weight in state["optimizer"]["state"].items():
        for name, value in of_weight.items():
            if isinstance(value, torch.Tensor) and value.ndim:  # it has the shape of the weight, unlike the step count
                of_weight[name] = _shard_like(weights[number], value)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if rank < len(state["rng"]):
        own, size = state["rng"][rank], len(torch.get_rng_state())
        torch.set_rng_state(own[:size])
        if len(own) > size and torch.cuda.is_available():
            torch.cuda.set_rng_state(own[size:])


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all ranks, by rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast(number: int, device: torch.device) -> int:
    """Return the number of rank 0. It takes less than a millisecond, so it can be called in every step."""
    if not distributed.is_initialized():
        return number
    tensor = torch.tensor(number, device=device)
    distributed.broadcast(tensor, 0)
    return int(tensor)


class ErrorOnAllRanks(UserError):
    """An error of one rank, raised on all ranks at the same point."""


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise an error of one rank on all ranks, so that none waits for a rank that has failed. It is collective.

    Raises:
        ErrorOnAllRanks: a UserError of one rank, or its storage cannot be written or read.
    """
    problem = ""
    try:
        yield
    except Exception as error:
        problem = str(error) if isinstance(error, UserError) else describe_storage_error(error)
        if not problem:
            raise
    if first := next(filter(None, all_gather_object(problem)), None):
        raise ErrorOnAllRanks(first)

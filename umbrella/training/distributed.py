"""Data-parallel and sharded models, and collective operations between the ranks of a training."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from umbrella.base import UserError
from umbrella.fileio import describe_storage_error
from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.settings import TrainSettings


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks: (0, 1) without a process group."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def seed_worker(seed: int, rank: int) -> None:
    """Give each rank its own random numbers. Call it after the model is made, whose weights are the same on all."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank)).generate_state(1)[0]))


def parallelise(
    model: UmbrellaForConditionalGeneration, settings: TrainSettings, device: torch.device, world_size: int
) -> nn.Module:
    """Move a model to ``device`` and average its gradients over the ranks, which must have equal weights.

    With ``settings.shard`` the model is sharded in place (FSDP2), layer by layer from the memory of the host, so that
    no device ever holds all of it. Its parameters become other objects: build the optimizer afterwards.
    """
    if world_size > 1 and settings.shard:
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # The rest is one group, gathered once per forward pass. A vision tower sharded by layers would be gathered once
        # per modality of a batch, and ranks whose batches differ in modalities would deadlock.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return model
    return data_parallel(model, device, world_size)


def data_parallel(model: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    """Move a model to ``device`` and average its gradients over the ranks, which must have equal weights."""
    model.to(device)
    return model if world_size == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)


def data_parallel_size(model: nn.Module) -> int:
    """Return the number of ranks that average the gradients of a model; 1 for a model that is not parallel."""
    return distributed.get_world_size() if isinstance(model, (DistributedDataParallel, FSDPModule)) else 1


def no_sync(model: nn.Module) -> AbstractContextManager[Any]:
    """Accumulate gradients without averaging them, until a backward pass outside of this context.

    Sharded models always average: otherwise every rank would hold the whole gradient.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def autocast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the autocast context of a dtype; it does nothing for float32."""
    # Its cache keeps a half-precision copy of every trained weight until the forward pass ends. Sharded weights must
    # not be kept: they are gathered one layer at a time.
    cached = not isinstance(model, FSDPModule)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cached)


def reshard(model: nn.Module) -> None:
    """Free the weights that forward passes without a backward pass have gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, gathered if it is sharded, detached. It is collective."""
    own = tensor.detach()
    return own.full_tensor() if isinstance(own, DTensor) else own


@torch.no_grad()
def copy_into_shard(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full tensor, the same on every rank, into a weight that may be sharded."""
    weight.copy_(_shard_like(weight, value))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state with full tensors, saved with any number of ranks, into an optimizer that may be sharded."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    by_weight = {
        number: {k: _shard_like(weights[number], v) if _is_moment(v) else v for k, v in of_weight.items()}
        for number, of_weight in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": by_weight})


def _is_moment(value: Any) -> bool:
    """Whether a value has the shape of a weight, unlike the step count."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _shard_like(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Shard a tensor as a weight is; each rank takes its part of its own copy."""
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all ranks, by rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return the value of rank ``source``."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values, source)
    return values[0]


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
    except UserError as error:
        problem = str(error)
    except Exception as error:
        problem = describe_storage_error(error)
        if not problem:
            raise
    first = next(filter(None, all_gather_object(problem)), None)
    if first:
        raise ErrorOnAllRanks(first)

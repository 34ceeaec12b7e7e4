"""The workers of one training: how they share a model's work and its weights, and what they say to each other."""

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
from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.settings import TrainSettings


def rank_and_world_size() -> tuple[int, int]:
    """This worker's rank, and how many workers there are. A training in the process of a trial has one worker."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def seed_worker(seed: int, rank: int) -> None:
    """From here on a worker has random numbers of its own: until then all have the same, and so the same weights."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank)).generate_state(1)[0]))


def parallelise(
    model: UmbrellaForConditionalGeneration, settings: TrainSettings, device: torch.device, workers: int
) -> nn.Module:
    """The model on ``device``, its gradients averaged over the workers; the same weights must be on each of them.

    With ``settings.shard`` the model is sharded in place (FSDP2), from the CPU's memory a layer at a time, so that a
    device never holds it whole. Its weights become other objects: ask for them, and build the optimizer, afterwards.
    """
    if workers > 1 and settings.shard:
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # All else is one group, gathered once a forward pass: a tower sharded by layers would be gathered once for each
        # modality in a batch, and workers whose batches differ in modalities would wait for each other for ever.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return model
    return data_parallel(model, device, workers)


def data_parallel(model: nn.Module, device: torch.device, workers: int) -> nn.Module:
    """The model on ``device``, its gradients averaged over the workers; the same weights must be on each of them."""
    model.to(device)
    if workers == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def data_parallel_size(model: nn.Module) -> int:
    """How many workers average the gradients of this model: 1 where it is not parallel."""
    return distributed.get_world_size() if isinstance(model, (DistributedDataParallel, FSDPModule)) else 1


def no_sync(model: nn.Module) -> AbstractContextManager[Any]:
    """In here gradients are added up on each worker alone, to be averaged with those of a later backward pass.

    Not where weights are sharded: their gradients would be held whole on every worker.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def autocast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Arithmetic in ``dtype``; nothing for float32."""
    # Its cache keeps a copy in half precision of every weight that moves until the forward pass ends: none of sharded
    # ones, which are there a layer at a time.
    cached = not isinstance(model, FSDPModule)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cached)


def reshard(model: nn.Module) -> None:
    """After forward passes without a backward pass: let go of the weights that they have gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded, detached. Every worker must ask, in the same order."""
    own = tensor.detach()
    return own.full_tensor() if isinstance(own, DTensor) else own


@torch.no_grad()
def copy_into_shard(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor, the same on every worker, into a weight that may be sharded."""
    weight.copy_(_shard_like(weight, value))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """``load_state_dict`` of a state with whole tensors, taken with any number of workers: see ``checkpoint``."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    by_weight = {
        number: {k: _shard_like(weights[number], v) if _is_moment(v) else v for k, v in of_weight.items()}
        for number, of_weight in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": by_weight})


def _is_moment(value: Any) -> bool:
    """Of a weight's shape, in contrast to a count of steps."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _shard_like(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value sharded as the weight is; each worker takes its part of what it has."""
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def all_gather_object(own: Any) -> list[Any]:
    """Every worker's, by rank, on each of them."""
    if not distributed.is_initialized():
        return [own]
    everyones: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyones, own)
    return everyones


def broadcast_object(own: Any, rank: int) -> Any:
    """That of the worker of this rank, on each of them."""
    if not distributed.is_initialized():
        return own
    message = [own]
    distributed.broadcast_object_list(message, rank)
    return message[0]


def broadcast(number: int, device: torch.device) -> int:
    """The first worker's number, on each of them. Takes under a millisecond, so it may be asked every step."""
    if not distributed.is_initialized():
        return number
    message = torch.tensor(number, device=device)
    distributed.broadcast(message, 0)
    return int(message)


class ErrorOnAllRanks(UserError):
    """What ended the work of one worker, raised on all of them at the same place."""


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """What ends the work in here on one worker, ends it on all: none waits for one that is gone. Each has to enter.

    Raises:
        Agreed: what one of them met: a UserError, or storage that cannot be written or read.
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
    for everyones in all_gather_object(problem):
        if everyones:
            raise ErrorOnAllRanks(everyones)

"""The workers of one training: how they share a model's work and its weights, and what they say to each other."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.settings import TrainSettings


def parallelise(
    model: UmbrellaForConditionalGeneration, settings: TrainSettings, device: torch.device, workers: int
) -> nn.Module:
    """The model on ``device``, its gradients averaged over the workers; the same weights must be on each of them.

    With ``settings.shard`` the model is sharded in place (FSDP2), from the CPU's memory a layer at a time, so that a
    device never holds it whole. Its weights become other objects: ask for them, and build the optimizer, afterwards.
    """
    if workers > 1 and settings.shard:
        mesh = init_device_mesh(device.type, (workers,))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # All else is one group, gathered once a forward pass: a tower sharded by layers would be gathered once for each
        # modality in a batch, and workers whose batches differ in modalities would wait for each other for ever.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return model
    model.to(device)
    if workers == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def workers_of(model: nn.Module) -> int:
    """How many workers average the gradients of this model: 1 where it is not parallel."""
    return distributed.get_world_size() if isinstance(model, (DistributedDataParallel, FSDPModule)) else 1


def apart(model: nn.Module) -> AbstractContextManager[Any]:
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


def release(model: nn.Module) -> None:
    """After forward passes without a backward pass: let go of the weights that they have gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded, detached. Every worker must ask, in the same order."""
    own = tensor.detach()
    return own.full_tensor() if isinstance(own, DTensor) else own


@torch.no_grad()
def put(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor, the same on every worker, into a weight that may be sharded."""
    weight.copy_(_like(weight, value))


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """``state_dict`` with every weight whole, in the CPU's memory where they were sharded; ties stay ties.

    Every worker must ask; all but the first get an empty one.
    """
    seen: dict[int, torch.Tensor | None] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in seen:
            seen[id(tensor)] = _collected(tensor)
    return {name: kept for name, tensor in state.items() if (kept := seen[id(tensor)]) is not None}


@torch.no_grad()
def put_weights(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy what ``whole_weights`` gave, here or with another number of workers, into the model.

    Raises:
        KeyError: a weight has no value.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        put(tensor, values[name])


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``state_dict`` with every tensor whole, in the CPU's memory where they were sharded.

    Every worker must ask; what all but the first get is not for use.
    """
    state = optimizer.state_dict()
    by_weight = {
        number: {k: _collected(v) if isinstance(v, torch.Tensor) else v for k, v in of_weight.items()}
        for number, of_weight in state["state"].items()
    }
    return state | {"state": by_weight}


def put_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """``load_state_dict`` of what ``whole_state`` gave, here or with another number of workers."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    by_weight = {
        number: {k: _like(weights[number], v) if _is_moment(v) else v for k, v in of_weight.items()}
        for number, of_weight in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": by_weight})


def _collected(tensor: torch.Tensor) -> torch.Tensor | None:
    """The whole tensor on the first worker, None on the others: one host may not hold it as often as it has GPUs."""
    full = whole(tensor)
    if distributed.is_initialized() and distributed.get_rank() > 0:
        return None
    return full.cpu() if isinstance(tensor, DTensor) else full


def _is_moment(value: Any) -> bool:
    """Of a weight's shape, in contrast to a count of steps."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _like(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value sharded as the weight is; each worker takes its part of what it has."""
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def gathered(own: Any) -> list[Any]:
    """Every worker's, by rank, on each of them."""
    if not distributed.is_initialized():
        return [own]
    everyones: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyones, own)
    return everyones


def told(own: Any, rank: int) -> Any:
    """That of the worker of this rank, on each of them."""
    if not distributed.is_initialized():
        return own
    message = [own]
    distributed.broadcast_object_list(message, rank)
    return message[0]


def agreed(number: int, device: torch.device) -> int:
    """The first worker's number, on each of them. Takes under a millisecond, so it may be asked every step."""
    if not distributed.is_initialized():
        return number
    message = torch.tensor(number, device=device)
    distributed.broadcast(message, 0)
    return int(message)

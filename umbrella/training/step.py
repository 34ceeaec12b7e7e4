"""The loss of a global batch, and one optimizer step. It needs no Ray, so it runs in a test or a notebook too."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import inf, isfinite
from statistics import median
from types import MappingProxyType

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from umbrella.data.batching import Batch
from umbrella.training.distributed import all_gather_object, autocast, full_tensor, rank_and_world_size
from umbrella.training.optimizer import main_lr

MAX_NAMED = 10
"""Samples that a message names; the others are counted."""
LOSS_WINDOW, FIRST_STEPS = 50, 10
"""Steps of which ``max_loss`` takes the median, and steps at the start without a limit."""


def max_loss(losses: Sequence[float], ratio: float) -> float:
    """Return the largest loss that the next step may have, in nats.

    Args:
        losses: of the last ``LOSS_WINDOW`` steps.
        ratio: see ``train.max_loss_ratio``.
    """
    if not ratio or len(losses) < FIRST_STEPS:
        return inf
    # A nearly perfect model that gets one answer wrong has many times its usual loss, which is no divergence.
    return ratio * max(1.0, median(losses))


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    clip: float = 1.0,
    parts: Mapping[str, Sequence[nn.Parameter]] = MappingProxyType({}),
    dtype: torch.dtype = torch.float32,
    limit: float = inf,
) -> dict[str, float]:
    """Make one step with the gradient of Σ weight·nll / Σ weight over the global batch.

    The global batch is all micro-batches of all ranks. However it is split, the loss is the same.

    Args:
        model: on the device of the batches; with several ranks the result of ``distributed.parallelise``.
        batches: the micro-batches of this rank.
        clip: largest norm of the whole gradient.
        parts: names of parts of the model to their weights, for the gradient norm of each part.
        dtype: of the arithmetic in the forward pass.
        limit: largest loss, in nats; see ``max_loss``.

    Returns:
        train/loss, in nats; train/supervised_tokens, the targets in the global batch; train/grad_norm before clipping,
        also by part; train/lr, the learning rate that ``optim.lr`` sets.

    Raises:
        FloatingPointError: the loss or its gradient is not finite, or the loss is over the limit. It is raised on every
            rank, with the samples of all ranks that cause it. Nothing is changed.
    """
    weights = [b.loss_weights if b.weights_of_samples is None else b.weights_of_samples for b in batches]
    divisor, targets = loss_totals(weights)
    _, world_size = rank_and_world_size()
    total = torch.zeros((), device=batches[0].input_ids.device)
    for i, batch in enumerate(batches):
        # Sharded models always average: otherwise every rank would hold the whole gradient.
        waits = i < len(batches) - 1
        with model.no_sync() if waits and isinstance(model, DistributedDataParallel) else nullcontext():
            share = _weighted_nll(model, batch, dtype) / divisor
            (share * world_size).backward()  # the ranks average their gradients, and the loss needs the sum
        total += share.detach()
    if world_size > 1:
        distributed.all_reduce(total)
    trained_parts = {name: weights for name, weights in parts.items() if any(w.requires_grad for w in weights)}
    by_part = [_gradient_norm(weights, total) for weights in trained_parts.values()]
    trained = [w for group in optimizer.param_groups for w in group["params"]]
    total_norm = _gradient_norm(trained, total)
    nn.utils.clip_grads_with_norm_(trained, clip, total_norm)
    # One transfer for all: each transfer waits for the GPU.
    loss, norm, *norms = torch.stack([total, total_norm, *by_part]).tolist()
    if not (isfinite(loss) and isfinite(norm) and loss <= limit):
        optimizer.zero_grad()
        names = _diverged_samples(model, batches, trained, divisor, dtype, limit)
        named = ", ".join(names[:MAX_NAMED]) or "none by itself"
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        over = f", over the {limit:.4g} that train.max_loss_ratio allows," if loss > limit else ""
        raise FloatingPointError(
            f"the loss is {loss:.4g}{over} and the norm of its gradient {norm:.4g}; samples concerned: {named}{more}"
        )
    metrics = {"train/loss": loss, "train/lr": main_lr(optimizer), "train/grad_norm": norm}
    metrics |= {f"train/grad_norm/{part}": norm for part, norm in zip(trained_parts, norms, strict=True)}
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return metrics | {"train/supervised_tokens": int(targets)}


def loss_totals(loss_weights: list[torch.Tensor]) -> torch.Tensor:
    """Return Σ weight, the divisor of the loss, and the number of targets of the global batch: (2,), float64.

    The first token of a row is never a target, because no token precedes it. It is collective.

    Args:
        loss_weights: (B, L) of each micro-batch of this rank; or of its samples, if they share prefixes.
    """
    targets = [weights[:, 1:].double() for weights in loss_weights]
    total = torch.stack([torch.stack([weights.sum(), (weights != 0).sum()]) for weights in targets]).sum(0)
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return total


def _weighted_nll(model: nn.Module, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Return Σ weight·nll over a micro-batch."""
    with autocast(model, batch.input_ids.device, dtype):
        token_nll = model(**batch.model_inputs()).token_nll
    return (token_nll * batch.loss_weights).sum()


def _gradient_norm(weights: Sequence[nn.Parameter], like: torch.Tensor) -> torch.Tensor:
    """Return the norm of the gradient, of sharded weights over all ranks. It is collective."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return full_tensor(nn.utils.get_total_norm(gradients)) if gradients else torch.zeros_like(like)


def _diverged_samples(
    model: nn.Module,
    batches: Sequence[Batch],
    trained: Sequence[nn.Parameter],
    divisor: torch.Tensor,
    dtype: torch.dtype,
    limit: float,
) -> list[str]:
    """Return the task ids of the samples of all ranks that diverge, each in a forward and backward pass of its own.

    In a packed row the NaN of one sample spreads to all. All ranks make each pass, with the sample of one of them,
    because the passes of sharded and parallel models are collective.
    """
    device, (rank, _) = divisor.device, rank_and_world_size()
    own = [(batch, i) for batch in batches for i in range(len(batch))]
    diverged: list[str] = []
    for source, count in enumerate(all_gather_object(len(own))):
        for number in range(count):
            batch, i = own[number] if source == rank else (None, 0)
            sample = all_gather_object(batch[i].to("cpu") if batch else None)[source].to(device)
            nll = _weighted_nll(model, sample, dtype)
            (nll / divisor).backward()
            norm = _gradient_norm(trained, nll)
            for weight in trained:
                weight.grad = None
            mean = nll.detach() / sample.loss_weights[:, 1:].sum()
            if not (torch.isfinite(norm) and torch.isfinite(mean) and mean <= limit):
                diverged += sample.task_ids
    return list(dict.fromkeys(diverged))

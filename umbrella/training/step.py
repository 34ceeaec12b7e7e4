"""The loss of a global batch, and one optimizer step. It needs no Ray, so it runs in a test or a notebook too."""

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf, isfinite
from statistics import median

import torch
from torch import distributed, nn

from umbrella.data.batching import Batch
from umbrella.training.distributed import (
    all_gather_object,
    autocast,
    broadcast_object,
    data_parallel_size,
    full_tensor,
    no_sync,
    rank_and_world_size,
)
from umbrella.training.optimizer import lr_by_group, main_lr

MAX_NAMED = 10
"""Samples that a message names; the others are counted."""


class Diverged(FloatingPointError):
    """The loss or its gradient is not finite, or the loss is over its limit.

    Args:
        what: the loss and the norm of its gradient.
        samples: task ids of the samples that cause it.
    """

    def __init__(self, what: str, samples: Sequence[str] = ()) -> None:
        super().__init__(what, samples)
        self.what, self.samples = what, tuple(samples)

    def __str__(self) -> str:
        more = f" and {len(self.samples) - MAX_NAMED} more" if len(self.samples) > MAX_NAMED else ""
        return f"{self.what}; samples concerned: {', '.join(self.samples[:MAX_NAMED]) or 'none of this worker'}{more}"


@dataclass(frozen=True)
class StepResult:
    """The numbers of one optimizer step."""

    loss: float
    """Weighted mean over the targets of the global batch, in nats."""
    supervised_tokens: int
    """Targets in the global batch."""
    grad_norm: float
    grad_norm_by_part: dict[str, float]
    lr: float
    """The learning rate that ``optim.lr`` sets."""
    lr_by_group: dict[str, float]
    """See ``optimizer.build_optimizer``."""


class LossWatch:
    """The largest loss that is allowed: ``ratio`` times the median of the last losses, and at least ``ratio`` nats.

    Args:
        ratio: 0 for no limit.
        window: losses that the median covers.
        first: steps at the start without a limit.
    """

    def __init__(self, ratio: float, window: int = 50, first: int = 10) -> None:
        self.ratio, self.first = ratio, first
        self._losses: deque[float] = deque(maxlen=window)

    @property
    def limit(self) -> float:
        """The largest loss of the next step, in nats."""
        if not self.ratio or len(self._losses) < self.first:
            return inf
        # A nearly perfect model that gets one answer wrong has many times its usual loss, which is no divergence.
        return self.ratio * max(1.0, median(self._losses))

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        self._losses.append(loss)


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    clip: float,
    parts: Mapping[str, Sequence[nn.Parameter]],
    dtype: torch.dtype = torch.float32,
    limit: float = inf,
) -> StepResult:
    """Make one step with the gradient of Σ weight·nll / Σ weight over the global batch.

    The global batch is all micro-batches of all ranks. However it is split, the loss is the same.

    Args:
        model: on the device of the batches; with several ranks the result of ``distributed.parallelise``.
        batches: the micro-batches of this rank.
        clip: largest norm of the whole gradient.
        parts: names of parts of the model to their weights, for the gradient norm of each part.
        dtype: of the arithmetic in the forward pass.
        limit: largest loss, in nats; see ``LossWatch``.

    Raises:
        Diverged: the loss or its gradient is not finite, or the loss is over the limit. It is raised on every rank,
            with the samples of that rank that cause it. Nothing is changed.
    """
    divisor, targets = loss_totals([batch.loss_weights for batch in batches])
    world_size = data_parallel_size(model)
    total = torch.zeros((), device=batches[0].input_ids.device)
    for i, batch in enumerate(batches):
        with nullcontext() if i == len(batches) - 1 else no_sync(model):
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
        samples = _diverged_samples(model, batches, trained, divisor, dtype, limit)
        over = f", over the {limit:.4g} that train.max_loss_ratio allows," if loss > limit else ""
        raise Diverged(f"the loss is {loss:.4g}{over} and the norm of its gradient {norm:.4g}", samples)
    lr, by_group = main_lr(optimizer), lr_by_group(optimizer)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return StepResult(loss, int(targets), norm, dict(zip(trained_parts, norms, strict=True)), lr, by_group)


def loss_totals(loss_weights: list[torch.Tensor]) -> torch.Tensor:
    """Return Σ weight, the divisor of the loss, and the number of targets of the global batch: (2,), float64.

    The first token of a row is never a target, because no token precedes it. It is collective.

    Args:
        loss_weights: (B, L) of each micro-batch of this rank.
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
    """Return the task ids of the samples of this rank that diverge, each in a forward and backward pass of its own.

    In a packed row the NaN of one sample spreads to all. All ranks make each pass, with the sample of one of them,
    because the passes of sharded and parallel models are collective.
    """
    device, (rank, _) = divisor.device, rank_and_world_size()
    own = [(batch, i) for batch in batches for i in range(len(batch))]
    diverged: list[str] = []
    for source, count in enumerate(all_gather_object(len(own))):
        for number in range(count):
            batch, i = own[number] if source == rank else (None, 0)
            sample = broadcast_object(batch[i].to("cpu") if batch else None, source).to(device)
            nll = _weighted_nll(model, sample, dtype)
            (nll / divisor).backward()
            norm = _gradient_norm(trained, nll)
            for weight in trained:
                weight.grad = None
            mean = nll.detach() / sample.loss_weights[:, 1:].sum()
            if source == rank and not (torch.isfinite(norm) and torch.isfinite(mean) and mean <= limit):
                diverged += sample.task_ids
    return list(dict.fromkeys(diverged))

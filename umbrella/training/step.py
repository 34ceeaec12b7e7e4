"""One optimizer step. No Ray here: it runs alone in a test or a notebook."""

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
)
from umbrella.training.optimizer import lr_by_group, main_lr

NAMED = 10
"""Samples that a message names; more are counted."""


class Diverged(FloatingPointError):
    """The loss or its gradient is not finite, or the loss is over its limit. ``samples``: the task ids concerned."""

    def __init__(self, what: str, samples: Sequence[str] = ()) -> None:
        super().__init__(what, samples)
        self.what, self.samples = what, tuple(samples)

    def __str__(self) -> str:
        more = f" and {len(self.samples) - NAMED} more" if len(self.samples) > NAMED else ""
        return f"{self.what}; samples concerned: {', '.join(self.samples[:NAMED]) or 'none of this worker'}{more}"


@dataclass(frozen=True)
class StepResult:
    """What a step did: the loss (nats, a weighted mean over the global batch's targets), gradient norms, counts.

    lr: the rate that ``optim.lr`` sets. lr_by_group: every group's own, see ``optimizer.build_optimizer``.
    """

    loss: float
    supervised_tokens: int
    grad_norm: float
    grad_norm_by_part: dict[str, float]
    lr: float
    lr_by_group: dict[str, float]


class LossWatch:
    """What loss a step may have: ``ratio`` times the median of the last ones, and ``ratio`` nats in any case.

    The first steps, and all of them with a ratio of 0, may have any.
    """

    def __init__(self, ratio: float, window: int = 50, first: int = 10) -> None:
        self.ratio, self.first = ratio, first
        self._losses: deque[float] = deque(maxlen=window)

    @property
    def limit(self) -> float:
        """The largest loss, in nats, of the next step."""
        if not self.ratio or len(self._losses) < self.first:
            return inf
        # One answer that a nearly perfect model gets wrong is many times its usual loss, and nothing to stop for.
        return self.ratio * max(1.0, median(self._losses))

    def add(self, loss: float) -> None:
        """Take note of a step's loss."""
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
    """Accumulate the gradient of Σ weight·nll / Σ weight over all batches of all workers, clip it, and step.

    Args:
        model: on the batches' device; made by ``distributed.parallelise`` where there are several workers.
        batches: this worker's micro-batches of one global batch.
        clip: largest norm of the whole gradient.
        parts: names of parts of the model to their weights, whose gradient norms are wanted.
        dtype: arithmetic of the forward pass.
        limit: largest loss, in nats; see ``LossWatch``.

    Raises:
        Diverged: the loss or its gradient is not finite, or the loss is over the limit, on every worker alike; each
            names those of its own samples that are so alone. Nothing was changed.
    """
    divisor, targets = loss_totals([batch.loss_weights for batch in batches])
    # Gradients are averaged over workers; the quotient wants their sum.
    workers = data_parallel_size(model)
    total = torch.zeros((), device=batches[0].input_ids.device)
    for i, batch in enumerate(batches):
        with nullcontext() if i == len(batches) - 1 else no_sync(model):
            share = _weighted_nll(model, batch, dtype) / divisor
            (share * workers).backward()
        total += share.detach()
    if workers > 1:
        distributed.all_reduce(total)
    moving = {name: weights for name, weights in parts.items() if any(w.requires_grad for w in weights)}
    by_part = [_gradient_norm(weights, total) for weights in moving.values()]
    trained = [w for group in optimizer.param_groups for w in group["params"]]
    total_norm = _gradient_norm(trained, total)
    nn.utils.clip_grads_with_norm_(trained, clip, total_norm)
    # Read in one go: each reading waits for the GPU.
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
    return StepResult(loss, int(targets), norm, dict(zip(moving, norms, strict=True)), lr, by_group)


def loss_totals(loss_weights: list[torch.Tensor]) -> torch.Tensor:
    """Σ weight, the divisor of the global batch's loss, and the number of its targets: (2,), float64.

    Over every micro-batch of every worker. A row's first token is never a target: nothing stands before it.
    """
    targets = [weights[:, 1:].double() for weights in loss_weights]
    total = torch.stack([torch.stack([weights.sum(), (weights != 0).sum()]) for weights in targets]).sum(0)
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return total


def _weighted_nll(model: nn.Module, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Σ weight·nll over a micro-batch."""
    with autocast(model, batch.input_ids.device, dtype):
        token_nll = model(**batch.model_inputs()).token_nll
    return (token_nll * batch.loss_weights).sum()


def _gradient_norm(weights: Sequence[nn.Parameter], like: torch.Tensor) -> torch.Tensor:
    """Over all workers' parts of the weights. Every worker must ask."""
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
    """Task ids of this worker's samples that are not finite, or over the limit, when each is alone in its batch.

    In a shared row one sample's NaN is everyone's, so each has a pass of its own. All workers make it together: the
    passes of one alone would leave it waiting for weights or gradients of the others.
    """
    device, rank = divisor.device, distributed.get_rank() if distributed.is_initialized() else 0
    own = [(batch, i) for batch in batches for i in range(len(batch))]
    blamed: list[str] = []
    for of, count in enumerate(all_gather_object(len(own))):
        for number in range(count):
            batch, i = own[number] if of == rank else (None, 0)
            sample = broadcast_object(batch[i].to("cpu") if batch else None, of).to(device)
            nll = _weighted_nll(model, sample, dtype)
            (nll / divisor).backward()
            norm = _gradient_norm(trained, nll)
            for weight in trained:
                weight.grad = None
            mean = nll.detach() / sample.loss_weights[:, 1:].sum()
            if of == rank and not (torch.isfinite(norm) and torch.isfinite(mean) and mean <= limit):
                blamed += sample.task_ids
    return list(dict.fromkeys(blamed))

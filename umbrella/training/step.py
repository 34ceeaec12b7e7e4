"""One optimizer step. No Ray here: it runs alone in a test or a notebook."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from umbrella.data.batching import Batch
from umbrella.training.loss import totals, weighted_nll


@dataclass(frozen=True)
class StepResult:
    """What a step did: the loss (nats, a weighted mean over the global batch's targets), gradient norms, counts."""

    loss: float
    supervised_tokens: int
    grad_norm: float
    grad_norm_by_part: dict[str, float]
    lr: float


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    clip: float,
    parts: Mapping[str, Sequence[nn.Parameter]],
    dtype: torch.dtype = torch.float32,
) -> StepResult:
    """Accumulate the gradient of Σ weight·nll / Σ weight over all batches of all workers, clip it, and step.

    Args:
        model: on the batches' device; wrapped in DistributedDataParallel where there are several workers.
        batches: this worker's micro-batches of one global batch.
        clip: largest norm of the whole gradient.
        parts: names of parts of the model to their weights, whose gradient norms are wanted.
        dtype: arithmetic of the forward pass.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; nothing was changed.
    """
    divisor, targets = totals([batch.loss_weights for batch in batches])
    parallel = isinstance(model, DistributedDataParallel)
    # DistributedDataParallel averages gradients over workers; the quotient wants their sum.
    workers = torch.distributed.get_world_size() if parallel else 1
    device = batches[0].input_ids.device
    loss = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        synchronise = nullcontext() if not parallel or i == len(batches) - 1 else model.no_sync()  # type: ignore[operator]
        with synchronise:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                token_nll = model(**batch.model_inputs()).token_nll
            share = weighted_nll(token_nll, batch.loss_weights) / divisor
            (share * workers).backward()
        loss += share.detach()
    if parallel:
        torch.distributed.all_reduce(loss)
    by_part = {name: _norm(weights) for name, weights in parts.items() if any(w.requires_grad for w in weights)}
    trained = [w for group in optimizer.param_groups for w in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        optimizer.zero_grad()
        raise FloatingPointError(f"the loss is {loss.item()} and the norm of its gradient {norm.item()}")
    lr = optimizer.param_groups[0]["lr"]
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return StepResult(loss.item(), int(targets), norm.item(), by_part, lr)


def _norm(weights: Sequence[nn.Parameter]) -> float:
    grads = [weight.grad for weight in weights if weight.grad is not None]
    return torch.nn.utils.get_total_norm(grads).item() if grads else 0.0

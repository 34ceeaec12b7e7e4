"""The loss of a global batch: one quotient, however the batch is split."""

import torch
from torch import distributed


def weighted_nll(token_nll: torch.Tensor, loss_weights: torch.Tensor) -> torch.Tensor:
    """Σ weight·nll over a micro-batch, both (B, L)."""
    return (token_nll * loss_weights).sum()


def totals(loss_weights: list[torch.Tensor]) -> torch.Tensor:
    """Σ weight, the divisor of the global batch's loss, and the number of its targets: (2,), float64.

    Over every micro-batch of every worker. A row's first token is never a target: nothing stands before it.
    """
    targets = [weights[:, 1:].double() for weights in loss_weights]
    total = torch.stack([torch.stack([weights.sum(), (weights != 0).sum()]) for weights in targets]).sum(0)
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return total

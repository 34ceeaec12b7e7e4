"""The loss of a global batch: one quotient, however the batch is split."""

import torch
from torch import distributed


def weighted_nll(token_nll: torch.Tensor, loss_weights: torch.Tensor) -> torch.Tensor:
    """Σ weight·nll over a micro-batch, both (B, L)."""
    return (token_nll * loss_weights).sum()


def total_weight(loss_weights: list[torch.Tensor]) -> torch.Tensor:
    """Σ weight over every micro-batch of every worker: the divisor of the global batch's loss, one number.

    A row's first token is never a target: nothing stands before it.
    """
    total = torch.stack([weights[:, 1:].sum() for weights in loss_weights]).sum()
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return total

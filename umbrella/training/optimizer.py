"""AdamW with parameter groups, and the schedule of its rate."""

from math import cos, pi

import torch
from torch import nn

from umbrella.training.settings import OptimSettings


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over what is trained: matrices decay; norms, biases and positions do not."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    decayed = [w for name, w in trained if w.ndim >= 2 and "position" not in name]
    kept = [w for name, w in trained if w.ndim < 2 or "position" in name]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95))


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimSettings, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate over ``steps`` optimizer steps, as a share of its peak: linear warm-up, then the settings' schedule."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, settings, steps))


def rate_factor(step: int, settings: OptimSettings, steps: int) -> float:
    """The share of the peak rate at a step: cosine falls to a tenth, linear to zero, constant stays."""
    warmup = min(settings.warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if settings.schedule == "cosine":
        return 0.1 + 0.9 * 0.5 * (1 + cos(pi * done))
    return 1 - done if settings.schedule == "linear" else 1.0

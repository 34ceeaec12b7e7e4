"""AdamW with parameter groups, and the schedule of the learning rates."""

from math import cos, pi
from typing import Any

import torch

from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.settings import OptimSettings


def build_optimizer(model: UmbrellaForConditionalGeneration, settings: OptimSettings) -> torch.optim.AdamW:
    """Build AdamW for the trained weights. Matrices decay; norms, biases, positions and the class token do not.

    Parameter groups have a ``name``: "embedder" or "rest", which may have different learning rates, and "decayed" or
    "kept", as in "embedder.kept". ``lr`` is the current rate of a group, ``initial_lr`` the peak that a schedule adds.
    """
    rates = {"embedder": settings.embedder_lr or settings.lr, "rest": settings.lr}
    decays = {"decayed": settings.weight_decay, "kept": 0.0}
    groups: dict[tuple[str, str], dict[str, Any]] = {
        (part, decay): {"params": [], "name": f"{part}.{decay}", "lr": rates[part], "weight_decay": decays[decay]}
        for decay in decays
        for part in rates
    }
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    embedder = set(model.embedder.parameters())
    for name, weight in trained.items():
        part = "embedder" if weight in embedder else "rest"
        decay = "decayed" if weight.ndim >= 2 and "position" not in name else "kept"
        groups[part, decay]["params"].append(weight)
    # On a CPU the fused step rounds differently from the default one, and saves little time.
    fused = all(weight.is_cuda for weight in trained.values()) or None
    used = [group for group in groups.values() if group["params"]]
    return torch.optim.AdamW(used, lr=settings.lr, betas=(0.9, 0.95), fused=fused)


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimSettings, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the schedule of the learning rates over ``steps`` optimizer steps: linear warm-up, then the decay.

    Cosine ends at a tenth of the peak, linear at 0.
    """
    warmup = min(settings.warmup, steps // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        if settings.schedule == "cosine":
            return 0.1 + 0.9 * 0.5 * (1 + cos(pi * done))
        return 1 - done if settings.schedule == "linear" else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def main_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate that ``optim.lr`` sets; where only the embedder is trained, that of the embedder."""
    groups = optimizer.param_groups
    return next((g["lr"] for g in groups if not g.get("name", "").startswith("embedder.")), groups[0]["lr"])

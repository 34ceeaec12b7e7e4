"""AdamW with parameter groups, and the schedule of the learning rates."""

from math import cos, pi

import torch

from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.settings import OptimSettings


def build_optimizer(model: UmbrellaForConditionalGeneration, settings: OptimSettings) -> torch.optim.AdamW:
    """Build AdamW for the trained weights. Matrices decay; norms, biases, positions and the class token do not.

    Parameter groups have a ``name``: "embedder" or "rest", which may have different learning rates, and "decayed" or
    "kept", as in "embedder.kept". ``lr`` is the current rate of a group, ``initial_lr`` the peak that a schedule adds.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    embedder = set(model.embedder.parameters())
    groups = []
    for decay in ("decayed", "kept"):
        for part, rate in (("embedder", settings.embedder_lr or settings.lr), ("rest", settings.lr)):
            weights = [
                weight
                for name, weight in trained
                if (weight in embedder) == (part == "embedder")
                and (weight.ndim >= 2 and "position" not in name) == (decay == "decayed")
            ]
            weight_decay = settings.weight_decay if decay == "decayed" else 0.0
            groups.append({"params": weights, "name": f"{part}.{decay}", "lr": rate, "weight_decay": weight_decay})
    # On a CPU the fused step rounds differently from the default one, and saves little time.
    fused = all(weight.is_cuda for _, weight in trained) or None
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95), fused=fused)


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimSettings, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the schedule of the learning rates over ``steps`` optimizer steps: linear warm-up, then the decay."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, settings, steps))


def lr_factor(step: int, settings: OptimSettings, steps: int) -> float:
    """Return the learning rate at a step as a share of its peak. Cosine ends at 0.1, linear at 0, constant at 1."""
    warmup = min(settings.warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if settings.schedule == "cosine":
        return 0.1 + 0.9 * 0.5 * (1 + cos(pi * done))
    return 1 - done if settings.schedule == "linear" else 1.0


def lr_by_group(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of the next step by group name; a group without a name has its number."""
    return {group.get("name", str(i)): float(group["lr"]) for i, group in enumerate(optimizer.param_groups)}


def main_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate that ``optim.lr`` sets; where only the embedder is trained, that of the embedder."""
    by_group = lr_by_group(optimizer)
    rest = [rate for name, rate in by_group.items() if not name.startswith("embedder.")]
    return (rest or list(by_group.values()))[0]

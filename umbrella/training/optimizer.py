"""AdamW with parameter groups, and the schedule of their rates."""

from math import cos, pi

import torch

from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.settings import OptimSettings


def build_optimizer(model: UmbrellaForConditionalGeneration, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over what is trained: matrices decay; norms, biases, positions and the class token do not.

    Groups have a ``name``: "embedder" or "rest", which may have other rates, and "decayed" or "kept", as in
    "embedder.kept". ``lr`` is a group's rate, ``initial_lr`` (once there is a schedule) its peak.
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
    # On a CPU the fused step rounds otherwise than torch's plain one, and gains little.
    fused = all(weight.is_cuda for _, weight in trained) or None
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95), fused=fused)


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimSettings, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The rates over ``steps`` optimizer steps, as a share of their peaks: linear warm-up, then the schedule."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, settings, steps))


def lr_factor(step: int, settings: OptimSettings, steps: int) -> float:
    """The share of the peak rate at a step: cosine falls to a tenth, linear to zero, constant stays."""
    warmup = min(settings.warmup, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if settings.schedule == "cosine":
        return 0.1 + 0.9 * 0.5 * (1 + cos(pi * done))
    return 1 - done if settings.schedule == "linear" else 1.0


def lr_by_group(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate that the next step takes, by group; one without a name has its number."""
    return {group.get("name", str(i)): float(group["lr"]) for i, group in enumerate(optimizer.param_groups)}


def main_lr(optimizer: torch.optim.Optimizer) -> float:
    """The rate that ``optim.lr`` sets; the embedder's where nothing else is trained."""
    by_group = lr_by_group(optimizer)
    rest = [rate for name, rate in by_group.items() if not name.startswith("embedder.")]
    return (rest or list(by_group.values()))[0]

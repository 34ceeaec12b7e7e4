"""What a sweep has set, read from what it acts on: the optimizer's rate, the batch's weights, the model's shapes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.data.batching import Batch
from umbrella.data.masking import loss_weights
from umbrella.data.pipeline import Plan
from umbrella.data.rendering import Example
from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.optimizer import rate_factor


@dataclass(frozen=True)
class Acting:
    """What a training does its first step with."""

    settings: Settings
    model: UmbrellaForConditionalGeneration
    parts: Mapping[str, Sequence[torch.nn.Parameter]]
    """See ``model.selection.parts``."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    steps: int
    """Optimizer steps of the whole training."""
    plan: Plan
    batches: Sequence[Batch]
    """The micro-batches of a step."""
    examples: Sequence[Example]
    """What the first of them was made of."""
    dtype: torch.dtype


def read_back(acting: Acting, swept: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What each swept setting is where it acts.

    Args:
        swept: names to the values that were drawn.

    Returns:
        Name to value as read, and the names of settings that only the settings themselves tell.

    Raises:
        UserError: a value is another one than was drawn; says which, and where.
    """
    found: dict[str, Any] = {}
    blind: list[str] = []
    for name, drawn in swept.items():
        wanted = value_of(acting.settings.with_values({name: drawn}), name)
        reader = next((read for prefix, read in READERS.items() if f"{name}.".startswith(prefix)), None)
        found[name] = reader(acting, name, wanted) if reader else value_of(acting.settings, name)
        if found[name] != wanted:
            where = "where it acts" if reader else "in the settings"
            raise UserError(
                f"tune.space.{name}: was to be {wanted} and is {found[name]} {where}; this is a fault of ours"
            )
        if reader is None:
            blind.append(name)
    return found, blind


def value_of(settings: Settings, name: str) -> Any:
    """A setting or a section by its dotted name."""
    value: Any = settings
    for key in name.split("."):
        value = value[key] if isinstance(value, Mapping) else getattr(value, key)
    return value


def _rate(acting: Acting, name: str, wanted: float) -> Any:
    groups = acting.optimizer.param_groups
    embedder = [g for g in groups if g["name"].startswith("embedder.")]
    rest = [g for g in groups if not g["name"].startswith("embedder.")]
    ours = embedder if name.endswith("embedder_lr") else rest or embedder
    factor = rate_factor(acting.schedule.last_epoch, acting.settings.optim, acting.steps)
    for group in ours:
        if group["initial_lr"] != wanted:
            return group["initial_lr"]
        if group["lr"] != wanted * factor:
            return f"{group['lr']} at this step instead of {wanted * factor}"
    return wanted


def _decay(acting: Acting, name: str, wanted: float) -> float:
    decayed = [g["weight_decay"] for g in acting.optimizer.param_groups if g["name"].endswith(".decayed")]
    return next((value for value in decayed if value != wanted), wanted)


def _shape_of_rates(acting: Acting, name: str, wanted: Any) -> Any:
    with_it = acting.settings.with_values({name: wanted}).optim
    factor = acting.schedule.lr_lambdas[0]
    same = all(factor(step) == rate_factor(step, with_it, acting.steps) for step in range(acting.steps))
    return wanted if same else "another one in the schedule of rates"


def _weights(acting: Acting, name: str, wanted: Any) -> Any:
    policy = acting.settings.with_values({name: wanted}).mask
    expected = np.concatenate([loss_weights(example, policy) for example in acting.examples])
    there = acting.batches[0].loss_weights
    kept = there[acting.batches[0].attention_mask > 0].cpu().numpy()
    if acting.settings.data.pack:  # rows share samples, in an order of their own
        expected, kept = np.sort(expected), np.sort(kept)
    return wanted if np.array_equal(expected, kept) else "another one in the weights of the first batch"


def _moving(acting: Acting, name: str, wanted: str) -> str:
    moving = {part for part, weights in acting.parts.items() if any(w.requires_grad for w in weights)}
    expected = set(acting.parts) if wanted == "all" else set(wanted.split("+"))
    return wanted if moving == expected else "+".join(sorted(moving))


def _model(acting: Acting, name: str, wanted: Any) -> Any:
    layers = acting.model.model
    return {
        "model.dtype": str(acting.dtype).removeprefix("torch."),
        "model.width": layers.language_model.config.hidden_size,
        "model.heads": layers.language_model.config.num_attention_heads,
        "model.language_layers": len(layers.language_model.layers),
        "model.tower_layers": len(layers.vision_tower.encoder.layers),
        "model.attention": layers.language_model.config._attn_implementation,
    }[name]


def _adapters(acting: Acting, name: str, wanted: Any) -> Any:
    ranks = {len(weight) for key, weight in acting.model.named_parameters() if ".lora_A" in key}
    return next((rank for rank in ranks if rank != wanted), wanted)


def _volumes(acting: Acting, name: str, wanted: Any) -> Any:
    modality = name.split(".")[1]
    built = acting.model.config.modalities[modality]
    for batch in acting.batches:
        group = batch.pixel_values.get(modality)
        if group is not None and tuple(group.voxels.shape[1:]) != built.grid:
            return tuple(group.voxels.shape[1:])
    return value_of(acting.settings.model_copy(update={"modalities": acting.model.config.modalities}), name)


def _loop(acting: Acting, name: str, wanted: Any) -> Any:
    return {
        "train.batch_size": len(acting.batches[0]),
        "train.accumulate": len(acting.batches),
        "train.epochs": acting.plan.epochs,
        "seed": acting.plan.seed,
    }[name]


READERS: dict[str, Callable[[Acting, str, Any], Any]] = {
    "optim.lr.": _rate,
    "optim.embedder_lr.": _rate,
    "optim.weight_decay.": _decay,
    "optim.warmup.": _shape_of_rates,
    "optim.schedule.": _shape_of_rates,
    "mask.": _weights,
    "model.train.": _moving,
    "model.lora_rank.": _adapters,
    **{f"model.{key}.": _model for key in ("dtype", "width", "heads", "language_layers", "tower_layers", "attention")},
    "modalities.": _volumes,
    **{f"train.{key}.": _loop for key in ("batch_size", "accumulate", "epochs")},
    "seed.": _loop,
}
"""By the beginning of a name. Others act where they are asked for: in the loop, from the settings themselves."""

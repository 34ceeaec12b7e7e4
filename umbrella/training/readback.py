"""What a sweep has set, read from what it acts on: the optimizer's rate, the batch's weights, the model's shapes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import numpy as np
import torch
from pydantic import TypeAdapter

from umbrella.base import Section, UserError
from umbrella.config import Settings
from umbrella.data.batching import Batch
from umbrella.data.masking import loss_weights
from umbrella.data.pipeline import Plan
from umbrella.data.rendering import Example
from umbrella.model.embedder import ModalityEmbedder
from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.optimizer import rate_factor

UNSEEN = object()
"""What a reader says of a setting that acts on nothing here, or on nothing that tells its value."""


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
    for name, drawn in _leaves(swept):
        wanted = _as_setting(name, drawn)
        reader = next((read for prefix, read in READERS.items() if f"{name}.".startswith(prefix)), None)
        seen = reader(acting, name, wanted) if reader else UNSEEN
        found[name] = value_of(acting.settings, name) if seen is UNSEEN else seen
        if found[name] != wanted:
            where = "in the settings" if seen is UNSEEN else "where it acts"
            raise UserError(
                f"tune.space.{name}: was to be {wanted} and is {found[name]} {where}; this is a fault of ours"
            )
        if seen is UNSEEN:
            blind.append(name)
    return found, blind


def value_of(settings: Settings, name: str) -> Any:
    """A setting or a section by its dotted name."""
    value: Any = settings
    for key in name.split("."):
        value = value[key] if isinstance(value, Mapping) else getattr(value, key)
    return value


def _leaves(swept: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values; of a section that is swept as a whole, those of the settings that it names."""
    for name, value in swept.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _as_setting(name: str, drawn: Any) -> Any:
    """The value in the setting's own type. Whole settings would hide one that another setting overrules."""
    kind: Any = Settings
    for key in name.split("."):
        kind = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
        if isinstance(kind, type) and issubclass(kind, Section):
            field = kind.model_fields[key]
            kind = Annotated[field.annotation, field]
        else:
            kind = get_args(kind)[1]  # of a mapping's values
    return TypeAdapter(kind).validate_python(drawn)


def _rate(acting: Acting, name: str, wanted: float | None) -> Any:
    groups, optim = acting.optimizer.param_groups, acting.settings.optim
    embedder = [g for g in groups if g["name"].startswith("embedder.")]
    rest = [g for g in groups if not g["name"].startswith("embedder.")]
    ours = embedder if name.endswith("embedder_lr") else rest if optim.embedder_lr else groups
    peak = optim.lr if wanted is None else wanted  # null: the embedder has the rate of the others
    factor = rate_factor(acting.schedule.last_epoch, optim, acting.steps)
    for group in ours:
        if group["initial_lr"] != peak:
            return group["initial_lr"]
        if group["lr"] != peak * factor:
            return f"{group['lr']} at this step instead of {peak * factor}"
    return wanted if ours else UNSEEN


def _decay(acting: Acting, name: str, wanted: float) -> Any:
    decayed = [g["weight_decay"] for g in acting.optimizer.param_groups if g["name"].endswith(".decayed")]
    return next((value for value in decayed if value != wanted), wanted if decayed else UNSEEN)


def _shape_of_rates(acting: Acting, name: str, wanted: Any) -> Any:
    with_it = acting.settings.with_values({name: wanted}).optim
    factor = acting.schedule.lr_lambdas[0]
    same = all(factor(step) == rate_factor(step, with_it, acting.steps) for step in range(acting.steps))
    return wanted if same else "another one in the schedule of rates"


def _weights(acting: Acting, name: str, wanted: Any) -> Any:
    policy, (_, key, *of_type) = acting.settings.mask, name.split(".")
    if of_type:
        task_type = ".".join(of_type)
        if all(example.conversation.task_type != task_type for example in acting.examples):
            return UNSEEN
        policy = policy.model_copy(update={key: {**policy.task_weights, task_type: wanted}})
    elif key != "preset":  # which acts by the others
        policy = policy.model_copy(update={key: wanted})
    expected = np.concatenate([loss_weights(example, policy) for example in acting.examples])
    there = acting.batches[0].loss_weights
    kept = there[acting.batches[0].attention_mask > 0].cpu().numpy()
    return wanted if np.array_equal(expected, kept) else "another one in the weights of the first batch"


def _moving(acting: Acting, name: str, wanted: str) -> str:
    stepped = {weight for group in acting.optimizer.param_groups for weight in group["params"]}
    moving = {part for part, weights in acting.parts.items() if any(w.requires_grad for w in weights)}
    taken = {part for part, weights in acting.parts.items() if not stepped.isdisjoint(weights)}
    expected = set(acting.parts) if wanted == "all" else set(wanted.split("+"))
    return next(("+".join(sorted(there)) for there in (moving, taken) if there != expected), wanted)


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
    return next((rank for rank in ranks if rank != wanted), wanted if ranks else UNSEEN)


def _volumes(acting: Acting, name: str, wanted: Any) -> Any:
    _, modality, key = name.split(".")
    embedder = acting.model.embedder.by_modality[modality]
    assert isinstance(embedder, ModalityEmbedder)
    if key == "patch":
        return embedder.patch
    if key != "grid":  # it acted when the volume was prepared
        return UNSEEN
    known = tuple(len(table) * step for table, step in zip(embedder.positions, embedder.patch, strict=True))
    groups = [batch.pixel_values[modality] for batch in acting.batches if modality in batch.pixel_values]
    shapes = [known, *(tuple(group.voxels.shape[1:]) for group in groups)]
    return next((shape for shape in shapes if shape != wanted), wanted)


def _loop(acting: Acting, name: str, wanted: Any) -> Any:
    return {
        "train.batch_size": max(map(len, acting.batches)),
        "train.accumulate": len(acting.batches),
        "train.epochs": acting.plan.epochs,
        "data.bucket_batches": acting.plan.window,
    }[name]


def _seed(acting: Acting, name: str, wanted: int) -> int:
    drawn = {draw[0] for batch in acting.batches for draw in batch.draws}
    return next((seed for seed in (acting.plan.seed, *drawn) if seed != wanted), wanted)


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
    "data.bucket_batches.": _loop,
    "seed.": _seed,
}
"""By the beginning of a name. Others act where they are asked for: in the loop, from the settings themselves."""

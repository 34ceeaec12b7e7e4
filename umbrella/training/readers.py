"""Readers: each says what a setting is where it acts. Which there are, see ``READERS``."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from umbrella.config import Settings
from umbrella.data.batching import Batch
from umbrella.data.masking import loss_weights
from umbrella.data.pipeline import Plan
from umbrella.data.rendering import Example
from umbrella.model.embedder import ModalityEmbedder
from umbrella.model.loading import embedders_of
from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration
from umbrella.training.augmentation import augment
from umbrella.training.optimizer import rate_factor
from umbrella.training.parallel import whole

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
    """The micro-batches of a step, as they were made."""
    fed: Sequence[Batch]
    """The same as the model sees them: augmented."""
    examples: Sequence[Example]
    """What the first of them was made of."""
    again: Callable[[Settings], Batch]
    """Makes the first of them of the same examples under other settings."""
    dtype: torch.dtype


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


def _embedder(acting: Acting, name: str, wanted: str) -> Any:
    if acting.schedule.last_epoch:
        return UNSEEN  # its weights have moved
    kinds, known = set(), embedders_of(acting.settings.model)
    for modality, embedder in acting.model.embedder.by_modality.items():
        assert isinstance(embedder, ModalityEmbedder)
        depth, height, width, *frames = embedder.patch
        if modality not in known and depth * math.prod(frames) > 1:  # over which inflated weights are spread evenly
            kernels = whole(embedder.projection.weight).reshape(-1, depth, height * width, math.prod(frames))
            kinds.add("inflated" if torch.equal(kernels, kernels[:, :1, :, :1].expand_as(kernels)) else "random")
    return next((kind for kind in kinds if kind != wanted), wanted if kinds else UNSEEN)


def _adapters(acting: Acting, name: str, wanted: Any) -> Any:
    ranks = {len(weight) for key, weight in acting.model.named_parameters() if ".lora_A" in key}
    return next((rank for rank in ranks if rank != wanted), wanted if ranks else UNSEEN)


def _volumes(acting: Acting, name: str, wanted: Any) -> Any:
    _, modality, key = name.split(".")
    embedder = acting.model.embedder.by_modality[modality]
    assert isinstance(embedder, ModalityEmbedder)
    if key == "patch":
        return embedder.patch
    if key != "grid":
        there = acting.batches[0].pixel_values.get(modality)
        if there is None:
            return UNSEEN
        expected = acting.again(acting.settings.with_values({name: wanted})).pixel_values[modality]
        return (
            wanted if torch.equal(expected.voxels, there.voxels.cpu()) else "another one in the first batch's volumes"
        )
    known = tuple(len(table) * step for table, step in zip(embedder.positions, embedder.patch, strict=True))
    groups = [batch.pixel_values[modality] for batch in acting.batches if modality in batch.pixel_values]
    shapes = [known, *(tuple(group.voxels.shape[1:]) for group in groups)]
    return next((shape for shape in shapes if shape != wanted), wanted)


def _changes(acting: Acting, name: str, wanted: Any) -> Any:
    before, after = acting.batches[0], acting.fed[0]
    if not before.pixel_values:
        return UNSEEN
    changed = augment(before, acting.settings.with_values({name: wanted}).train.augment).pixel_values
    same = all(torch.equal(changed[modality].voxels, group.voxels) for modality, group in after.pixel_values.items())
    return wanted if same else "another one in what became of the first batch's volumes"


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
    "model.embedder_init.": _embedder,
    "model.lora_rank.": _adapters,
    **{f"model.{key}.": _model for key in ("dtype", "width", "heads", "language_layers", "tower_layers", "attention")},
    "modalities.": _volumes,
    "train.augment.": _changes,
    **{f"train.{key}.": _loop for key in ("batch_size", "accumulate", "epochs")},
    "data.bucket_batches.": _loop,
    "seed.": _seed,
}
"""By the beginning of a name. Others act where they are asked for: in the loop, from the settings themselves."""

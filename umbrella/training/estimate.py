"""Estimate time and GPU memory of a training: steps with blank volumes on this machine, or a pass that only counts."""

import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from math import ceil, inf
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from umbrella.config import Settings
from umbrella.conversations.schema import questions_of
from umbrella.data.batch_maker import make_batch
from umbrella.data.batching import Batch, Collator
from umbrella.data.pipeline import Plan, group_samples
from umbrella.data.rendering import Renderer, load_renderer
from umbrella.data.splits import Splits
from umbrella.evaluation.candidates import find_candidates
from umbrella.evaluation.controls import blank
from umbrella.evaluation.scoring import score
from umbrella.models.build import build_model, component_parameters
from umbrella.models.float8 import apply_frozen_dtype
from umbrella.models.token_nll import MAX_LOGITS
from umbrella.models.varlen import Sequences, find_sequences
from umbrella.training.augmentation import augment
from umbrella.training.distributed import autocast
from umbrella.training.language_model import make_model, uncompiled
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.progress_log import format_duration
from umbrella.training.step import train_step
from umbrella.training.task import make_plan
from umbrella.volumes.store import DecodedVolumes

BATCHES = 20
"""Micro-batches of which memory is computed for the largest, and with which steps are timed."""
STEPS = 5
"""Largest number of timed steps."""
BUDGET = 5.0
"""Seconds after which no further step is timed."""
ATTENTION = functional.scaled_dot_product_attention


class SavedTensors(TorchFunctionMode):
    """Counts the bytes that a forward pass on the meta device would keep on a GPU for the backward pass.

    Autocast ignores the meta device, and attention there keeps its scores: both are replaced. A compiled model keeps a
    tensor and its casts once, in the narrowest data type, and recomputes SiLU. A checkpointed layer keeps its input.
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        super().__init__()
        self.train, dtype = settings.train, getattr(torch, settings.model.dtype)
        self.dtypes = {functional.linear: dtype, ATTENTION: dtype, functional.layer_norm: torch.float32}
        self.held = self.before = self.recomputed = self.largest = 0
        self.weights = {weight.untyped_storage() for weight in model.parameters()}
        self.seen, self.source = set(self.weights), dict[Any, Any]()
        for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function with the data types of autocast."""
        if dtype := self.dtypes.get(func):
            cast = [self.__torch_function__(Tensor.to, types, (a, dtype)) for a in args if torch.is_tensor(a)]
            args = (*cast, *args[len(cast) :])
        result = _Attention.apply(*args, kwargs["attn_mask"]) if func is ATTENTION else func(*args, **kwargs or {})
        if func in (Tensor.to, Tensor.float) and (own := args[0].untyped_storage()) not in self.weights:
            self.source[result.untyped_storage()] = self.source.get(own, own)
        elif func is functional.silu and self.train.compile:
            self.seen.add(result.untyped_storage())
        return result

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves."""
        own = tensor.untyped_storage()
        storage = self.source.get(own, own) if self.train.compile else own
        if storage not in self.seen:
            self.seen.add(storage)
            size = min(storage.nbytes(), own.nbytes())
            self.held, self.largest = self.held + size, max(self.largest, size)
        return tensor

    def _enter(self, layer: Any, args: tuple[Tensor, ...]) -> None:
        self.before = self.held

    def _leave(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self.train.checkpoint_activations and self.held > self.before:
            self.recomputed = max(self.recomputed, self.held - self.before)
            self.held = self.before + args[0].untyped_storage().nbytes()


class _Attention(torch.autograd.Function):
    """Saves what attention on a GPU saves: no scores, and the bias that a mask becomes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(query, key, value, result, None if mask is None else mask.to(query.dtype))
        return result


def count_memory(model: Any, batch: Batch, settings: Settings) -> tuple[int, int, int]:
    """Count the GPU memory of a worker: weights, optimizer, and activations and gradients at their peak, in bytes.

    Args:
        model: on the meta device, without ``apply_options``. Its layers get hooks.
        batch: a micro-batch on the CPU.
    """
    text, (rows, length), workers = model.model.language_model, batch.input_ids.shape, settings.resources.workers
    is_packed = settings.model.attention == "sdpa" and bool((batch.attention_mask > 1).any())
    saved, on_meta = SavedTensors(model, settings), batch.to("meta")
    more: dict[str, Any] = {}
    if settings.model.attention == "varlen":
        found = find_sequences(batch.attention_mask, batch.prefix)
        on_device: Any = [x.to("meta") if torch.is_tensor(x) else x for x in found]
        more["sequences"] = Sequences(*on_device)
    with torch.device("meta"), saved_tensors_hooks(saved.keep, lambda tensor: tensor), saved:
        states = model.get_input_embeddings()(on_meta.input_ids).flatten(0, 1)
        for name, group in on_meta.pixel_values.items():
            features = model.volume_features(name, group.voxels)
            features = (features if group.index is None else features[group.index]).flatten(0, 1)
            states = states.index_copy(0, torch.empty(len(features), dtype=torch.long), features.to(states.dtype))
        states, mask = states.view(rows, length, -1), torch.empty(rows, 1, length, length) if is_packed else None
        rotary = text.rotary_emb(states, torch.arange(length)[None])
        for layer in text.layers:  # the whole language model asks for values of the position ids
            states = layer(states, attention_mask=mask, position_embeddings=rotary, **more)
        text.norm(states)
    shards, weights = workers if settings.train.shard else 1, sum(w.nbytes for w in model.parameters())
    if settings.model.frozen_dtype == "float8":  # two copies of the frozen matrices in one byte
        modules = (*model.model.vision_tower.encoder.layers, model.model.multi_modal_projector, *text.layers)
        matrices = [w for module in modules for w in module.parameters() if w.ndim == 2 and not w.requires_grad]
        weights += 2 * sum(w.numel() for w in matrices)
    gradients = sum(w.nbytes for w in model.parameters() if w.requires_grad) // shards
    # A worker gathers two layers of the language model at a time, and all other weights.
    in_shards = (len(text.layers) - 2) * sum(w.nbytes for w in text.layers[0].parameters())
    logits = 8 * min(MAX_LOGITS, len(model.lm_head.weight) * int((batch.loss_weights[:, 1:] != 0).sum()))
    voxels = 2 * sum(g.voxels.nbytes for g in batch.pixel_values.values())  # the next batch is copied ahead
    activations = voxels + saved.held + max(logits, saved.recomputed + 3 * saved.largest)  # and three gradients of them
    # Gradients come while activations go, except those of an earlier micro-batch and in the buckets of DDP.
    stay = settings.train.accumulate > 1 or workers > shards
    peak = activations + gradients if stay else max(activations, gradients)
    return weights // shards + (weights - in_shards if shards > 1 else 0), 2 * gradients, peak


def describe_model(settings: Settings, splits: Splits) -> tuple[str, str]:
    """Describe the parameters of a model, and the GPU memory of a worker, computed for the largest of some batches."""
    renderer, counts = load_renderer(settings), list[str]()
    with torch.device("meta"):
        model = build_model(settings.model, settings.modalities, len(renderer.tokenizer), renderer.image_id).train()
    for name, weights in [*component_parameters(model).items(), ("in all", list(model.parameters()))]:
        numbers = {kind: sum(w.numel() for w in weights if w.requires_grad == kind) for kind in (True, False)}
        shown = {kind: f"{n / 1e6:,.4g} M" if n >= 1e6 else f"{n:,}" for kind, n in numbers.items() if n}
        kinds = [f"{number} {'trained' if kind else 'frozen'}" for kind, number in shown.items()]
        counts.append(f"{name} {', '.join(kinds)}")
    collator = Collator(renderer, DecodedVolumes(settings.modalities, settings.data.max_voxels))
    first = islice(micro_batches(settings, splits, renderer), BATCHES)
    largest = max(first, key=lambda batch: batch.input_ids.numel())
    parts = count_memory(model, collator.read_volumes(largest), settings)
    total, fixed, optimizer, rest = (f"{n / 2**30:.3g}" for n in (sum(parts), *parts))
    memory = f"weights {fixed}, optimizer {optimizer}, activations and gradients {rest}"
    return "; ".join(counts), f"about {total} GiB at the peak with batches of {len(largest)} ({memory}), computed"


def time_step_and_evaluation(settings: Settings, splits: Splits) -> tuple[float, float, int]:
    """Time a training step of one worker, and an evaluation of the validation split.

    Weights and optimizer are real, volumes are blank and are not read. The first step is not timed.

    Returns:
        Seconds of a step and of an evaluation, and the peak of a GPU's memory during the steps in bytes.

    Raises:
        UserError: the model cannot be built.
    """
    device = torch.device("cuda" if settings.resources.gpus_per_worker else "cpu")
    torch.set_num_threads(settings.resources.threads)
    dtype, train, renderer = getattr(torch, settings.model.dtype), settings.train, load_renderer(settings)
    model = make_model(settings, renderer, device).to(device).train()
    apply_frozen_dtype(model, settings.model)
    collator = Collator(renderer, DecodedVolumes(settings.modalities, settings.data.max_voxels))
    optimizer, parts = build_optimizer(model, settings.optim), component_parameters(model)
    schedule = build_schedule(optimizer, settings.optim, STEPS + 1)
    stream = cycle(islice(micro_batches(settings, splits, renderer), BATCHES))

    seconds: list[float] = []
    while len(seconds) <= STEPS and sum(seconds[1:]) < BUDGET:
        begun = time.perf_counter()
        loaded = [collator.read_volumes(batch).to(device) for batch in islice(stream, train.accumulate)]
        batches = [augment(batch, train.augment) for batch in loaded]
        train_step(model, batches, optimizer, schedule, settings.optim.clip, parts, dtype, inf)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)

    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    questions = blank(questions_of(splits.validation))
    batch = questions[: train.evaluation_batch_size]
    candidates = find_candidates(splits.train, settings.evaluate.number_grids)
    model.eval()
    model.use_attention("sdpa")
    begun = time.perf_counter()
    with autocast(model, device, dtype), uncompiled():
        score(model, batch, renderer, collator, candidates, device)
    evaluation = (time.perf_counter() - begun) * len(questions) / len(batch)
    return float(np.median(seconds[1:])), evaluation / settings.resources.workers, peak


def plan_of(settings: Settings, splits: Splits) -> Plan:
    """Make the plan of a training."""
    groups = group_samples(splits.train, settings.data.group_batches_by)
    return make_plan(settings, settings.resources.workers, splits.lengths["train"], splits.tokens, groups)


def micro_batches(settings: Settings, splits: Splits, renderer: Renderer) -> Iterator[Batch]:
    """Yield the micro-batches of one worker, whose volumes are blank and not read."""
    plan = plan_of(settings, splits)
    for start, stop in plan.micro_batches(0):
        samples, rng_keys = plan.rows(start, stop)
        yield make_batch(renderer, blank([splits.train[i] for i in samples]), settings, samples, rng_keys)


def count_steps(settings: Settings, splits: Splits) -> tuple[int, int]:
    """Count the steps and the evaluations of a training."""
    plan = plan_of(settings, splits)
    steps = plan.steps
    return steps, ceil(steps / (settings.train.evaluate_every or plan.steps_per_epoch))


def describe_costs(trainings: Sequence[Settings], splits: Splits, concurrent: int) -> Iterator[str]:
    """Describe the parameters of trainings, their GPU memory and how long they take, one line each.

    Args:
        trainings: settings of each; all are assumed to need as much memory, and time for a step, as the first.
        concurrent: trainings that run at the same time on this machine. 0: they run on another.
    """
    first = trainings[0]
    parameters, memory = describe_model(first, splits)
    yield f"parameters: {parameters}"
    step, evaluation, peak = time_step_and_evaluation(first, splits) if concurrent else (0.0, 0.0, 0)
    if peak and not (first.train.shard and first.resources.workers > 1):  # one worker needs more than several
        memory = f"{peak / 2**30:.3g} GiB at the peak, measured here"
    yield f"GPU memory: {memory}"
    if not concurrent:
        yield "time: is estimated only for a run on this machine"
        return
    counts = [count_steps(settings, splits) for settings in trainings]
    seconds = [steps * step + evaluations * evaluation for steps, evaluations in counts]
    total = max(sum(seconds) / concurrent, max(seconds))
    yield (
        f"time: {format_duration(total)} without early stopping; {counts[0][0]} steps of {step:.3g} s and"
        f" {counts[0][1]} evaluations of {evaluation:.3g} s per training, measured here with blank volumes;"
        " preprocessing, starts and the final evaluation come on top"
    )

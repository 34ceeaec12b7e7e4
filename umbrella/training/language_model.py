"""The task of a language model that reads volumes: masked loss on conversations, scores on the validation split."""

import copy
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import ray
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from umbrella.config import Settings
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Batch, Collator
from umbrella.data.masking import Redact, audit
from umbrella.data.pipeline import batches, evaluation_order, from_table, slices
from umbrella.data.rendering import Renderer, load_renderer
from umbrella.data.tokenizer import number_tokens
from umbrella.evaluation.metrics import validation_metrics
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.scoring import score
from umbrella.models.build import build_model, component_parameters
from umbrella.models.float8 import CACHEABLE, apply_frozen_dtype
from umbrella.models.number_loss import NumberLoss
from umbrella.models.partial_checkpoint import (
    base_description,
    check_base,
    is_partial,
    load_saved_weights,
    parameters_to_save,
    saves_full_model,
    write_weights,
)
from umbrella.models.umbrella_llava import ADAPTER, BASE, UmbrellaForConditionalGeneration
from umbrella.training.augmentation import augment
from umbrella.training.distributed import all_gather_object, autocast, copy_into_shard, parallelise
from umbrella.training.optimizer import build_optimizer
from umbrella.training.run_summary import audit_sample, mask_audit_page, summarise_run
from umbrella.training.settings import TrainSettings
from umbrella.training.step import LOSS_WINDOW, max_loss, train_step
from umbrella.training.task import LanguageModelJob, Summary, Task
from umbrella.volumes.store import open_store

ARGUMENTS = r"L\[(?!'self'\])"
"""Matches all that a compiled layer receives."""
COMPILE_OPTIONS: dict[str, Any] = {"triton.multi_kernel": 3, "unsafe_marked_cacheable_functions": CACHEABLE}
"""torch's default, 0, reads a row of more than 1024 values several times to compute its norm, and 3 reads it once.
(Torch describes 2 and 3 the other way round, at least up to 2.13. A test marked gpu checks it.) 1 would time both, and
fails with cached code. The cacheable functions are needed for float8.
"""
AUDITED_BATCHES = 20
"""Micro-batches whose volumes are counted."""


class LanguageModelTask(Task):
    """See ``Task``."""

    def __init__(self, job: LanguageModelJob, rank: int, world_size: int, device: torch.device) -> None:
        self.job, self.settings = job, job.settings
        self.world_size, self.device = world_size, device
        self.dtype = getattr(torch, self.settings.model.dtype)
        self.train, self.validation = ray.get([job.train, job.validation])
        self.renderer = load_renderer(self.settings)
        self.collate = Collator(self.renderer, open_store(self.settings), pin=device.type == "cuda")
        self.evaluated = evaluation_order(job.validation_lengths, rank, world_size)

        self.model = make_model(self.settings, self.renderer, device)
        config = self.model.config
        config.trained_modalities = sorted({*(config.trained_modalities or ()), *job.modalities})
        config.longest_answer = job.longest_answer
        self.parallel = parallelise(self.model, device, world_size, self.settings.train.shard).train()
        apply_frozen_dtype(self.model, self.settings.model)
        self.parts = component_parameters(self.model)
        self.optimizer = build_optimizer(self.model, self.settings.optim)
        self.names = parameters_to_save(self.model, self.settings.model)
        self.losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self.files = model_files(self.model, self.renderer.tokenizer, self.settings) if rank == 0 else {}

    def load(self, made: Batch) -> Batch:
        """See ``Task.load``."""
        return self.collate.read_volumes(made)

    def augment(self, batch: Batch) -> Batch:
        """See ``Task.augment``."""
        return augment(batch, self.settings.train.augment)

    def step(self, batches: Sequence[Batch], schedule: torch.optim.lr_scheduler.LRScheduler) -> dict[str, float]:
        """See ``Task.step``."""
        limit = max_loss(self.losses, self.settings.train.max_loss_ratio)
        clip = self.settings.optim.clip
        metrics = train_step(self.parallel, batches, self.optimizer, schedule, clip, self.parts, self.dtype, limit)
        self.losses.append(metrics["train/loss"])
        return metrics

    def evaluate(self) -> dict[str, float]:
        """See ``Task.evaluate``. Each rank scores its share of the validation split."""
        size = self.settings.train.evaluation_batch_size
        self.model.eval()
        self.model.use_attention("sdpa")  # varlen takes no mask of a tree
        scored: list[Prediction] = []
        passes = 0
        for conversations in batches(slices(len(self.evaluated), size), self._conversations, name="validation"):
            scored += self._score(conversations)
            passes += 1
        # With sharded weights a forward pass is collective, and the first ranks may have one more batch than others.
        for _ in range(passes, ceil(ceil(self.validation.num_rows / self.world_size) / size)):
            self._score([from_table(self.validation, 0)])
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # free the weights that forward passes without a backward pass have gathered
        self.model.train()
        self.model.use_attention(self.settings.model.attention)
        self.predictions = [one for part in all_gather_object(scored) for one in part]
        return validation_metrics(self.predictions)

    def _conversations(self, start: int, stop: int) -> list[Conversation]:
        return [from_table(self.validation, int(i)) for i in self.evaluated[start:stop]]

    def _score(self, conversations: Sequence[Conversation]) -> list[Prediction]:
        with autocast(self.model, self.device, self.dtype), uncompiled():
            return score(self.model, conversations, self.renderer, self.collate, self.job.candidates, self.device)

    def weights(self) -> dict[str, torch.Tensor]:
        """See ``Task.weights``."""
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self.names}

    def save_weights(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See ``Task.save_weights``."""
        write_weights(folder, weights, saves_full_model(self.settings.model))

    def load_weights(self, folder: Path) -> None:
        """See ``Task.load_weights``."""
        if is_partial(folder):
            check_base(folder)
        load_saved_weights(folder, self.model, self.names, copy_into_shard)
        apply_frozen_dtype(self.model, self.settings.model)  # a full checkpoint has the frozen weights, too

    def summary(self, redact: Redact) -> Summary:
        """Describe loss, mask, tokens and trained weights, and attach the mask audit as a page."""
        size, policy = self.train.num_rows, self.settings.mask
        examples = [self.renderer.render(from_table(self.train, i)) for i in audit_sample(size)]
        rows, read = audit(examples, policy), f"{len(examples)} of {size} conversations"
        trained = {name: sum(w.numel() for w in ws if w.requires_grad) for name, ws in self.parts.items()}
        text = summarise_run(rows, policy, trained, self.settings.modalities, self.renderer.has_stop_token, read)
        text += f"\n{self._describe_volumes()}"
        supervised, tokens = (sum(int(row[name]) for row in rows) for name in ("supervised", "tokens"))
        tags = {"mask.supervised": f"{supervised} of {tokens} tokens audited"}
        page = mask_audit_page(rows, examples, self.renderer, policy, read, redact)
        return Summary(text, tags, {"mask_audit.html": page})

    def _describe_volumes(self) -> str:
        """How many volumes the first micro-batches of rank 0 have, and how many distinct ones they compute."""
        plan, shares = self.job.plan(self.world_size), not any(dict(self.settings.train.augment).values())
        series = {name for name, modality in self.settings.modalities.items() if modality.is_series}
        batches = []
        for start, stop in islice(plan.micro_batches(0), AUDITED_BATCHES):
            samples = [from_table(self.train, int(i)) for i in plan.samples(np.arange(start, stop))]
            # a series has another window in each sample
            named = [
                (v.modality, v.image_path, v.modality in series and n) for n, c in enumerate(samples) for v in c.volumes
            ]
            batches.append(named)
        volumes = fmean(map(len, batches))
        distinct = fmean(len(set(batch)) for batch in batches) if shares else volumes
        return f"volumes: {volumes:.4g} in a micro-batch, of which {distinct:.4g} are computed (mean of {len(batches)})"


def make_model(settings: Settings, renderer: Renderer, device: torch.device) -> UmbrellaForConditionalGeneration:
    """Make the model of the settings with its options and loss, on the CPU; ``device``: where it will be trained."""
    tokenizer = renderer.tokenizer
    model = build_model(settings.model, settings.modalities, len(tokenizer), renderer.image_id)
    apply_options(model, settings.train)
    if settings.loss.numbers == "regression_aware":
        points = {tokenizer.convert_tokens_to_ids(".")} - {tokenizer.unk_token_id, None}
        rows = model.get_output_embeddings().weight.shape[0]
        model.number_loss = NumberLoss(number_tokens(tokenizer), points, rows, device)
    return model


def uncompiled() -> Any:
    """Context of an evaluation. A cache would be compiled anew for each layer; uncompiled, it takes little time."""
    return torch.compiler.set_stance("force_eager")


def apply_options(model: UmbrellaForConditionalGeneration, settings: TrainSettings) -> None:
    """Apply ``checkpoint_activations`` and ``compile`` to the layers of vision tower and language model, in place.

    Names of weights do not change. Evaluation has no checkpointing and is not compiled.
    """
    if settings.checkpoint_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers makes embeddings require gradients here, which only re-entrant checkpointing needs.
        model.disable_input_require_grads()
    if settings.compile:
        # Batches differ in size and length: otherwise each of the first shapes would be compiled. With dynamic=True
        # constants like the epsilon of a norm would be dynamic, too, and layers would be traced twice.
        torch.compiler.config.dynamic_sources = ARGUMENTS
        for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
            layer.compile(options=COMPILE_OPTIONS)


def model_files(
    model: UmbrellaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, bytes]:
    """Return the files of a checkpoint beside its weights: configuration, tokenizer, adapters, base."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = copy.deepcopy(model.config)
        config.architectures = [UmbrellaForConditionalGeneration.__name__]  # sharding changes the name of the class
        config.dtype = "float32"
        config.save_pretrained(folder)
        if model.generation_config:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if model.has_adapters:
            (adapters,) = model.peft_config.values()
            adapters.save_pretrained(str(folder / ADAPTER))
        if not saves_full_model(settings.model):
            (folder / BASE).write_text(base_description(settings.model.checkpoint), encoding="utf-8")
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

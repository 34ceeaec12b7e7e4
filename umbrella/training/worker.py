"""The Ray Train worker loop: what runs in each worker process of one training."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
import transformers
from ray.train.torch import get_device, prepare_model
from torch import distributed

from umbrella.conversations.conversation import Conversation
from umbrella.data.audit import audit
from umbrella.data.batching import Batch, collate
from umbrella.data.intake import open_store
from umbrella.data.pipeline import batches, from_table
from umbrella.data.rendering import Example, load_renderer
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.metrics import summarise
from umbrella.evaluation.scoring import Scored, score
from umbrella.model.presets import build_model
from umbrella.model.selection import parts
from umbrella.tracking import Tracker
from umbrella.training.augmentation import augment
from umbrella.training.checkpoint import restore, rng_state, save_checkpoint
from umbrella.training.job import Job, progress_line
from umbrella.training.memory import apply_options
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.progress import Progress, latest_checkpoint, prune, read_progress
from umbrella.training.statement import audited, mask_page, share, statement
from umbrella.training.step import Diverged, LossWatch, StepResult, train_step
from umbrella.training.transfer import to_device


class Worker:
    """One process of a training. Rank 0 also tracks the run and writes checkpoints."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings, self.plan = job, job.settings, job.plan
        transformers.utils.logging.disable_progress_bar()
        self.rank = ray.train.get_context().get_world_rank()
        self.device = get_device()
        self.dtype = getattr(torch, self.settings.model.dtype)
        self.train_table: pa.Table = ray.get(job.train)
        self.validation_table: pa.Table = ray.get(job.validation)
        self.renderer = load_renderer(self.settings)
        self.tokenizer = self.renderer.tokenizer
        self.store = open_store(self.settings)

        torch.manual_seed(self.settings.seed)
        self.model = build_model(
            self.settings.model, self.settings.modalities, len(self.tokenizer), self.renderer.image_id
        ).to(self.device)
        apply_options(self.model, self.settings.train)
        self.parts = parts(self.model)
        # From here on each worker has random numbers of its own.
        torch.manual_seed(int(np.random.SeedSequence((self.settings.seed, self.rank)).generate_state(1)[0]))
        self.optimizer = build_optimizer(self.model, self.settings.optim)
        latest = latest_checkpoint(job.folder)
        self.progress = read_progress(latest) if latest else Progress()
        self.steps = self.progress.step + self.plan.steps_from(self.progress.position)
        self.schedule = build_schedule(self.optimizer, self.settings.optim, self.steps)
        if latest:
            restore(latest, self.model, self.optimizer, self.schedule, self.rank)
        log = Path(job.folder) / f"samples_{self.rank}.jsonl"
        self.samples_log = log.open("a", encoding="utf-8") if self.settings.data.log_samples else None
        self.tracker = self._start_tracking() if self.rank == 0 else None

    def run(self) -> None:
        """The loop: a step, and an evaluation with a checkpoint wherever one is due."""
        model = prepare_model(self.model, move_to_device=False) if self.plan.workers > 1 else self.model
        model.train()
        every = self.settings.train.evaluate_every or self.plan.steps_per_epoch
        stream = to_device(self._checked(self._training_batches()), self.device)
        watch = LossWatch(self.settings.train.max_loss_ratio)
        since = time.perf_counter()
        waited, first = 0.0, self.progress.step
        for step in range(first + 1, self.steps + 1):
            asked = time.perf_counter()
            micro_batches = [next(stream) for _ in range(self.settings.train.accumulate)]
            waited += time.perf_counter() - asked
            micro_batches = [augment(batch, self.settings.train.augment) for batch in micro_batches]
            clip = self.settings.optim.clip
            try:
                result = train_step(
                    model, micro_batches, self.optimizer, self.schedule, clip, self.parts, self.dtype, watch.limit
                )
            except Diverged as error:  # on every worker at once
                samples = [task_id for own in self._gathered(error.samples) for task_id in own]
                raise Diverged(f"at step {step} {error.what}", samples) from None
            watch.add(result.loss)
            position = self.progress.position + self.plan.per_step
            self.progress = Progress(step, position, self.plan.sorted_by or self.plan.per_step)
            self._track_step(result)
            if step % every == 0 or step == self.steps:
                spent = time.perf_counter() - since
                pace = {
                    "train/samples_per_second": (step - first) * self.plan.per_step / spent,
                    "train/waiting_for_data": waited / spent,
                }
                self._evaluate_and_report(result, pace)
                since = time.perf_counter()
                waited, first = 0.0, step
        if self.tracker:
            self.tracker.end()

    def _checked(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The order is a function of the position, so it is known what must come: nothing is skipped or repeated."""
        positions = self.plan.positions(self.rank, self.progress.position)
        expected, done = self.plan.samples(positions), 0
        for batch in stream:
            here = slice(done, done + len(batch))
            if batch.sample_indices.tolist() != expected[here].tolist():
                raise RuntimeError(f"other samples came than position {positions[done]} has")
            if self.samples_log:
                entry = {"position": int(positions[done]), "task_ids": batch.task_ids}
                print(json.dumps(entry), file=self.samples_log, flush=True)
            done = here.stop
            yield batch

    def _gathered(self, own: Any) -> list[Any]:
        """Every worker's, by rank, on each of them."""
        if not distributed.is_initialized():
            return [own]
        everyones: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyones, own)
        return everyones

    def _training_batches(self) -> Iterator[Batch]:
        def make(rows: Mapping[str, np.ndarray]) -> Batch:
            examples = [self.renderer.render(from_table(self.train_table, int(i))) for i in rows["sample"]]
            epochs = rows["position"] // self.plan.size
            draws = [(self.settings.seed, int(e), int(i)) for e, i in zip(epochs, rows["sample"], strict=True)]
            return self._collate(examples, self.settings.mask, rows["sample"], draws, self.settings.data.pack)

        shard = ray.train.get_dataset_shard(f"train-{self.rank}")
        return batches(shard, self.settings.train.batch_size, self.settings.data.prefetch, make)

    def _collate(
        self,
        examples: Sequence[Example],
        policy: MaskPolicy,
        samples: Any = None,
        draws: Sequence[tuple[int, ...]] | None = None,
        pack: int = 0,
    ) -> Batch:
        image, pad = self.renderer.image_id, self.tokenizer.pad_token_id or 0
        return collate(examples, policy, self.store, image, pad, samples, draws, pack)

    def _evaluate(self) -> dict[str, float]:
        """Score the validation split, each worker its share; the metrics are of the whole on every worker."""
        self.model.eval()
        scored: list[Scored] = []
        shard = ray.train.get_dataset_shard(f"validation-{self.rank}")
        for conversations in batches(shard, self.settings.train.evaluation_batch_size, 1, self._validation_rows):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                scored += score(
                    self.model, conversations, self.renderer, self._collate, self.job.candidates, self.device
                )
        self.model.train()
        return summarise(one for part in self._gathered(scored) for one in part)

    def _validation_rows(self, rows: Mapping[str, np.ndarray]) -> list[Conversation]:
        return [from_table(self.validation_table, int(i)) for i in rows["sample"]]

    def _track_step(self, result: StepResult) -> None:
        if self.tracker:
            values = {"train/loss": result.loss, "train/lr": result.lr, "train/grad_norm": result.grad_norm}
            values |= {f"train/grad_norm/{part}": norm for part, norm in result.grad_norm_by_part.items()}
            values |= {f"train/lr/{group}": lr for group, lr in result.lr_by_group.items()}
            values["train/supervised_tokens"] = result.supervised_tokens
            self.tracker.metrics(values, self.progress.step)

    def _evaluate_and_report(self, result: StepResult, pace: dict[str, float]) -> None:
        measured, tune = pace | self._evaluate(), self.settings.tune
        report: dict[str, Any] = {
            "step": self.progress.step,
            "steps": self.steps,
            "epoch": self.progress.position / self.plan.size,
            "train/loss": result.loss,
            "train/lr": result.lr,
            "checkpoint": f"{self.job.folder}/step_{self.progress.step:07d}",
            **measured,
        }
        rng = self._gathered(rng_state())
        if self.tracker:
            self.tracker.metrics(measured, self.progress.step)
            self.tracker.flush()
            save_checkpoint(
                report["checkpoint"],
                self.model,
                self.tokenizer,
                self.optimizer,
                self.schedule,
                self.progress,
                self.settings.to_yaml(),
                rng,
                measured,
            )
            prune(self.job.folder, self.settings.resources.keep_checkpoints, tune.metric, tune.mode)
            print(progress_line(report), flush=True)
        ray.train.report(report)

    def _start_tracking(self) -> Tracker:
        """Open the run, and say there and in the log what this training is."""
        conversations = _Lazy(self.train_table.num_rows, lambda i: from_table(self.train_table, i))
        examples = audited(conversations, self.renderer)
        table, read = audit(examples, self.settings.mask), share(examples, conversations)
        moving = {name: sum(w.numel() for w in ws if w.requires_grad) for name, ws in self.parts.items()}
        told = statement(table, self.settings.mask, moving, self.settings.modalities, self.renderer.stops, read)
        text = f"{self.plan.in_words}\n{told}"
        tracker = Tracker.start(**self.job.tracking)  # type: ignore[arg-type]
        settings = {name: value for name, value in self.settings.flat().items() if not name.startswith("tune.")}
        tracker.params(settings | dict(self.job.data))
        tracker.tags({"device": str(self.device), "ray.job": ray.get_runtime_context().get_job_id()})
        tracker.text(self.settings.to_yaml(), "settings.yaml")
        tracker.text(text, "statement.txt")
        tracker.text(mask_page(table, examples, self.renderer, self.settings.mask, read), "mask_audit.html")
        supervised, tokens = (sum(int(row[name]) for row in table) for name in ("supervised", "tokens"))
        tracker.tags({"mask.supervised": f"{supervised} of {tokens} tokens audited"})
        print(text, flush=True)
        return tracker


class _Lazy(Sequence):
    """A table's conversations as a sequence that parses only what is asked for."""

    def __init__(self, size: int, get: Callable[[int], Any]) -> None:
        self.size, self.get = size, get

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return self.get(range(self.size)[index])

"""The Ray Train worker loop: what runs in each worker process of one training."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
import transformers
from ray import tune
from ray.train.torch import get_device

from umbrella.base import UserError
from umbrella.data.batching import Batch
from umbrella.data.collator import Collator
from umbrella.data.intake import open_store
from umbrella.data.pipeline import Rows, batches, from_table
from umbrella.data.rendering import load_renderer
from umbrella.model.partial import names_to_write
from umbrella.model.presets import build_model
from umbrella.model.selection import parts
from umbrella.tracking.environment import code_version
from umbrella.training.augmentation import augment
from umbrella.training.checkpoint import code_of, other_code, restore, snapshot
from umbrella.training.evaluating import Evaluator
from umbrella.training.heeding import Request, Requests
from umbrella.training.history import cut, note
from umbrella.training.job import Job
from umbrella.training.memory import apply_options
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.pace import Pace, memory
from umbrella.training.parallel import gathered, parallelise, rank_and_world_size, seed_worker, together
from umbrella.training.progress import Progress, latest_checkpoint, read_progress
from umbrella.training.reporting import Reporter
from umbrella.training.step import Diverged, LossWatch, StepResult, train_step
from umbrella.training.transfer import to_device
from umbrella.training.writer import Writer

SWITCH = 5e-4
"""Seconds after which a thread that makes batches lets the one that feeds the GPU go on. Python's own are 5 ms."""


class Worker:
    """One process of a training.

    Args:
        train, validation: the tables of the job.
        workers: how many processes the training has; ``rank`` counts them from 0.
        reporter: of rank 0, which tracks the run and writes checkpoints; None for the others.
        report: called with the metrics of every evaluation, on all ranks.

    Raises:
        UserError: what cannot be trained, or the training's folder cannot be written to.
    """

    def __init__(
        self,
        job: Job,
        train: pa.Table,
        validation: pa.Table,
        rank: int,
        workers: int,
        device: torch.device,
        reporter: Reporter | None,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self.job, self.settings, self.table = job, job.settings, train
        self.rank, self.device, self.reporter, self.report = rank, device, reporter, report
        self.dtype = getattr(torch, self.settings.model.dtype)
        self.renderer = load_renderer(self.settings)
        self.collate = Collator(self.renderer, open_store(self.settings), pin=self.device.type == "cuda")
        self.evaluate = Evaluator(job, validation, self.collate, self.rank, workers, self.device)

        torch.manual_seed(self.settings.seed)
        self.model = build_model(
            self.settings.model, self.settings.modalities, len(self.renderer.tokenizer), self.renderer.image_id
        )
        config = self.model.config
        config.trained_modalities = sorted({*(config.trained_modalities or ()), *job.modalities})
        config.longest_answer = job.longest_answer
        apply_options(self.model, self.settings.train)
        self.parallel = parallelise(self.model, self.settings.train, self.device, workers)
        self.parts = parts(self.model)
        seed_worker(self.settings.seed, self.rank)
        self.optimizer = build_optimizer(self.model, self.settings.optim)
        latest = latest_checkpoint(job.folder)
        self.progress = read_progress(latest) if latest else Progress()
        if self.rank == 0:
            cut(job.folder, self.progress.step)
        self.plan = job.plan(workers, self.progress.sorted_by)
        self.steps = self.progress.step + self.plan.steps_from(self.progress.position)
        self.every = self.settings.train.evaluate_every or self.plan.steps_per_epoch
        self.schedule = build_schedule(self.optimizer, self.settings.optim, self.steps)
        self.written = names_to_write(self.model, self.settings.model)
        if latest:
            restore(latest, self.model, self.written, self.optimizer, self.schedule, self.rank)
        log = Path(job.folder) / f"samples_{self.rank}.jsonl"
        self.samples_log = log.open("a", encoding="utf-8") if self.settings.data.log_samples else None
        self.log_error: OSError | None = None
        self._log({"start": self.progress.position, "workers": workers})
        self.writer = None
        if self.reporter:
            code = code_of(code_version())
            if latest and (differs := other_code(latest, code)):
                print(f"note: {latest} was written by other code: {differs}", file=sys.stderr)
            self.writer = Writer(job.folder, self.model, self.renderer.tokenizer, self.settings, code)
            self.reporter.begin(self.plan.in_words, self.table, self.renderer, self.parts)

    def run(self) -> int | None:
        """The loop: a step, and an evaluation with a checkpoint wherever one is due.

        Returns the step after which it stopped because it was asked to; else nothing.

        Raises:
            UserError: what was to be kept could not be written.
            Diverged: see ``train_step``.
        """
        try:
            return self._train()
        finally:
            if self.writer:  # whatever happened: the last checkpoint is worth waiting for
                self.writer.close()
            if self.reporter:
                self.reporter.log.forget()

    def _train(self) -> int | None:
        model = self.parallel.train()
        every, patience = self.every, self.settings.train.patience
        stream = to_device(self._checked(self._training_batches()), self.device)
        watch, pace = LossWatch(self.settings.train.max_loss_ratio), Pace()
        requests = Requests(self.job.folder, self.rank, self.device, of_ray_train=not self.job.in_trial)
        for step in range(self.progress.step + 1, self.steps + 1):
            if self.progress.out_of_patience(patience):
                break
            with pace.waiting():
                made = [next(stream) for _ in range(self.settings.train.accumulate)]
            micro_batches = [augment(batch, self.settings.train.augment) for batch in made]
            del made  # volumes on the GPU
            clip = self.settings.optim.clip
            try:
                result = train_step(
                    model, micro_batches, self.optimizer, self.schedule, clip, self.parts, self.dtype, watch.limit
                )
            except Diverged as error:  # on every worker at once
                samples = [task_id for own in gathered(error.samples) for task_id in own]
                raise Diverged(f"at step {step} {error.what}", samples) from None
            watch.add(result.loss)
            pace.step(self.plan.per_step, result.supervised_tokens)
            position = self.progress.position + self.plan.per_step
            sorted_by = self.plan.sorted_by or self.plan.per_step
            epoch = position / self.plan.size
            self.progress = replace(self.progress, step=step, position=position, sorted_by=sorted_by, epoch=epoch)
            if self.reporter:
                self.reporter.step(result, self._place(), pace)
            asked = requests.look()
            if step % every == 0 or step == self.steps:
                measured = pace.take() | memory(self.device) | self.evaluate(self.model)
                self.progress = self.progress.evaluated(measured[self.settings.tune.metric], self.settings.tune.mode)
                self._report(result, measured)
                pace.take()  # an evaluation is no training
            elif asked:
                self._report(result, pace.take() | memory(self.device), evaluated=False)
            if asked is Request.STOP and step < self.steps:
                with together():
                    if self.writer:
                        self.writer.wait()
                return step
        with together():
            if self.writer:
                self.writer.wait()
            if self.reporter:
                self.reporter.end(self.progress, self._place())
        return None

    def _training_batches(self) -> Iterator[Batch]:
        def make(rows: Rows) -> Batch:
            examples = [self.renderer.render(from_table(self.table, int(i))) for i in rows["sample"]]
            draws, pack = self.plan.draws(rows), self.settings.data.pack
            return self.collate(examples, self.settings.mask, indices=rows["sample"], draws=draws, pack=pack)

        rows, name = self.plan.rows(self.rank, self.progress.position), f"{self.job.name}, training, worker {self.rank}"
        return batches(rows, self.settings.train.batch_size, self.settings.data.prefetch, make, name)

    def _checked(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The order is a function of the position, so it is known what must come: nothing is skipped or repeated."""
        size = self.settings.train.batch_size
        for rows in self.plan.rows(self.rank, self.progress.position):
            for start in range(0, len(rows["position"]), size):
                batch, position = next(stream), int(rows["position"][start])
                if batch.sample_indices.tolist() != rows["sample"][start : start + size].tolist():
                    raise RuntimeError(f"other samples came than position {position} has")
                self._log({"position": position, "task_ids": batch.task_ids})
                yield batch
        if next(stream, None) is not None:  # to its end, where what made it is let go
            raise RuntimeError("more samples came than there are positions")

    def _log(self, entry: dict[str, Any]) -> None:
        if self.samples_log:
            try:
                print(json.dumps({"time": time.time(), **entry}), file=self.samples_log, flush=True)
            except OSError as error:  # raised where all workers are: one that leaves lets the others wait
                self.log_error, self.samples_log = error, None

    def _place(self) -> dict[str, float]:
        return {"step": self.progress.step, "steps": self.steps, "epoch": self.progress.epoch}

    def _report(self, result: StepResult, measured: dict[str, float], evaluated: bool = True) -> None:
        report: dict[str, Any] = {
            **self._place(),
            "evaluation": ceil(self.progress.step / self.every),
            "begun": self.job.begun,
            "time": time.time(),
            "out_of_patience": self.progress.out_of_patience(self.settings.train.patience),
            "train/loss": result.loss,
            "train/lr": result.lr,
            **measured,
        }
        with together():
            if self.log_error:
                raise self.log_error
            if self.reporter:
                self.reporter.evaluation(self.progress.step, measured, report, self.evaluate.scored)
                if evaluated:
                    note(self.job.folder, report)
            if self.writer:
                self.writer.wait()
        keep = self.writer is not None
        taken = snapshot(self.model, self.written, self.optimizer, self.schedule, self.progress, measured, keep)
        if self.writer:
            self.writer.write(taken)
        if evaluated:
            with together():
                if self.writer and self.job.is_trial:  # the process of a trial may end as soon as it has reported
                    self.writer.wait()
            self.report(report)


def make_worker(job: Job) -> Worker:
    """The worker that Ray Train has started this process for.

    Raises:
        UserError: see ``Worker``.
    """
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train would print each report as a dictionary
    transformers.utils.logging.disable_progress_bar()
    if not Path(job.folder).is_dir():
        raise UserError(f"{job.folder} is gone, or not on this node: resources.storage is one folder for all of them")
    sys.setswitchinterval(SWITCH)
    # Ray says so to processes that have not imported torch yet; sums of other threads round otherwise.
    torch.set_num_threads(job.settings.resources.threads)
    (rank, workers), device = rank_and_world_size(), get_device()
    reporter = Reporter(job, device) if rank == 0 else None
    # In the process of a trial Ray Tune takes the metrics, and ends the process's work by SystemExit where the
    # scheduler stops the trial. From workers, ``TuneReportCallback`` passes them on.
    report = tune.report if job.in_trial else ray.train.report
    return Worker(job, ray.get(job.train), ray.get(job.validation), rank, workers, device, reporter, report)

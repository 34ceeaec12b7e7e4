"""The training loop, which every rank of a training runs."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from math import ceil, nan
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import ray.train
import torch
import transformers
from ray import tune
from ray.train.torch import get_device

from umbrella.base import UserError, note
from umbrella.data.pipeline import RemoteMaker, batches
from umbrella.evaluation.calibration import fit_temperatures
from umbrella.paths import CODE, COMPILED
from umbrella.tracking.provenance import code_version
from umbrella.training.checkpoint_files import (
    CheckpointWriter,
    TrainingState,
    append_evaluation,
    best_checkpoint,
    latest_checkpoint,
    read_training_state,
    truncate_history,
)
from umbrella.training.distributed import (
    all_gather_object,
    copy_to_host,
    copy_training_state,
    raise_on_all_ranks,
    rank_and_world_size,
    restore_training_state,
)
from umbrella.training.optimizer import build_schedule
from umbrella.training.progress_log import Throughput, memory
from umbrella.training.reporting import Reporter
from umbrella.training.stop_signal import Request, StopSignal
from umbrella.training.task import Job, Task
from umbrella.version import __version__


class Trainer:
    """One rank of a training.

    Args:
        make_task: makes the task of (job, rank, world size, device).
        reporter: logs the run; only rank 0 has one, and writes checkpoints.
        report: called with the metrics of every evaluation, on all ranks.
        latest: the checkpoint to continue from; None to start.

    Raises:
        UserError: the settings cannot be trained, or the training's folder cannot be written to.
    """

    def __init__(
        self,
        job: Job,
        make_task: Callable[..., Task],
        rank: int,
        world_size: int,
        device: torch.device,
        reporter: Reporter | None,
        report: Callable[[dict[str, Any]], None],
        latest: Path | None = None,
    ) -> None:
        self.job, self.settings = job, job.settings
        self.rank, self.device, self.reporter, self.report = rank, device, reporter, report
        self.state = read_training_state(latest) if latest else TrainingState()
        self.begun_at_step = self.state.step
        self.plan = job.plan(world_size, self.state.sorted_by)
        processes = job.loader_processes(on_gpu=device.type == "cuda")
        make = job.maker(self.plan, decode=processes > 0)
        # Processes start now, while the model is built.
        self.maker = RemoteMaker(make, processes) if processes else make
        torch.manual_seed(self.settings.seed)  # every rank makes the same weights
        self.task = make_task(job, rank, world_size, device)
        # Each rank gets its own random numbers.
        torch.manual_seed(int(np.random.SeedSequence((self.settings.seed, rank)).generate_state(1)[0]))
        if rank == 0:
            truncate_history(job.folder, self.state.step)
        self.steps = self.state.step + self.plan.steps_from(self.state.position)
        self.every = self.settings.train.evaluate_every or self.plan.steps_per_epoch
        self.schedule = build_schedule(self.task.optimizer, self.settings.optim, self.steps)
        if latest:
            self.task.load_weights(latest)
            restore_training_state(latest, self.task.optimizer, self.schedule, rank)
        log = Path(job.folder) / f"samples_{rank}.jsonl"
        self.samples_log = log.open("a", encoding="utf-8") if self.settings.data.log_samples else None
        self.log_error: OSError | None = None
        self._log({"start": self.state.position, "workers": world_size})
        self.writer = None
        if self.reporter:
            code = code_versions()
            if latest and (changes := describe_code_changes(latest, code)):
                note(f"{latest} was written by other code: {changes}")
            self.writer = CheckpointWriter(job.folder, self.task.files, self.task.save_weights, self.settings, code)
            self.reporter.begin(self.plan.description, self.task)

    def run(self) -> int | None:
        """Train to the end of the plan. Evaluate and write a checkpoint every ``train.evaluate_every`` steps.

        Returns:
            The step after which the training stopped on request, else None.

        Raises:
            UserError: a file of the training could not be written.
            FloatingPointError: see ``Task.step``.
        """
        try:
            return self._train()
        finally:
            if isinstance(self.maker, RemoteMaker):
                self.maker.close()
            if self.writer:
                self.writer.close()
            if self.reporter:
                self.reporter.log.close()

    def _train(self) -> int | None:
        settings, task = self.settings, self.task
        stream, throughput = to_device(self._batches(), self.device), Throughput()
        stop_signal = StopSignal(self.job.folder, self.rank, self.device, uses_ray_train=not self.job.in_trial)
        for step, bounds in enumerate(self.plan.bounds(self.state.position), self.state.step + 1):
            if self.state.out_of_patience(settings.train.patience):
                break
            with throughput.waiting():
                loaded = [next(stream) for _ in range(self.plan.accumulate)]
            micro_batches = [task.augment(batch) for batch in loaded]
            del loaded  # free the volumes on the GPU
            try:
                values = task.step(micro_batches, self.schedule)
            except FloatingPointError as error:
                raise FloatingPointError(f"at step {step} {error}") from None
            position = int(bounds[-1])
            throughput.step(position - self.state.position, int(values.get("train/supervised_tokens", 0)))
            sorted_by = self.plan.sorted_by or self.plan.per_step
            epoch = position / self.plan.size
            self.state = replace(self.state, step=step, position=position, sorted_by=sorted_by, epoch=epoch)
            if self.reporter:
                self.reporter.step(values, self._position(), throughput)
            request = stop_signal.check()
            if step % self.every == 0 or step == self.steps:
                metrics = throughput.take() | memory(self.device) | task.evaluate()
                self.state = self.state.evaluated(metrics[settings.tune.metric], settings.tune.mode)
                self._save(values, metrics)
                throughput.take()  # leave out the time of the evaluation
            elif request:
                self._save(values, throughput.take() | memory(self.device), evaluated=False)
            if request is Request.STOP and step < self.steps:
                self._wait_for_checkpoint()
                return step
        self._wait_for_checkpoint()
        best = best_checkpoint(self.job.folder, settings.tune.metric, settings.tune.mode) if self.rank == 0 else None
        task.finish(all_gather_object(best)[0])
        with raise_on_all_ranks():
            if self.reporter:
                self.reporter.end(self.state, self._position())
        return None

    def _batches(self) -> Iterator[Any]:
        """Make the batches, and check that each has the samples of its position: none is skipped or repeated."""
        plan, start = self.plan, self.state.position
        bounds = plan.micro_batches(self.rank, start)
        stream = batches(bounds, self.maker, self.task.load, self.settings.data.prefetch)
        for position, end in plan.micro_batches(self.rank, start):
            batch = next(stream)
            if batch.sample_indices.tolist() != plan.samples(np.arange(position, end)).tolist():
                raise RuntimeError(f"the batch at position {position} does not have the samples of the plan")
            self._log({"position": position, "task_ids": batch.task_ids})
            yield batch
        if next(stream, None) is not None:  # ends the stream, which frees its resources
            raise RuntimeError("the stream has more batches than the plan")

    def _log(self, entry: dict[str, Any]) -> None:
        if self.samples_log:
            try:
                print(json.dumps({"time": time.time(), **entry}), file=self.samples_log, flush=True)
            except OSError as error:  # raised later on all ranks: here the others would wait for this one
                self.log_error, self.samples_log = error, None

    def _position(self) -> dict[str, float]:
        return {"step": self.state.step, "steps": self.steps, "epoch": self.state.epoch}

    def _save(self, values: dict[str, float], metrics: dict[str, float], evaluated: bool = True) -> None:
        """Log the metrics, start to write a checkpoint, and report the evaluation if there is one."""
        report: dict[str, Any] = {
            **self._position(),
            "evaluation": ceil(self.state.step / self.every),
            "begun": self.job.start_time,
            "begun_at_step": self.begun_at_step,
            "time": time.time(),
            "out_of_patience": self.state.out_of_patience(self.settings.train.patience),
            "train/loss": values["train/loss"],
            "train/lr": values["train/lr"],
            **metrics,
            f"best/{self.settings.tune.metric}": nan if self.state.best is None else self.state.best,
        }
        with raise_on_all_ranks():
            if self.log_error:
                raise self.log_error
            if self.reporter:
                self.reporter.evaluation(self.state.step, metrics, report, self.task.predictions)
                if evaluated:
                    append_evaluation(self.job.folder, report)
            if self.writer:
                self.writer.wait()
        keep = self.writer is not None
        weights = copy_to_host(self.task.weights(), keep)
        tensors = copy_training_state(self.task.optimizer, self.schedule, keep)
        if self.writer:
            temperatures = fit_temperatures(self.task.predictions) if evaluated else {}
            self.writer.write(self.state, metrics, weights, tensors, temperatures)
        if evaluated:
            if self.job.is_trial:  # Ray Tune may end the process of a trial when it reports
                self._wait_for_checkpoint()
            self.report(report)

    def _wait_for_checkpoint(self) -> None:
        with raise_on_all_ranks():
            if self.writer:
                self.writer.wait()


def make_trainer(job: Job, make_task: Callable[..., Task]) -> Trainer:
    """Make the trainer of this process.

    Raises:
        UserError: see ``Trainer``.
    """
    (rank, world_size), device = rank_and_world_size(), get_device()
    # Rank 0 chooses the checkpoint: on a network file system other nodes may list the folder as it was before. This
    # comes first, because a rank that fails before it lets the others wait.
    latest = all_gather_object(latest_checkpoint(job.folder) if rank == 0 else None)[0]
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train would print each report as a dictionary
    transformers.utils.logging.disable_progress_bar()
    if not Path(job.folder).is_dir():
        raise UserError(f"{job.folder} is gone, or not on this node: resources.storage is one folder for all of them")
    if job.settings.train.compile:
        # Compiled layers are kept for the next training of the same shapes. The import of torch has set another folder.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(job.settings.resources.storage, COMPILED))
    sys.setswitchinterval(5e-4)  # s; threads that make batches let the one that feeds the GPU run earlier
    # Ray sets this only in processes that import torch later; another number of threads rounds sums differently.
    torch.set_num_threads(job.settings.resources.threads)
    reporter = Reporter(job, device) if rank == 0 else None
    # In the process of a trial ``tune.report`` raises SystemExit where the scheduler stops the trial. From the workers
    # of Ray Train, ``TuneReportCallback`` passes the metrics on.
    report = tune.report if job.in_trial else ray.train.report
    return Trainer(job, make_task, rank, world_size, device, reporter, report, latest)


def code_versions() -> dict[str, str]:
    """Return the versions of the code by name: git commit, UMBRELLA, Python and main packages."""
    own = {"umbrella": __version__, "python": python_version()}
    return {**code_version(), **own, **{name: version(name) for name in ("torch", "transformers", "peft", "ray")}}


def describe_code_changes(checkpoint: str | Path, code: Mapping[str, str]) -> str:
    """Describe how ``code`` differs from the code that wrote a checkpoint. Return "" if it does not."""
    file = Path(checkpoint) / CODE
    then = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    names = [name for name in {**then, **code} if then.get(name) != code.get(name)]
    return ", ".join(f"{name} was {then.get(name, 'unknown')} and is {code.get(name, 'unknown')}" for name in names)


def to_device(batches: Iterable[Any], device: torch.device | str) -> Iterator[Any]:
    """Yield batches, which are in the memory of the host, on ``device`` in their order.

    On a GPU, the next batch is copied on a stream of its own while the current one is used. So there is one batch more
    on the GPU and in pinned memory. A batch that is pinned already is not pinned again.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    stream, source = torch.cuda.Stream(device), iter(batches)

    def fetch() -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            batch = next(source, None)
            copy = batch and batch.apply(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
            return copy, stream.record_event()

    def record(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(torch.cuda.current_stream(device))  # keeps the memory until that stream has used it
        return tensor

    # In a thread: fetching takes tens of milliseconds even if the batch is ready, and at the start of a step the GPU is
    # idle, because the loss of the last step was read.
    with ThreadPoolExecutor(1, thread_name_prefix="to_device") as thread:
        ahead = thread.submit(fetch)
        while (fetched := ahead.result())[0] is not None:
            ahead = thread.submit(fetch)
            torch.cuda.current_stream(device).wait_event(fetched[1])
            yield fetched[0].apply(record)

"""The job of one training, and the TorchTrainer that runs it.

Where Ray Train starts them, three processes of a training unpickle this file: the script or trial, the controller and
the worker. Only the worker needs the model, so only the worker imports it: seconds each time.
"""

import gc
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar, Protocol

import numpy as np
import ray
from ray.exceptions import RayError
from ray.train import (
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from umbrella.base import Stopped, UserError
from umbrella.config import Settings
from umbrella.data.pipeline import Plan
from umbrella.storage import check_writable
from umbrella.training.progress import latest_checkpoint
from umbrella.training.requests import stop_file, workers_file

LOOK = 0.5
"""Seconds between two looks whether a training that was asked to stop still has workers."""


class Runs(Protocol):
    """A worker of a training, made ready."""

    def run(self) -> int | None:
        """Train to the end. Returns the step after which it stopped because it was asked to; else nothing."""


@dataclass(frozen=True, kw_only=True)
class AnyJob:
    """What every worker of one training is told, whatever it is that learns."""

    settings: Settings
    data: Mapping[str, str | int]
    """What is tracked of the data: their fingerprint, and how many samples are in quarantine."""
    tracking: dict[str, str | None]
    """Arguments of ``MlflowLogger.start``."""
    folder: str
    """Where this training's checkpoints lie."""
    begun: float = 0.0
    """When this attempt at the training began, in seconds since 1970."""
    datasets: Sequence[Mapping[str, Any]] = ()
    """The splits as MLflow is told of them, see ``tracking.datasets``."""
    is_trial: bool = False
    """Whether Ray Tune runs it."""
    idle: ClassVar[tuple[str, ...]] = ()
    """Sections of the settings that say nothing of such a training."""

    @property
    def in_trial(self) -> bool:
        """Whether it runs in the process of a trial, without workers of Ray Train."""
        return self.is_trial and self.settings.resources.alone

    def worker(self) -> "Runs":
        """What runs in each worker process. Imports what only that needs."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """What Ray calls this training where people look. Part of file names there: without a slash, and not long."""
        return str(self.tracking["name"]).replace("/", "_")[:100]


@dataclass(frozen=True, kw_only=True)
class Job(AnyJob):
    """The training of a language model."""

    train: ray.ObjectRef
    """Table of the training conversations, see ``data.pipeline.to_table``."""
    validation: ray.ObjectRef
    train_lengths: np.ndarray
    """See ``data.intake.Splits.lengths``."""
    validation_lengths: np.ndarray
    candidates: Mapping[str, Mapping[str, str]]
    """See ``evaluation.scoring.Candidates``."""
    modalities: Sequence[str]
    """Names of the modalities that occur in the training split."""
    longest_answer: int
    """See ``data.intake.Splits.longest_answer``."""
    idle: ClassVar[tuple[str, ...]] = ("tune", "baseline")

    def worker(self) -> "Runs":
        """See ``training.worker``."""
        from umbrella.training.worker import make_worker

        _keep_imports()
        return make_worker(self)

    def plan(self, workers: int, sorted_by: int) -> Plan:
        """Which sample each of so many workers sees at each step. ``sorted_by``: of the checkpoint, see ``Plan``."""
        train = self.settings.train
        return Plan(
            sorted_by=sorted_by,
            size=len(self.train_lengths),
            seed=self.settings.seed,
            epochs=train.epochs,
            workers=workers,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            lengths=self.train_lengths,
            window=self.settings.data.bucket_batches,
        )


@cache
def _keep_imports() -> None:
    """What was imported is there to stay. Python looks at all of it every ten seconds or so, for half a second.

    Only before a process's first training: a later one would also keep what is left of those before it.
    """
    gc.freeze()


def train_loop(config: dict[str, AnyJob]) -> str | int | None:
    """Train from the last checkpoint, or from the start, to the end of the plan: what each worker process runs.

    Returns what stopped it, if a restart would not help; or the step after which it stopped because it was asked to;
    else nothing. Every worker meets that at the same place, and Ray carries what rank 0 returns: a
    file could not be written where the storage is full or gone.
    """
    from umbrella.training.parallel import Agreed, rank_and_world_size, together

    try:
        with together():
            worker = config["job"].worker()
        return worker.run()
    except (Agreed, FloatingPointError) as error:
        return str(error)
    except UserError as error:
        if rank_and_world_size()[1] > 1:
            raise  # the others are not here and wait for this worker: as one that died, it ends them
        return str(error)


def run_job(job: AnyJob, here: bool = False) -> None:
    """Run a training to its end. One whose folder holds checkpoints goes on from the newest whole one.

    Args:
        here: in this process, with one worker, instead of in processes that Ray Train starts.

    Raises:
        UserError: what stopped it, or made workers die more often than ``resources.max_failures``; and the checkpoint
            from which it could go on.
        Stopped: it was asked to stop, and it wrote a checkpoint or its workers are gone.
    """
    folder = Path(job.folder)
    check_writable(folder, "the folder of the training")
    for file in (stop_file(folder), workers_file(folder)):
        file.unlink(missing_ok=True)  # of a run before this one
    try:
        trainer = make_trainer(job, here)
        outcome = (trainer.fit() if here else _fit_in_thread(trainer, folder)).return_value
    except WorkerGroupError as error:
        attempts = job.settings.resources.max_failures + 1
        what = cause(next(iter(error.worker_failures.values()), error))
        tries = f"{attempts} attempt{'s' if attempts > 1 else ''}"
        outcome = f"in {tries} (resources.max_failures) a worker died: {what}"
    if isinstance(outcome, str):
        latest = latest_checkpoint(folder)
        none = "there is no checkpoint yet" if folder.is_dir() else f"its checkpoints are gone with {folder}"
        raise UserError(
            f"the training stopped: {outcome}; {f'the last good checkpoint is {latest}' if latest else none}"
        )
    if outcome is not None:
        raise Stopped(
            f"stopped after step {outcome}, with a checkpoint; the same command, with name={folder.name}, goes on"
        )


def stopped_at_once(folder: str | Path) -> Stopped:
    """The end of a training that did not write a checkpoint after it was asked to stop."""
    name = Path(folder).name
    return Stopped(f"SIGTERM: the training stopped at once; the same command, with name={name}, goes on")


class NoteLostWorkers(UserCallback):
    """Removes ``workers_file`` when a worker has failed: Ray Train then ends the others too.

    It runs in the process of Ray Train's controller.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def after_exception(self, *_: Any, **__: Any) -> None:
        """See ``UserCallback``."""
        workers_file(self.folder).unlink(missing_ok=True)


def _fit_in_thread(trainer: TorchTrainer, folder: Path) -> Result:
    """``trainer.fit()`` in a thread: in the main one it replaces the handler of SIGINT by one that ends the process.

    Raises:
        Stopped: the training was asked to stop, and its workers are gone. Ray Train would wait for new ones.
    """
    fitted: Future[Result] = Future()

    def fit() -> None:
        try:
            fitted.set_result(trainer.fit())
        except BaseException as error:
            fitted.set_exception(error)

    Thread(target=fit, daemon=True, name="fit").start()
    while not wait([fitted], timeout=LOOK).done:
        if stop_file(folder).exists() and not workers_file(folder).exists():
            raise stopped_at_once(folder)
    return fitted.result()


def cause(error: BaseException) -> str:
    """What a worker died of, in one line: the exception that it raised, or what Ray says; of a traceback, its end."""
    named = "" if isinstance(error, (RayError, WorkerGroupError, UserError)) else f"{type(error).__name__}: "
    lines = f"{named}{error}".splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return " ".join(" ".join(lines[frames[-1] + 1 :] if frames else lines).split())[:300]


def make_trainer(job: AnyJob, here: bool = False) -> TorchTrainer:
    """The trainer of a job. Its checkpoints are not Ray's: what lies in the folder, whole, is what there is."""
    resources, folder = job.settings.resources, Path(job.folder)
    least, most = resources.least_workers, resources.workers
    per_worker = {"CPU": resources.cpus_per_worker}
    report = [TuneReportCallback()] if job.is_trial else []
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    return TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=0 if here else most if least == most else (least, most),
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=resources.grow_every,
            placement_strategy="PACK",  # as few hosts as there can be: gradients then stay within them
        ),
        run_config=RunConfig(
            storage_path=str(folder / "ray"),
            name=job.name,
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=None if here else [NoteLostWorkers(folder), *report],
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )


def progress_line(report: dict[str, Any]) -> str:
    """One line on how far a training is."""
    wanted = ("train/loss", "train/lr", "train/samples_per_second", "train/waiting_for_data")
    shown = [name for name in report if name in wanted or name.startswith("eval/")]
    values = "  ".join(f"{name.removeprefix('train/')} {report[name]:.4g}" for name in shown)
    return f"step {report['step']}/{report['steps']}  epoch {report['epoch']:.2f}  {values}"

"""Run a training on Ray: in workers that Ray Train starts, or in this process."""

import gc
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from functools import cache, partial
from pathlib import Path
from pkgutil import resolve_name
from threading import Thread
from typing import Any

from ray.exceptions import RayActorError, RayError
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
from umbrella.fileio import check_writable
from umbrella.paths import RAY
from umbrella.training.checkpoint_files import latest_checkpoint
from umbrella.training.job import Job
from umbrella.training.progress_log import format_duration
from umbrella.training.stop_signal import stop_file, workers_file

LANGUAGE_MODEL = partial(resolve_name, "umbrella.training.language_model:LanguageModelTask")
"""The task of a ``LanguageModelJob``."""
POLL_INTERVAL = 0.5
"""Seconds between two looks whether a training that was asked to stop still has workers."""


def train_loop(config: dict[str, Job]) -> str | int | None:
    """Train from the last checkpoint, or from the start, to the end of the plan. Every rank runs it.

    Returns:
        An error message if a restart would not help, the step if the training stopped on request, else None. Every rank
        returns at the same place. Ray carries what rank 0 returns: a file could not be written where the storage is
        full or gone.
    """
    from umbrella.training.distributed import ErrorOnAllRanks, raise_on_all_ranks, rank_and_world_size
    from umbrella.training.trainer import make_trainer

    try:
        with raise_on_all_ranks():
            job = config["job"]
            task = job.task()
            _keep_imports()
            trainer = make_trainer(job, task)
        return trainer.run()
    except (ErrorOnAllRanks, FloatingPointError) as error:
        return str(error)
    except UserError as error:
        if rank_and_world_size()[1] > 1:
            raise  # the others are not here and wait for this rank: as one that died, it ends them
        return str(error)


@cache
def _keep_imports() -> None:
    """Exempt what was imported from garbage collection, which looks at it every ten seconds, for half a second.

    Only before a process's first training: a later one would also keep what is left of those before it.
    """
    gc.freeze()


def run_job(job: Job, in_process: bool = False) -> None:
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
        trainer = make_torch_trainer(job, in_process)
        outcome = (trainer.fit() if in_process else _fit_in_thread(trainer, folder)).return_value
    except WorkerGroupError as error:
        attempts = job.settings.resources.max_failures + 1
        what = describe_first_failure(error.worker_failures or {0: error})
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


class WorkerFailureCallback(UserCallback):
    """Says that a worker has failed, and removes ``workers_file``: Ray Train then ends the others too.

    It runs in the process of Ray Train's controller.
    """

    def __init__(self, job: Job) -> None:
        self.folder, self.start_time = job.folder, job.start_time

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """See ``UserCallback``."""
        workers_file(self.folder).unlink(missing_ok=True)
        elapsed, why = format_duration(time.time() - self.start_time), describe_first_failure(worker_exceptions)
        print(f"{elapsed}  a worker died: {why}", flush=True)


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
    while not wait([fitted], timeout=POLL_INTERVAL).done:
        if stop_file(folder).exists() and not workers_file(folder).exists():
            raise stopped_at_once(folder)
    return fitted.result()


def describe_first_failure(failures: Mapping[int, BaseException]) -> str:
    """The cause of the first of several failures in one line: where a process is gone, the others fail for want of it.

    Args:
        failures: rank to error.
    """
    causes = [getattr(error, "health_check_failure", error) for error in failures.values()]  # Ray Train wraps it
    return describe_failure(min(causes, key=lambda error: not isinstance(error, RayActorError)))


def describe_failure(error: BaseException) -> str:
    """The cause of a worker's failure in one line: its exception, or Ray's message; of a traceback, the end."""
    named = "" if isinstance(error, (RayError, WorkerGroupError, UserError)) else f"{type(error).__name__}: "
    lines = f"{named}{error}".splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return " ".join(" ".join(lines[frames[-1] + 1 :] if frames else lines).split())[:300]


def make_torch_trainer(job: Job, in_process: bool = False) -> TorchTrainer:
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
            num_workers=0 if in_process else most if least == most else (least, most),
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=resources.grow_every,
            placement_strategy="PACK",  # as few hosts as there can be: gradients then stay within them
        ),
        run_config=RunConfig(
            storage_path=str(folder / RAY),
            name=job.name,
            logging_config=LoggingConfig(log_level="CRITICAL"),  # tracebacks; WorkerFailureCallback says it in a line
            callbacks=None if in_process else [WorkerFailureCallback(job), *report],
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )

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
from umbrella.paths import RAY, SETTINGS, STOP, WORKERS
from umbrella.training.checkpoint_files import latest_checkpoint
from umbrella.training.progress_log import format_duration
from umbrella.training.task import Job

LANGUAGE_MODEL = partial(resolve_name, "umbrella.training.language_model:LanguageModelTask")
"""The task of a ``LanguageModelJob``."""
POLL_INTERVAL = 0.5
"""Seconds between two checks whether a training that was asked to stop still has workers."""


def train_loop(config: dict[str, Job]) -> str | int | None:
    """Train from the last checkpoint, or from the start, to the end of the plan. Every rank runs it.

    Returns:
        An error message if a restart would not help, the step if the training stopped on request, else None. Ray
        transfers the value of rank 0, which also works where the storage is full or gone.
    """
    from umbrella.training.distributed import ErrorOnAllRanks, raise_on_all_ranks, rank_and_world_size
    from umbrella.training.trainer import make_trainer

    try:
        with raise_on_all_ranks():
            job = config["job"]
            task = job.task()
            _freeze_imports()
            trainer = make_trainer(job, task)
        return trainer.run()
    except (ErrorOnAllRanks, FloatingPointError) as error:
        return str(error)
    except UserError as error:
        if rank_and_world_size()[1] > 1:
            raise  # the other ranks wait for this one; Ray Train ends them when this one fails
        return str(error)


@cache
def _freeze_imports() -> None:
    """Exclude imported objects from garbage collection, which would take half a second every ten seconds.

    Only before the first training of a process: later it would also keep what earlier trainings left.
    """
    gc.freeze()


def run_job(job: Job, in_process: bool = False) -> None:
    """Run a training to its end, from its newest complete checkpoint if there is one.

    Args:
        in_process: in this process with one worker, instead of in processes that Ray Train starts.

    Raises:
        UserError: the training failed, or workers died more often than ``resources.max_failures``. The message names
            the checkpoint from which it can continue.
        Stopped: the training was asked to stop, and wrote a checkpoint or has no workers any more.
    """
    folder = Path(job.folder)
    check_writable(folder, "the folder of the training")
    for name in (STOP, WORKERS):
        (folder / name).unlink(missing_ok=True)  # from an earlier run
    try:
        trainer = make_torch_trainer(job, in_process)
        outcome = (trainer.fit() if in_process else _fit_in_thread(trainer, folder)).return_value
    except WorkerGroupError as error:
        attempts = job.settings.resources.max_failures + 1
        why = describe_failure(*(error.worker_failures or {0: error}).values())
        outcome = f"in {attempts} attempt{'s' * (attempts > 1)} (resources.max_failures) a worker died: {why}"
    if isinstance(outcome, str):
        latest = latest_checkpoint(folder)
        none = "there is no checkpoint yet" if folder.is_dir() else f"its checkpoints are gone with {folder}"
        raise UserError(
            f"the training stopped: {outcome}; {f'the last good checkpoint is {latest}' if latest else none}"
        )
    if outcome is not None:
        raise Stopped(f"stopped after step {outcome} with a checkpoint; {resume_command(folder)} continues")


def stopped_without_checkpoint(folder: str | Path) -> Stopped:
    """Make the exception for a training that wrote no checkpoint after it was asked to stop."""
    return Stopped(f"SIGTERM: the training stopped without a new checkpoint; {resume_command(folder)} continues")


def resume_command(folder: str | Path) -> str:
    """Return the command that resumes a training. That of a baseline is the one that started it."""
    name = Path(folder).name
    own = (Path(folder) / SETTINGS).exists()
    return f"umbrella train --resume {name}" if own else f"the same command with name={name}"


class WorkerFailureCallback(UserCallback):
    """Print that a worker failed, and remove the file ``WORKERS``, because Ray Train then ends the other workers too.

    It runs in the process of Ray Train's controller.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """See ``UserCallback``."""
        (Path(self.job.folder) / WORKERS).unlink(missing_ok=True)
        elapsed, why = format_duration(time.time() - self.job.start_time), describe_failure(*worker_exceptions.values())
        print(f"{elapsed}  a worker died: {why}", flush=True)


def _fit_in_thread(trainer: TorchTrainer, folder: Path) -> Result:
    """Call ``trainer.fit()`` in a thread: in the main thread it would replace the handler of SIGINT.

    Raises:
        Stopped: the training was asked to stop and has no workers any more. Ray Train would wait for new ones.
    """
    fitted: Future[Result] = Future()

    def fit() -> None:
        try:
            fitted.set_result(trainer.fit())
        except BaseException as error:
            fitted.set_exception(error)

    Thread(target=fit, daemon=True, name="fit").start()
    while not wait([fitted], timeout=POLL_INTERVAL).done:
        if (folder / STOP).exists() and not (folder / WORKERS).exists():
            raise stopped_without_checkpoint(folder)
    return fitted.result()


def describe_failure(*errors: BaseException) -> str:
    """Describe why workers failed in one line: the exception without its traceback, or Ray's message.

    Args:
        errors: of all workers. If one process died, the others failed as a consequence, and it is described.
    """
    originals = [getattr(error, "health_check_failure", error) for error in errors]  # Ray Train wraps it
    error = min(originals, key=lambda error: not isinstance(error, RayActorError))
    kind = "" if isinstance(error, (RayError, WorkerGroupError, UserError)) else f"{type(error).__name__}: "
    lines = f"{kind}{error}".splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return " ".join(" ".join(lines[frames[-1] + 1 :] if frames else lines).split())[:300]


def make_torch_trainer(job: Job, in_process: bool = False) -> TorchTrainer:
    """Make the ``TorchTrainer`` of a job. Checkpoints are written by ``CheckpointWriter``, not by Ray Train."""
    resources = job.settings.resources
    least, most = resources.least_workers, resources.workers
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    callbacks = [WorkerFailureCallback(job)] + ([TuneReportCallback()] if job.is_trial else [])
    return TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=0 if in_process else most if least == most else (least, most),
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=resources.grow_every,
            placement_strategy="PACK",  # on as few hosts as possible: gradients then stay within them
        ),
        run_config=RunConfig(
            storage_path=str(Path(job.folder) / RAY),
            name=job.name,
            logging_config=LoggingConfig(log_level="CRITICAL"),  # no tracebacks; the callback prints one line
            callbacks=None if in_process else callbacks,
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )

"""One trial of a sweep: the function that Ray Tune runs in the trial's process."""

import gc
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray import tune

from umbrella.base import Stopped, UserError
from umbrella.training.checkpoint_files import latest_checkpoint
from umbrella.training.job import Job
from umbrella.training.launch import run_job
from umbrella.training.settings import ResourceSettings
from umbrella.tuning.search_space import format_point
from umbrella.tuning.sweep_files import FAILED, load_status, make_trial_folder, save_status, trial_id_of


def run_trial(config: dict[str, Any], sweep: Job) -> None:
    """Train with the values of a trial; Ray Tune gets every evaluation.

    With one worker the training runs in this process, which takes one trial after the other: the time to start a
    process and to import is spent once. With several workers, Ray Train starts their processes for each trial.

    The folder of the training says how far it is and how it ended; Ray Tune's own state may be older after a kill. So
    the evaluations of an earlier attempt are reported again first, and a trial that has ended is not run again.

    Args:
        config: the point: names of settings to values.
        sweep: the job of the sweep, in whose folder the trial gets one.

    Raises:
        UserError: what the training stopped for.
    """
    folder = make_trial_folder(sweep.folder, str(tune.get_context().get_trial_id()), config)
    end = load_status(folder)
    if not end:  # an evaluation without its checkpoint is done again
        latest = latest_checkpoint(folder)
        truncate_history(folder, read_training_state(latest).step if latest else 0)
    for row in read_history(folder):
        tune.report(row)
    if end and end.state == FAILED:  # Ray Tune tries again; where the settings are to blame, that changes nothing
        raise UserError(end.reason)
    if end:
        return
    job = replace(
        sweep,
        settings=sweep.settings.with_values(config),
        tracking={**sweep.tracking, "name": format_point(config), "trial": trial_id_of(folder)},
        folder=str(folder),
        start_time=time.time(),
        is_trial=True,
    )
    try:
        with suppress(Stopped):
            run_job(job, in_process=job.settings.resources.single_worker)
    except UserError as error:
        save_status(folder, FAILED, str(error))
        raise
    finally:
        free_memory()


def free_memory() -> None:
    """Make room for another training in this process: a model refers to itself, and its memory on a GPU is kept."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def trial_resources(resources: ResourceSettings) -> dict[str, float]:
    """What Ray Tune reserves for a trial's own process."""
    if resources.single_worker:
        gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
        return {"CPU": resources.cpus_per_worker, **gpus}
    # It waits for its workers; if it held a CPU itself, two cores would soon hold nothing but waiting trials.
    return {"node:__internal_head__": 0.001}

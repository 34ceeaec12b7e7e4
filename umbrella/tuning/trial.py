"""One trial of a sweep: the function that Ray Tune runs in the trial's process."""

import gc
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray import tune

from umbrella.base import Stopped, UserError
from umbrella.training.checkpoint_files import latest_checkpoint, read_history, read_training_state, truncate_history
from umbrella.training.launch import run_job
from umbrella.training.task import Job
from umbrella.tuning.search_space import format_point
from umbrella.tuning.sweep_files import FAILED, load_outcome, make_trial_folder, save_outcome, trial_id_of


def run_trial(config: dict[str, Any], sweep: Job) -> None:
    """Train with the values of a trial and report every evaluation to Ray Tune.

    With one worker, the training runs in this process, which Ray Tune reuses for the next trial. With several workers,
    Ray Train starts their processes for each trial.

    The state of a trial is read from its folder, because Ray Tune's own state may be older after a kill: evaluations of
    earlier attempts are reported again, and a trial that has ended does not run again.

    Args:
        config: the point of the trial: dotted names to values.
        sweep: job of the sweep.

    Raises:
        UserError: the training failed because of its settings or data.
    """
    folder = make_trial_folder(sweep.folder, config)
    outcome = load_outcome(folder)
    if not outcome:  # drop evaluations after the latest checkpoint: they are repeated
        latest = latest_checkpoint(folder)
        truncate_history(folder, read_training_state(latest).step if latest else 0)
    for row in read_history(folder):
        tune.report(row)
    if outcome and outcome.state == FAILED:  # a retry would fail again
        raise UserError(outcome.reason)
    if outcome:
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
        save_outcome(folder, FAILED, str(error))
        raise
    finally:  # free memory for the next trial: models contain reference cycles, and CUDA caches memory
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

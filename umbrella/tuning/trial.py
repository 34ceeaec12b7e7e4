"""One trial of a sweep: what Ray Tune's trial process runs. It imports little, see ``training.job``."""

from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from umbrella.training.job import Job, run_job
from umbrella.tuning.space import label


def run_trial(config: dict[str, Any], job: Job) -> None:
    """One trial: a training with the point's values, whose reports Ray Tune sees."""
    trial_id = tune.get_context().get_trial_id()
    job = replace(
        job,
        settings=job.settings.with_values(config),
        tracking={**job.tracking, "name": label(config), "trial": trial_id},
        folder=f"{job.folder}/trials/{trial_id}",
    )
    run_job(job, [TuneReportCallback()])

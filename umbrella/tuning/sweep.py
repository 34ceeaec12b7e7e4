"""A sweep: Ray Tune over trainings, from settings to a ranked answer; in MLflow, one run per trial under a parent."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.data.intake import load_splits
from umbrella.data.loading import Progress
from umbrella.data.settings import MaskPolicy
from umbrella.storage import check_writable
from umbrella.tracking.ending import mend
from umbrella.tracking.runs import Tracker
from umbrella.tracking.store import open_experiment, tracking_uri
from umbrella.training.job import Job
from umbrella.training.run import check, make_job, start_ray, trainings_that_fit
from umbrella.tuning.monitor import Monitor
from umbrella.tuning.report import Trial, draw, rank, write_csv
from umbrella.tuning.space import build_space, count_trials, possible_values
from umbrella.tuning.trial import run_trial


@dataclass(frozen=True)
class Answer:
    """What a sweep found. ``trials``: best first. ``folder``: ranking.csv, the figure and the checkpoints."""

    trials: list[Trial]
    best: Settings
    folder: Path
    figure: Path
    tracking: str


def run_sweep(settings: Settings, given: frozenset[str], progress: Progress) -> Answer:
    """Run every trial of ``tune.space`` and rank them.

    Args:
        given: names set on the command line; they are fixed, not swept.
        progress: draws a bar over slow preparations.

    Raises:
        UserError: whatever is wrong with settings or data, before anything starts; or no trial succeeded.
    """
    space = build_space(settings, given)
    storage = Path(settings.resources.storage).absolute()
    check_writable(storage, f"resources.storage={settings.resources.storage}")
    masks = possible_masks(settings, given)
    splits = load_splits(settings, progress, masks)
    check(settings, splits, masks, settings.tune.metric)

    name = time.strftime("sweep-%Y%m%d-%H%M%S")
    folder = storage / "sweeps" / name
    uri = tracking_uri(storage, settings.tracking.uri)
    experiment = open_experiment(uri, settings.experiment, storage)
    mend(uri, experiment, storage)
    dashboard = start_ray(settings.resources, log_to_driver=False)
    if dashboard:
        print(f"Ray dashboard, while this runs: {dashboard}", flush=True)
    at_once = trainings_that_fit(settings.resources, ray.cluster_resources())
    at_once = min(at_once, settings.tune.concurrent or at_once)

    parent = Tracker.start(uri, experiment, name, folder=folder)
    parent.params({k: v for k, v in settings.flat().items() if k not in space})
    parent.text(settings.to_yaml(), "settings.yaml")
    job = make_job(settings, splits, {"uri": uri, "experiment": experiment, "parent": parent.run_id}, str(folder))
    parent.params(job.data)
    parent.inputs(job.datasets)
    total = count_trials(settings, given)
    try:
        with Monitor(uri, folder, total, settings.tune.metric) as monitor:
            results = _tuner(job, space, at_once, monitor, storage, name).fit()
        answer = _answer(settings, rank(results, settings.tune.metric, settings.tune.mode), folder, uri)
        parent.artifact(answer.figure)
        parent.artifact(folder / "ranking.csv")
        parent.metrics({f"best/{settings.tune.metric}": answer.trials[0].metric or 0.0}, 0)
        parent.tags({"best.trial": answer.trials[0].name, "best.checkpoint": answer.trials[0].checkpoint})
        parent.end()
    except BaseException as error:
        parent.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", "failed")
        raise
    return answer


def possible_masks(settings: Settings, given: frozenset[str] = frozenset()) -> list[MaskPolicy]:
    """Every mask policy that a trial can have. What is drawn from a range of numbers keeps the settings' value.

    Raises:
        UserError: swept values that do not go together.
    """
    listed = [
        name
        for name, entry in settings.tune.space.items()
        if name.startswith("mask.") and name not in given and entry.keys() & {"grid", "choice"}
    ]
    points = product(*(possible_values(settings, name, given) for name in listed))
    try:
        return [settings.with_values(dict(zip(listed, point, strict=True))).mask for point in points]
    except UserError as error:
        raise UserError(f"tune.space: {error}") from None


def _tuner(job: Job, space: dict[str, Any], at_once: int, monitor: Monitor, storage: Path, name: str) -> tune.Tuner:
    settings = job.settings.tune
    # Ray Tune's own table would be printed over ours.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    scheduler = ASHAScheduler(
        time_attr="training_iteration",
        max_t=10**6,  # beyond any number of evaluations: a trial that is not stopped early ends by itself
        grace_period=settings.grace,
        reduction_factor=settings.reduction,
    )
    return tune.Tuner(
        # A trial waits for its workers; if it held a CPU itself, two cores would soon hold nothing but waiting trials.
        tune.with_resources(tune.with_parameters(run_trial, job=job), {"node:__internal_head__": 0.001}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=settings.metric,
            mode=settings.mode,
            num_samples=settings.samples,
            max_concurrent_trials=at_once,
            scheduler=scheduler,
        ),
        run_config=tune.RunConfig(name=name, storage_path=str(storage / "sweeps"), callbacks=[monitor], verbose=0),
    )


def _answer(settings: Settings, trials: Sequence[Trial], folder: Path, uri: str) -> Answer:
    if not trials or trials[0].metric is None:
        raise UserError(f"no trial finished an evaluation; what each one raised lies in {folder}/*/error.txt")
    figure = folder / "metric.png"
    draw(trials, settings.tune.metric, figure)
    write_csv(trials, settings.tune.metric, folder / "ranking.csv")
    best = settings.with_values(trials[0].point)
    return Answer(list(trials), best, folder, figure, uri)

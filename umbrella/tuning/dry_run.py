"""Dry run of a sweep or a training: print what would run, and start nothing."""

from collections.abc import Iterator, Sequence

import joblib
import torch
from rich.console import Console

from umbrella.base import ProgressBar, pluralise
from umbrella.cluster import SPARE_CPUS, max_concurrent_trainings
from umbrella.config import Settings
from umbrella.training.run import load_and_check
from umbrella.tuning.parameter import Parameter
from umbrella.tuning.search import count_trials, list_points
from umbrella.tuning.search_space import format_point, is_fixed, read_space, variants
from umbrella.tuning.sweep import possible_masks

MAX_TRIALS = 20
"""Maximum number of trials that a dry run lists."""


def dry_run(settings: Settings, fixed: frozenset[str], progress: ProgressBar, console: Console) -> None:
    """Print the resolved settings, the trials, the resources and the number of samples.

    Args:
        settings: of the sweep or the training.
        fixed: names set on the command line; they are not swept.
        progress: wraps slow preparations in a progress bar.
        console: where to print.

    Raises:
        UserError: as ``load_and_check``.
    """
    parameters, total = read_space(settings, fixed), count_trials(settings, fixed)
    resources = settings.resources
    console.print(settings.to_yaml(), markup=False, highlight=False, soft_wrap=True)
    for line in _describe_trials(settings, fixed, total):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    not_swept = [name for name in settings.tune.space if is_fixed(name, fixed)]
    if not_swept:
        console.print(f"set on the command line, so not swept: {', '.join(not_swept)}", markup=False)
    never = set(settings.tune.space) - set(not_swept) - {parameter.name for parameter in parameters}
    if never:
        console.print(f"not swept, because the conditions are never met: {', '.join(sorted(never))}", markup=False)
    for line in describe_search(settings, parameters):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    most = f"{resources.min_workers} to {resources.workers}" if resources.min_workers else resources.workers
    per_trial = f"{most} workers of {resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
    console.print(f"resources: {per_trial} per trial, and {SPARE_CPUS:g} CPUs for other processes of Ray")
    if resources.ray_address == "local":
        machine = {"CPU": joblib.cpu_count(), "GPU": torch.cuda.device_count()}
        concurrent = max_concurrent_trainings(resources, [machine])
        console.print(
            f"this machine has {machine['CPU']:g} CPUs and {machine['GPU']:g} GPUs: {concurrent} concurrent trials"
        )
    shapes = variants(settings, parameters, "modalities", "model")
    splits = load_and_check(settings, progress, possible_masks(settings, fixed), shapes, dry_run=True)
    console.print(f"samples: train {len(splits.train)}, validation {len(splits.validation)}")


def describe_search(settings: Settings, parameters: Sequence[Parameter]) -> Iterator[str]:
    """Describe search, scheduler, metric and time limit, one line each."""
    tune = settings.tune
    drawn = [parameter.name for parameter in parameters if parameter.kind != "grid"]
    draws = [f"{pluralise(tune.samples, 'draw')} of {', '.join(drawn)}"] if drawn else []
    grids = ["every combination of the grids"] if len(drawn) < len(parameters) else []
    combinations = ", each with ".join(grids + draws) or "the settings without changes"
    optuna = f"Optuna (TPE), {pluralise(tune.samples, 'point')} at most, each proposed from earlier results"
    seeds = f"; {tune.seeds} seeds each, from {settings.seed} on" if tune.seeds > 1 else ""
    yield f"search: {optuna if tune.search == 'optuna' else combinations}{seeds}"
    after = f"after {pluralise(tune.grace, 'evaluation')} each"
    yield {
        "asha": f"early stopping: ASHA, {after}, keeps the best 1/{tune.reduction} at each rung",
        "none": "early stopping: none",
    }[tune.scheduler]
    yield f"best trial: {'largest' if tune.mode == 'max' else 'smallest'} {tune.metric}"
    yield f"budget: {f'{tune.hours:g} hours' if tune.hours else 'no time limit'}"


def _describe_trials(settings: Settings, fixed: frozenset[str], total: int) -> Iterator[str]:
    """Describe the number of trials, and the first trials or the search space of Optuna."""
    if settings.tune.search == "optuna":
        yield f"trials: {total} at most; Optuna chooses values from"
        yield from (f"  {parameter.name}: {parameter.description}" for parameter in read_space(settings, fixed))
        return
    yield f"trials: {total}"
    every = list_points(settings, fixed)
    yield from (f"  {format_point(point)}" for point in every[:MAX_TRIALS])
    if len(every) > MAX_TRIALS:
        yield f"  ... and {len(every) - MAX_TRIALS} more"

"""Dry run of a sweep or a training: print what would run, and start nothing."""

from collections.abc import Iterator, Sequence

import joblib
import torch
from rich.console import Console

from umbrella.base import ProgressBar, pluralise
from umbrella.cluster import SPARE_CPUS, max_concurrent_trainings
from umbrella.config import Settings
from umbrella.training.run import load_and_check
from umbrella.tuning.search import count_trials, list_points
from umbrella.tuning.search_space import Parameter, format_point, is_fixed, read_space, variants

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
    parameters, tune, resources = read_space(settings, fixed), settings.tune, settings.resources

    def show(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    show(settings.to_yaml())
    if tune.search == "optuna":
        show(f"trials: {count_trials(settings, fixed)} at most; Optuna chooses values from")
        for parameter in parameters:
            show(f"  {parameter.name}: {parameter.description}")
    else:
        points = list_points(settings, fixed)
        show(f"trials: {len(points)}")
        for point in points[:MAX_TRIALS]:
            show(f"  {format_point(point)}")
        if len(points) > MAX_TRIALS:
            show(f"  ... and {len(points) - MAX_TRIALS} more")
    not_swept = [name for name in tune.space if is_fixed(name, fixed)]
    if not_swept:
        show(f"set on the command line, so not swept: {', '.join(not_swept)}")
    never = set(tune.space) - set(not_swept) - {parameter.name for parameter in parameters}
    if never:
        show(f"not swept, because the conditions are never met: {', '.join(sorted(never))}")
    for line in _describe_search(settings, parameters):
        show(line)
    most = f"{resources.min_workers} to {resources.workers}" if resources.min_workers else resources.workers
    per_trial = f"{most} workers of {resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
    show(f"resources: {per_trial} per trial, and {SPARE_CPUS:g} CPUs for other processes of Ray")
    if resources.ray_address == "local":
        machine = {"CPU": joblib.cpu_count(), "GPU": torch.cuda.device_count()}
        concurrent = max_concurrent_trainings(resources, [machine])
        show(f"this machine has {machine['CPU']:g} CPUs and {machine['GPU']:g} GPUs: {concurrent} concurrent trials")
    trials = variants(settings, parameters, "mask", "modalities", "model")
    splits = load_and_check(settings, progress, trials, dry_run=True)
    show(f"samples: train {len(splits.train)}, validation {len(splits.validation)}")


def _describe_search(settings: Settings, parameters: Sequence[Parameter]) -> Iterator[str]:
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
    asha = f"ASHA, {after}, keeps the best 1/{tune.reduction} at each rung"
    yield f"early stopping: {asha if tune.scheduler == 'asha' else 'none'}"
    yield f"best trial: {'largest' if tune.mode == 'max' else 'smallest'} {tune.metric}"
    yield f"budget: {f'{tune.hours:g} hours' if tune.hours else 'no time limit'}"

"""What a sweep would run, and what it found, in words."""

from collections.abc import Iterator, Sequence

import joblib
import torch
from rich.console import Console

from umbrella.base import ProgressBar, pluralise
from umbrella.config import Settings
from umbrella.data.loading import Progress, counted
from umbrella.training.capacity import SPARE_CPUS, trainings_that_fit
from umbrella.training.run import load_checked
from umbrella.tuning.parameter import Parameter
from umbrella.tuning.search import count_trials, list_points
from umbrella.tuning.search_space import format_point, is_fixed, read_space, variants
from umbrella.tuning.sweep import possible_masks

SHOWN = 20
"""Trials that a dry run lists."""


def dry_run(settings: Settings, given: frozenset[str], progress: ProgressBar, console: Console) -> None:
    """Print the resolved settings, the trials, the resources asked for and the sample counts; start nothing.

    Raises:
        UserError: as ``load_and_check``.
    """
    parameters, total = read_space(settings, given), count_trials(settings, given)
    resources = settings.resources
    console.print(settings.to_yaml(), markup=False, highlight=False, soft_wrap=True)
    for line in _trial_lines(settings, given, total):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    fixed = [name for name in settings.tune.space if is_fixed(name, given)]
    if fixed:
        console.print(f"set on the command line, so not swept: {', '.join(fixed)}", markup=False)
    never = set(settings.tune.space) - set(fixed) - {parameter.name for parameter in parameters}
    if never:
        console.print(f"never swept, as their conditions are never met: {', '.join(sorted(never))}", markup=False)
    for line in describe_search(settings, parameters):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    most = f"{resources.min_workers} to {resources.workers}" if resources.min_workers else resources.workers
    per_trial = f"{most} workers of {resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
    console.print(f"resources: {per_trial} per trial, and {SPARE_CPUS:g} CPUs for Ray's helpers")
    if resources.ray_address == "local":
        machine = {"CPU": joblib.cpu_count(), "GPU": torch.cuda.device_count()}
        at_once = max_concurrent_trainings(resources, machine)
        console.print(f"this machine has {machine['CPU']:g} CPUs and {machine['GPU']:g} GPUs: {at_once} trials at once")
    shapes = variants(settings, parameters, "modalities", "model")
    splits = load_checked(settings, progress, possible_masks(settings, given), shapes, dry_run=True)
    console.print(f"samples: train {len(splits.train)}, validation {len(splits.validation)}")


def describe_search(settings: Settings, parameters: Sequence[Parameter]) -> Iterator[str]:
    """Search, scheduler and budget in words, a line each."""
    asked = settings.tune
    drawn = [parameter.name for parameter in parameters if parameter.kind != "grid"]
    draws = [f"{counted(asked.samples, 'draw')} of {', '.join(drawn)}"] if drawn else []
    grids = ["every combination of the grids"] if len(drawn) < len(parameters) else []
    combinations = ", each with ".join(grids + draws) or "the settings as they are"
    optuna = f"Optuna (TPE), {pluralise(asked.samples, 'point')} at most, each proposed from those before"
    seeds = f"; {asked.seeds} seeds each, from {settings.seed} on" if asked.seeds > 1 else ""
    yield f"search: {optuna if asked.search == 'optuna' else combinations}{seeds}"
    after = f"after {pluralise(asked.grace, 'evaluation')} each"
    yield {
        "asha": f"early stopping: ASHA, {after}, keeps the best 1/{asked.reduction} at each rung",
        "none": "early stopping: none",
    }[asked.scheduler]
    yield f"decides: {'largest' if asked.mode == 'max' else 'smallest'} {asked.metric}"
    yield f"budget: {f'{asked.hours:g} hours' if asked.hours else 'no limit of time'}"


def _trial_lines(settings: Settings, given: frozenset[str], total: int) -> Iterator[str]:
    """How many trials, and which: the first of them, or what Optuna chooses from."""
    if settings.tune.search == "optuna":
        yield f"trials: {total} at most, with values that Optuna chooses from"
        yield from (f"  {parameter.name}: {parameter.description}" for parameter in read_space(settings, given))
        return
    yield f"trials: {total}"
    every = list_points(settings, given)
    yield from (f"  {format_point(point)}" for point in every[:SHOWN])
    if len(every) > SHOWN:
        yield f"  ... and {len(every) - SHOWN} more"

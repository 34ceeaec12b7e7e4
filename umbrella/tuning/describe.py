"""What a sweep would run, and what it found, in words."""

import os
from pathlib import Path

from rich.console import Console

from umbrella.base import masked
from umbrella.config import Settings
from umbrella.data.loading import count_samples
from umbrella.training.run import SPARE_CPUS, trainings_that_fit
from umbrella.tuning.report import ranking_table
from umbrella.tuning.space import build_space, count_trials, grid_points, label
from umbrella.tuning.sweep import Answer


def dry_run(settings: Settings, given: frozenset[str], console: Console) -> None:
    """Print the resolved settings, the trials, the resources asked for and the sample counts; start nothing."""
    build_space(settings, given)
    resources = settings.resources
    console.print(settings.to_yaml(), markup=False, highlight=False, soft_wrap=True)
    console.print(f"trials: {count_trials(settings, given)}")
    for point in grid_points(settings, given):
        console.print(f"  {label(point)}", markup=False)
    fixed = [name for name in settings.tune.space if name in given]
    if fixed:
        console.print(f"set on the command line, so not swept: {', '.join(fixed)}", markup=False)
    most = f"{resources.min_workers} to {resources.workers}" if resources.min_workers else resources.workers
    per_trial = f"{most} workers of {resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
    console.print(f"resources: {per_trial} per trial, and {SPARE_CPUS:g} CPUs for Ray's helpers")
    if not (resources.address or os.environ.get("RAY_ADDRESS")):
        import torch

        machine = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
        at_once = trainings_that_fit(resources, machine)
        console.print(f"this machine has {machine['CPU']:g} CPUs and {machine['GPU']:g} GPUs: {at_once} trials at once")
    counts = count_samples(settings)
    console.print("samples: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def print_answer(answer: Answer, console: Console) -> None:
    """Print the ranking, the best trial's settings, where its checkpoint lies, and how to look further."""
    best, metric = answer.trials[0], answer.best.tune.metric
    console.print(ranking_table(answer.trials, metric))
    lines = {
        "best trial": f"{best.name}: {metric} {best.metric:.4g} at step {best.step}",
        "its settings": " ".join(f"{name}={value}" for name, value in best.point.items()),
        "its checkpoint": _short(best.checkpoint or ""),
        "figure": _short(answer.figure),
        "ranking": _short(answer.folder / "ranking.csv"),
        "runs in MLflow": f"make ui   (or: mlflow ui --backend-store-uri {masked(answer.tracking)})",
    }
    for name, value in lines.items():
        console.print(f"{name + ':':<16}{value}", markup=False, highlight=False, soft_wrap=True)


def _short(path: str | Path) -> str:
    """A path, relative where it lies below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

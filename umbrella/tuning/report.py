"""The result of a sweep: the report page with its figures, the ranking as CSV, and the settings of the best trial."""

import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import sqrt
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from umbrella.base import mask_secrets
from umbrella.config import Settings
from umbrella.html import number, render
from umbrella.paths import BEST, RANKING, REPORT
from umbrella.plots import png_data_url, save_png
from umbrella.training.progress_log import FINISHED
from umbrella.training.settings import ResourceSettings
from umbrella.tuning import figures
from umbrella.tuning.results import (
    Configuration,
    Trial,
    compute_importance,
    format_interval,
    ranked_trials,
    ranking_table,
    swept_names,
    with_seeds,
    write_ranking,
)
from umbrella.tuning.settings import TuneSettings

MAX_ROWS = 100
"""Maximum number of rows of a table on the page; ranking.csv holds all rows."""
SCRIPT = "experiments/train.py"
PATHS = ("data.train", "data.validation", "data.test", "data.root", "resources.storage")
"""Settings that are paths."""
OPTIONAL_PATHS = (
    "model.checkpoint",
    "model.chat_template",
    "resources.store",
    "resources.node_store",
    "resources.upload",
)
"""Settings that are paths if such a file exists, and otherwise names on the Hugging Face Hub or URLs."""


@dataclass(frozen=True)
class Cost:
    """Total time of trials, and the CPU- and GPU-hours that they reserved."""

    hours: float
    cpu_hours: float
    gpu_hours: float


@dataclass(frozen=True)
class ReportFiles:
    """Files that ``write_report`` wrote. ``best``, ``command`` and ``overrides`` are empty if no trial has a metric."""

    page: Path
    ranking: Path
    figure_files: dict[str, Path]
    """Names (metric, ranking, curves, importance, times) to PNG files. Some may be missing."""
    best: Path | None = None
    """best.yaml, the settings of the best trial."""
    command: str = ""
    """Shell command that trains with ``best``."""
    overrides: str = ""
    """Shell command for the same training with overrides only."""

    @property
    def all(self) -> list[Path]:
        """All files."""
        return [self.page, self.ranking, *self.figure_files.values(), *([self.best] if self.best else [])]


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep. ``configurations`` and ``trials`` are sorted, best first."""

    configurations: list[Configuration]
    trials: list[Trial]
    best_settings: Settings
    """Settings of the best trial."""
    folder: Path
    files: ReportFiles
    tracking_uri: str
    warning: str = ""
    """See ``chance_warning``."""


def best_trial(configurations: Sequence[Configuration]) -> Trial | None:
    """The best trial of the best configuration; None if it has no metric or failed."""
    best = configurations[0].trials[0] if configurations else None
    return best if best and best.metric is not None and not best.failed else None


def compute_cost(trials: Sequence[Trial], resources: ResourceSettings) -> Cost:
    """Compute the cost of trials. Each counts with the maximum number of workers."""
    hours = sum(t.seconds or 0 for t in trials) / 3600
    held = hours * resources.workers
    return Cost(hours, held * resources.cpus_per_worker, held * resources.gpus_per_worker)


def write_report(
    configurations: Sequence[Configuration], settings: Settings, folder: Path, subjects: int = 0, warning: str = ""
) -> ReportFiles:
    """Write ``ranking.csv``, ``best.yaml``, the PNGs and ``report.html`` into the sweep's folder.

    Args:
        configurations: sorted by ``rank_configurations``.
        settings: of the sweep.
        subjects: number of subjects in the validation split; 0 if unknown.
        warning: see ``chance_warning``.
    """
    trials, metric = ranked_trials(configurations), settings.tune.metric
    ranking = folder / RANKING
    write_ranking(configurations, metric, ranking)  # first, in case that a figure fails
    best, file, commands = best_trial(configurations), None, {}
    if best:
        training, file = training_settings(settings, best.point), folder / BEST
        write_best(training, file)
        commands = {
            "command": training_command(file.absolute()),
            "overrides": training_command(*override_arguments(training, best.point)),
        }
    found = compute_importance(trials)
    figure_files = {}
    if any(c.mean is not None for c in configurations):
        figure_files["metric"] = save_png(folder / "metric.png", figures.draw_metric, configurations, metric)
    if with_seeds(configurations) and figure_files:
        figure_files["ranking"] = save_png(folder / "ranking.png", figures.draw_ranking, configurations, metric)
    if any(t.curve for t in trials):
        figure_files["curves"] = save_png(folder / "curves.png", figures.draw_curves, configurations, metric)
    if found.shares:
        figure_files["importance"] = save_png(folder / "importance.png", figures.draw_importance, found)
    if any(t.started is not None for t in trials):
        figure_files["times"] = save_png(folder / "times.png", figures.draw_times, trials)
    files = ReportFiles(folder / REPORT, ranking, figure_files, file, **commands)
    starts = [t.started for t in trials if t.started is not None]
    page = render(
        Path(__file__).with_name("report.html"),
        {
            "value": _value,
            "hours": "{:.3g}".format,
            "duration": format_duration,
            "interval": format_interval,
            "cost": lambda ts: compute_cost(ts, settings.resources),
        },
        name=folder.name,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        settings=settings,
        metric=metric,
        configurations=configurations,
        seeds=with_seeds(configurations),
        trials=trials,
        names=swept_names(trials),
        lacking=any(len(t.point) < len(swept_names(trials)) for t in trials),
        state_counts=Counter(t.state for t in trials),
        not_finished=sorted((t for t in trials if t.state != FINISHED), key=lambda t: not t.failed),
        best=best,
        files=files,
        images={name: png_data_url(file.read_bytes()) for name, file in figure_files.items()},
        importance=found,
        subjects=subjects,
        warning=warning,
        margin=_binomial_margin(configurations[0].mean, subjects) if best and "accuracy" in metric else None,
        wall=max((t.started + (t.seconds or 0) for t in trials if t.started is not None), default=0.0)
        - min(starts, default=0.0),
        max_rows=MAX_ROWS,
    )
    files.page.write_text(page, encoding="utf-8", errors="backslashreplace")
    return files


def _binomial_margin(share: float | None, subjects: int) -> float | None:
    """Half-width of the 95% interval of a share of subjects, by the normal approximation, for classes of equal size."""
    return 1.96 * sqrt(share * (1 - share) / subjects) if share is not None and 0 < share < 1 and subjects else None


def _value(value: Any) -> str:
    """Format a swept value: 8×8×8, 0.0012, last_assistant."""
    if isinstance(value, list | tuple) and all(isinstance(v, int) for v in value):
        return "×".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float | None) -> str:
    """Format seconds: ``42 s``, ``12 min 05 s``, ``3 h 20 min``; empty if unknown."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{number(whole // 3600)} h {whole % 3600 // 60:02d} min"


def training_settings(settings: Settings, point: dict[str, Any]) -> Settings:
    """Settings of a single training that repeats a trial.

    Paths become absolute, so that the training runs from any folder. The name and the search space are reset.

    Args:
        settings: of the sweep.
        point: values of the trial.
    """
    trial = settings.with_values(point)
    flat = trial.flat()
    paths = {name: _absolute(flat[name]) for name in PATHS}
    paths |= {name: _absolute(flat[name]) for name in OPTIONAL_PATHS if Path(flat[name]).exists()}
    tune = TuneSettings(metric=trial.tune.metric, mode=trial.tune.mode)
    return trial.with_values(paths).model_copy(update={"name": "", "tune": tune})


def _absolute(value: Any) -> Any:
    """Make a path, or each path of a list, absolute. An empty string stays empty."""
    if isinstance(value, str):
        return str(Path(value).absolute()) if value else value
    return [_absolute(path) for path in value]


def override_arguments(settings: Settings, named: Collection[str] = ()) -> list[str]:
    """Command-line arguments for all settings that differ from the defaults, and for those in ``named``."""
    defaults = Settings().flat()
    changed = {k: v for k, v in settings.flat().items() if k in named or k not in defaults or defaults[k] != v}
    return [f"{name}={_format_override(value)}" for name, value in changed.items()]


def _format_override(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def training_command(*arguments: str | Path) -> str:
    """Shell command that starts a training with these files and overrides."""
    return shlex.join(["python", SCRIPT, *map(str, arguments)])


def write_best(settings: Settings, file: Path) -> None:
    """Write settings to a YAML file for ``experiments/train.py``."""
    head = f"# The best trial of {file.parent.name}. Run it again: {training_command(file.absolute())}\n"
    file.write_text(head + settings.to_yaml(), encoding="utf-8")


def print_result(result: SweepResult, console: Console) -> None:
    """Print the ranking, the best trial, the command that repeats it, and the files of the report."""
    best, metric, files = result.trials[0], result.best_settings.tune.metric, result.files
    first = result.configurations[0]
    console.print(ranking_table(result.configurations, metric))
    seeds = f", over seeds {format_interval(first)}" if len(first.trials) > 1 else ""
    lines = {
        "best trial": f"{best.name}: {metric} {best.metric:.4g} at step {best.step}{seeds}",
        "its settings": " ".join(f"{name}={value}" for name, value in best.point.items()),
        "train it again": training_command(_short_path(files.best or "")),
        "its checkpoint": _short_path(best.checkpoint or ""),
        "ranking": _short_path(files.ranking),
        "report": files.page.absolute().as_uri(),
        "runs in MLflow": f"make ui   (or: mlflow ui --backend-store-uri {mask_secrets(result.tracking_uri)})",
    }
    for name, value in lines.items():
        console.print(f"{name + ':':<16}{value}", markup=False, highlight=False, soft_wrap=True)
    if result.warning:
        console.print(result.warning, markup=False, highlight=False, soft_wrap=True)


def _short_path(path: str | Path) -> str:
    """The path, relative if it is below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

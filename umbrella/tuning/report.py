"""The result of a sweep: the report page with its figures, the ranking as CSV, and the settings of the best trial."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

from rich.console import Console

from umbrella.base import pluralise
from umbrella.config import Settings
from umbrella.html import relative_link, render
from umbrella.paths import BEST, EVALUATIONS, FOLDS, RANKING, REPORT, storage_of
from umbrella.plots import png_data_url, save_png
from umbrella.tracking.mlflow_logger import DESCRIPTION, WINNER
from umbrella.tracking.store import tracking_uri, ui_command
from umbrella.training.progress_log import format_duration
from umbrella.tuning import figures
from umbrella.tuning.results import (
    Configuration,
    Trial,
    best_trial,
    compute_importance,
    format_interval,
    ranked_trials,
    swept_names,
    with_seeds,
    write_ranking,
)
from umbrella.tuning.search_space import format_value
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.trial_table import ranking_table

MAX_ROWS = 100
"""Maximum number of rows of a table on the page; ranking.csv holds all rows."""
EVALUATION_LINKS = "<!-- evaluations -->"
"""The place on the page of what ``link_evaluations`` writes."""
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
class SweepResult:
    """The result of a sweep. ``configurations`` and ``trials`` are sorted, best first."""

    configurations: list[Configuration]
    trials: list[Trial]
    best_settings: Settings
    """Settings of the best trial."""
    folder: Path
    """Folder of the sweep, which holds the files of the report."""
    tracking_uri: str
    warning: str = ""
    """See ``chance_warning``."""


def describe_sweep(configurations: Sequence[Configuration], tune: TuneSettings, warning: str) -> str:
    """Describe a sweep in three sentences: what was asked, what won, and by how much. The warning follows.

    Args:
        configurations: sorted by ``rank_configurations``; the first one has a metric.
        warning: see ``chance_warning``.
    """

    def score(c: Configuration) -> str:
        return format_interval(c) if len(c.metrics) > 1 else f"{c.mean:.4g}"

    trials, first = ranked_trials(configurations), configurations[0]
    names = ", ".join(swept_names(trials)) or "the settings as they are"
    size, change = ("largest", "less") if tune.mode == "max" else ("smallest", "more")
    lead = "No other settings have a value."
    if len(configurations) > 1 and (second := configurations[1]).mean is not None:
        distance = abs((first.mean or 0.0) - second.mean)
        lead = f"The next best, {second.name}, has {score(second)}, which is {distance:.4g} {change}."
    asked = f"{pluralise(len(trials), 'trial')} compared {names} for the {size} {tune.metric}."
    return " ".join(filter(None, [asked, f"The winner is {first.name} with {score(first)}.", lead, warning]))


def trial_tags(configurations: Sequence[Configuration], metric: str) -> dict[str, dict[str, str]]:
    """Return the tags of the run of each trial by its id: whether it won, and its settings, place and end in words."""
    tags = {}
    for place, configuration in enumerate(configurations, 1):
        for t in configuration.trials:
            score = f"no {metric}" if t.metric is None else f"{metric} {t.metric:.4g} at step {t.step}"
            end = t.state if t.failed or not t.reason else f"{t.state}, {t.reason}"  # a failure may name subjects
            text = f"Settings: {t.name}. Place {place} of {len(configurations)}: {score}. State: {end}."
            tags[t.trial_id] = {WINNER: "yes" if t is best_trial(configurations) else "no", DESCRIPTION: text}
    return tags


def write_report(
    configurations: Sequence[Configuration],
    settings: Settings,
    folder: Path,
    subjects: int = 0,
    warning: str = "",
    mlflow: str = "",
) -> list[Path]:
    """Write ``ranking.csv``, ``best.yaml``, the PNGs and ``report.html`` into the sweep's folder.

    Args:
        configurations: sorted by ``rank_configurations``.
        settings: of the sweep.
        subjects: number of subjects in the validation split; 0 if unknown.
        warning: see ``chance_warning``.
        mlflow: address of the sweep's run; empty without a server.

    Returns:
        The files. Without a trial that has a metric and did not fail, there is no ``best.yaml``; figures without
        content are left out.
    """
    trials, metric, resources = ranked_trials(configurations), settings.tune.metric, settings.resources
    write_ranking(configurations, metric, folder / RANKING)  # first, in case that a figure fails
    best, files = best_trial(configurations), [folder / REPORT, folder / RANKING]
    command, margin = "", 0.0
    if best:
        training, file = training_settings(settings, best.point), (folder / BEST).absolute()
        command = training_command(file)
        head = f"# The best trial of {folder.name}. Run it again: {command}\n"
        file.write_text(head + training.to_yaml(), encoding="utf-8")
        files.append(file)
        mean = configurations[0].mean or 0.0
        if "accuracy" in metric and subjects and 0 < mean < 1:  # by the normal approximation, for classes of equal size
            margin = 1.96 * sqrt(mean * (1 - mean) / subjects)
    importance, curves = compute_importance(trials), any(t.curve for t in trials)
    measured = any(c.mean is not None for c in configurations)
    draw = {
        "metric": measured and partial(figures.draw_metric, configurations, metric),
        "ranking": measured and with_seeds(configurations) and partial(figures.draw_ranking, configurations, metric),
        "curves": curves and partial(figures.draw_curves, configurations, metric),
        "importance": importance.shares and partial(figures.draw_importance, importance),
        "times": curves and partial(figures.draw_times, trials),
    }
    drawn = {name: save_png(folder / f"{name}.png", function) for name, function in draw.items() if function}
    worker_hours = resources.workers / 3600
    spans = [(t.started, t.started + (t.seconds or 0)) for t in trials if t.started is not None]
    page = render(
        Path(__file__).with_name("report.html"),
        {
            "value": format_value,
            "duration": format_duration,
            "interval": format_interval,
            "link": lambda path: relative_link(path, folder),
            "cpu_hours": lambda seconds: f"{(seconds or 0) * worker_hours * resources.cpus_per_worker:.3g}",
            "gpu_hours": lambda seconds: f"{(seconds or 0) * worker_hours * resources.gpus_per_worker:.3g}",
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
        best=best,
        command=command,
        images={name: png_data_url(file.read_bytes()) for name, file in drawn.items()},
        importance=importance,
        subjects=subjects,
        warning=warning,
        mlflow=mlflow,
        ui=ui_command(tracking_uri(storage_of(folder), settings.tracking.uri), storage_of(folder)),
        margin=margin,
        wall=max(end for _, end in spans) - min(start for start, _ in spans) if spans else None,
        total=sum(t.seconds or 0 for t in trials),
        max_rows=MAX_ROWS,
    )
    (folder / REPORT).write_text(page, encoding="utf-8", errors="backslashreplace")
    return [*files, *drawn.values()]


def link_evaluations(folder: Path) -> None:
    """Add links to the evaluations of a sweep to its report, which is written before them."""
    evaluations = storage_of(folder) / EVALUATIONS
    pages = {"evaluation": evaluations / folder.name, "evaluation of all folds": evaluations / f"{folder.name}{FOLDS}"}
    found = {words: page / REPORT for words, page in pages.items() if (page / REPORT).exists()}
    links = [f'<a href="{relative_link(page, folder)}">{words}</a>,' for words, page in found.items()]
    text = (folder / REPORT).read_text(encoding="utf-8").replace(EVALUATION_LINKS, " ".join(links))
    (folder / REPORT).write_text(text, encoding="utf-8")


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


def training_command(file: str | Path) -> str:
    """Shell command that starts a training with a file of settings."""
    return shlex.join(["umbrella", "train", str(file)])


def print_result(result: SweepResult, console: Console) -> None:
    """Print the ranking, the best trial, the command that repeats it, and the files of the report."""
    best, metric, first = result.trials[0], result.best_settings.tune.metric, result.configurations[0]
    console.print(ranking_table(result.configurations, metric, console.width))
    seeds = f", over seeds {format_interval(first)}" if len(first.trials) > 1 else ""
    lines = {
        "best trial": f"{best.name}: {metric} {best.metric:.4g} at step {best.step}{seeds}",
        "its settings": " ".join(f"{name}={value}" for name, value in best.point.items()),
        "train it again": training_command(_short_path(result.folder / BEST)),
        "its checkpoint": _short_path(best.checkpoint or ""),
        "ranking": _short_path(result.folder / RANKING),
        "report": (result.folder / REPORT).absolute().as_uri(),
        "runs in MLflow": ui_command(result.tracking_uri, storage_of(result.folder)),
    }
    for name, value in lines.items():
        console.print(f"{name + ':':<16}{value}", markup=False, highlight=False, soft_wrap=True)
    if result.warning:
        console.print(result.warning, markup=False, highlight=False, soft_wrap=True)


def _short_path(path: str | Path) -> str:
    """The path, relative if it is below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

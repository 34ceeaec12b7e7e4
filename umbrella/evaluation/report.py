"""The result of an evaluation, its page, its files and its table on the terminal."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from umbrella.config import Settings
from umbrella.evaluation import figures
from umbrella.evaluation.predictions import Prediction, write_predictions
from umbrella.evaluation.subgroups import Estimate, Group
from umbrella.fileio import write_csv
from umbrella.html import render
from umbrella.paths import METRICS, REPORT
from umbrella.plots import png_data_url, save_png

AS_ASKED = "as_asked"
CONDITIONS = (AS_ASKED, "shuffled", "text_only")
"""The unchanged conversations; with other subjects' volumes; without volumes. The last two are controls."""
CONDITION_NAMES = {AS_ASKED: "as asked", "shuffled": "other subjects' volumes", "text_only": "text only"}
MAIN_METRIC = {"classes": "balanced_accuracy", "numbers": "mae", "texts": "token_f1"}
"""The metric that stands for a target: over subjects, and by likelihood where there are candidates."""
MAIN_REFERENCE = {"classes": "chance", "numbers": "mean/mae", "texts": ""}
"""The reference, one of ``Group.references``, that the main metric is compared with."""
OTHER_METRICS = {
    "classes": [
        "likelihood/subjects/balanced_accuracy",
        "generated/subjects/balanced_accuracy",
        "generated/votes/balanced_accuracy",
        "likelihood/subjects/auc",
    ],
    "numbers": ["generated/subjects/rmse", "generated/subjects/pearson", "generated/conversations/mae"],
    "texts": ["generated/conversations/rouge_l", "generated/conversations/exact"],
}
"""Metrics that tables of subgroups show beside the main one."""
UNDEFINED = Estimate(float("nan"), float("nan"), float("nan"))
METRIC_NAMES = {"mae": "MAE", "rmse": "RMSE", "r2": "R²", "auc": "ROC area", "brier": "Brier score", "f1": "F1 (macro)"}
METRIC_NAMES |= {"token_f1": "token F1", "rouge_l": "ROUGE-L", "exact": "exact match", "pearson": "Pearson r"}
MAX_ROWS = 60
"""Subgroups that a table of the page shows; metrics.json has all."""


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one evaluation of one model on one split."""

    settings: Settings
    model: str
    """The path of the checkpoint."""
    split: str
    predictions: Mapping[str, Sequence[Prediction]]
    """Condition to predictions, in the order of the data."""
    groups: Mapping[str, Sequence[Group]]
    """Condition to the groups of ``subgroups.tabulate``."""
    facts: Mapping[str, str | int | float]
    """Shown above the metrics: data fingerprint, quarantined samples, seconds, processes."""
    notes: Sequence[str] = ()
    """Warnings, such as subjects that are also in the training split."""


Kind = Literal["best", "worst"]


@dataclass(frozen=True)
class Case:
    """One prediction that the report shows with its volumes."""

    prediction: Prediction
    kind: Kind
    pictures: tuple[bytes, ...]
    """A PNG of three planes for each volume, in reading order."""
    mapped: bool = False
    """Whether the pictures include occlusion maps."""


@dataclass
class TargetSection:
    """The section of the page about one target."""

    name: str
    whole: Group
    metric: str
    """Full name of the main metric: ``<way>/<level>/<metric>``."""
    conditions: list[tuple[str, Estimate]]
    """(name of the condition, main metric under it)."""
    breakdowns: dict[str, list[list[Group | None]]]
    """Key of a breakdown to its subgroups: for each one a group per condition, None where that has none."""
    pictures: dict[str, Path] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)

    @property
    def levels(self) -> list[str]:
        """``<way>/<level>`` of the metrics, in order."""
        return list(dict.fromkeys("/".join(name.split("/")[:2]) for name in self.whole.metrics))

    @property
    def metrics(self) -> list[str]:
        """Names of metrics without way and level; metrics of one class come last."""
        names = dict.fromkeys(name.split("/", 2)[2] for name in self.whole.metrics)
        return sorted(names, key=lambda name: "/" in name)

    @property
    def other_metrics(self) -> list[str]:
        """Metrics that tables of subgroups show beside the main one."""
        names = OTHER_METRICS[self.whole.kind]
        return [name for name in names if name in self.whole.metrics and name != self.metric]

    @property
    def reference(self) -> str:
        """The reference that the main metric is compared with."""
        return MAIN_REFERENCE[self.whole.kind]

    def scale(self, rows: Sequence[Sequence[Group | None]]) -> float:
        """The largest value that the bars of these subgroups show."""
        groups = [groups[0] for groups in rows if groups[0]]
        found = [n for g in groups for n in (*g.metrics.get(self.metric, ()), g.references.get(self.reference, 0.0))]
        return max((n for n in found if isfinite(n)), default=1.0) or 1.0


def make_section(result: EvaluationResult, whole: Group) -> TargetSection:
    """Make the section of a target.

    Args:
        whole: the group of all predictions of the target.
    """
    names = [
        f"{way}/{level}/{MAIN_METRIC[whole.kind]}"
        for way in ("likelihood", "generated")
        for level in ("subjects", "conversations")
    ]
    metric = next((name for name in names if name in whole.metrics), names[0])
    conditions = [name for name in CONDITIONS if name in result.groups]
    breakdowns: dict[str, dict[str, list[Group | None]]] = {}
    for i, condition in enumerate(conditions):
        for group in result.groups[condition]:
            if group.target == whole.target:
                row = breakdowns.setdefault(group.by, {}).setdefault(group.value, [None] * len(conditions))
                row[i] = group
    whole_row = breakdowns.pop("all")[whole.value]
    return TargetSection(
        name=whole.target,
        whole=whole,
        metric=metric,
        conditions=[
            (CONDITION_NAMES[name], group.metrics.get(metric, UNDEFINED))
            for name, group in zip(conditions, whole_row, strict=True)
            if group is not None
        ],
        breakdowns={by: list(rows.values()) for by, rows in breakdowns.items()},
    )


def write_evaluation(folder: Path, result: EvaluationResult, cases: Sequence[Case]) -> Path:
    """Write all files of an evaluation, each one atomically, and return the path of the page."""
    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        page = write_report(Path(temporary), result, cases)
        for condition, predictions in result.predictions.items():
            suffix = "" if condition == AS_ASKED else f"_{condition}"
            write_predictions(Path(temporary) / f"predictions{suffix}.jsonl", predictions)
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file == page):  # the page last
            os.replace(file, folder / file.name)
    return folder / page.name


def write_report(folder: Path, result: EvaluationResult, cases: Sequence[Case]) -> Path:
    """Write ``report.html``, ``metrics.json``, ``predictions.csv`` and the figures as PNG files.

    Args:
        folder: created if missing; existing files of these names are replaced.
        cases: predictions to show with their volumes, see ``inference.cases``.

    Returns:
        The path of the page, which is self-contained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_metrics(folder / METRICS, result)  # first: the metrics are kept if a figure fails
    _write_csv(folder / "predictions.csv", result)
    predictions = result.predictions[AS_ASKED]
    sections = [make_section(result, whole) for whole in result.groups[AS_ASKED] if whole.by == "all"]
    for number, section in enumerate(sections, start=1):
        section.cases = [case for case in cases if case.prediction.target == section.name]
        stem = f"{number}_{re.sub('[^A-Za-z0-9]+', '_', section.name)[:40].strip('_')}"
        section.pictures = _draw_figures(folder, stem, section, predictions)
    page = render(
        Path(__file__).with_name("report.html"),
        {
            "value": format_value,
            "interval": format_interval,
            "named": metric_name,
            "embedded": png_data_url,
            "image": lambda file: png_data_url(file.read_bytes()),
        },
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        result=result,
        settings=result.settings.evaluate,
        conversations=len(predictions),
        subjects=len({p.subject_id for p in predictions}),
        sections=sections,
        conditions=[CONDITION_NAMES[name] for name in CONDITIONS if name in result.groups],
        undefined=UNDEFINED,
        max_rows=MAX_ROWS,
    )
    file = folder / REPORT
    file.write_text(page, encoding="utf-8", errors="backslashreplace")
    return file


def print_evaluation(result: EvaluationResult, page: Path, console: Console) -> None:
    """Print the main metrics with intervals, references and controls, and the address of the page."""
    conditions = [name for name in CONDITIONS if name in result.groups]
    title = f"{result.split}: {len(result.predictions[AS_ASKED])} conversations"
    table = Table(title=title, title_justify="left")
    for column in ("target", "metric", *(CONDITION_NAMES[name] for name in conditions), "without looking", "invalid"):
        table.add_column(column)
    wholes = {name: {group.target: group for group in result.groups[name] if group.by == "all"} for name in conditions}
    for target, group in wholes[AS_ASKED].items():
        for name in _printed_metrics(group):
            cells = []
            for condition in conditions:
                whole = wholes[condition].get(target)
                estimate = whole.metrics.get(name, UNDEFINED) if whole else UNDEFINED
                interval = format_interval(estimate)
                cells.append(format_value(estimate.value) + (f" ({interval})" if interval else ""))
            way, level, metric = name.split("/", 2)
            reference = group.references.get(MAIN_REFERENCE[group.kind])
            invalid = f"{group.invalid} of {group.conversations}" if way == "generated" else ""
            table.add_row(target, f"{metric_name(metric)}, {way}, {level}", *cells, format_value(reference), invalid)
    console.print(table)
    console.print(f"evaluation:     {page.as_uri()}", markup=False, highlight=False, soft_wrap=True)


def format_value(number: float | None) -> str:
    """Format a metric: three decimals up to 1, else three significant digits; – where it is undefined."""
    if number is None or not isfinite(number):
        return "–"
    return f"{number:.3f}" if abs(number) <= 1 else f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def format_interval(estimate: Estimate) -> str:
    """Format an interval: ``0.71 to 0.92``; empty where it is undefined."""
    known = isfinite(estimate.low) and isfinite(estimate.high)
    return f"{format_value(estimate.low)} to {format_value(estimate.high)}" if known else ""


def metric_name(metric: str) -> str:
    """The name of a metric for people: ``recall of male``."""
    name, _, label = metric.partition("/")
    return METRIC_NAMES.get(name, name.replace("_", " ")) + (f" of {label}" if label else "")


def _printed_metrics(group: Group) -> Iterator[str]:
    """The main metric of each way of answering, over subjects where it is defined there."""
    for way in ("likelihood", "generated"):
        names = (f"{way}/{level}/{MAIN_METRIC[group.kind]}" for level in ("subjects", "votes", "conversations"))
        yield from [name for name in names if name in group.metrics][:1]


def _draw_figures(
    folder: Path, stem: str, section: TargetSection, predictions: Sequence[Prediction]
) -> dict[str, Path]:
    whole, own = section.whole, [p for p in predictions if p.target == section.name]
    pictures = {}

    def draw(name: str, *arguments: Any) -> None:
        pictures[name] = save_png(folder / f"{stem}_{name}.png", *arguments)

    if any(isfinite(estimate.value) for _, estimate in section.conditions):
        names = {"chance": "chance", "mean/mae": "always the mean training label"}
        lines = [(name, whole.references[key]) for key, name in names.items() if key in whole.references]
        rows = [(condition, estimate, format_value(estimate.value)) for condition, estimate in section.conditions]
        draw("controls", figures.draw_controls, rows, metric_name(MAIN_METRIC[whole.kind]), lines)
    matrices = [
        (name.replace("/", ",\n"), whole.confusion[name])
        for level in ("subjects", "conversations")
        for name in whole.confusion
        if name.endswith(f"/{level}")
    ]
    if matrices:
        draw("confusion", figures.draw_confusion, matrices, whole.classes)
    if whole.kind == "classes" and any(p.probabilities for p in own):
        draw("likelihood", figures.draw_likelihood, own, whole.classes)
    if whole.kind == "numbers" and any(p.said is not None for p in own):
        draw("scatter", figures.draw_scatter, own, section.name)
    return pictures


def _write_metrics(file: Path, result: EvaluationResult) -> None:
    """Write the groups of all conditions as JSON; undefined numbers are null."""
    groups = {condition: [asdict(g) for g in groups] for condition, groups in result.groups.items()}
    for group in (group for of_condition in groups.values() for group in of_condition):
        group["metrics"] = {name: dict(zip(Estimate._fields, e, strict=True)) for name, e in group["metrics"].items()}
    text = json.dumps(_nan_to_none(groups), ensure_ascii=False, indent=1, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _nan_to_none(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _nan_to_none(inner) for key, inner in content.items()}
    if isinstance(content, list | tuple):
        return [_nan_to_none(inner) for inner in content]
    return None if isinstance(content, float) and not isfinite(content) else content


def _write_csv(file: Path, result: EvaluationResult) -> None:
    """Write a row for each prediction under each condition, with a column for the probability of each label."""
    rows = [(condition, p) for condition, predictions in result.predictions.items() for p in predictions]
    labels = sorted({label for _, p in rows for label in p.probabilities})
    fields = ["task_id", "task_type", "subject_id", "target", "label", "truth", "text", "said"]
    fields += ["answer_nll", "answer_tokens"]

    def row(condition: str, p: Prediction) -> list[Any]:
        volumes = "; ".join(f"{modality}:{path}" for modality, path in p.volumes)
        metadata = json.dumps(dict(p.metadata), ensure_ascii=False, default=str)
        probabilities = [p.probabilities.get(label) for label in labels]
        return [condition, *(getattr(p, name) for name in fields), *probabilities, volumes, metadata]

    header = ["condition", *fields, *(f"p({label})" for label in labels), "volumes", "metadata"]
    write_csv(file, header, (row(condition, p) for condition, p in rows))

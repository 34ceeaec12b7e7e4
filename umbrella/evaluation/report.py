"""The result of an evaluation, its page, its files and its table on the terminal."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from umbrella.config import Settings
from umbrella.evaluation.calibration import Calibration
from umbrella.evaluation.comparison import ModelComparison
from umbrella.evaluation.confounds import ConfoundAnalysis, SiteDrop
from umbrella.evaluation.controls import AS_ASKED, CONDITION_NAMES, CONDITIONS
from umbrella.evaluation.figures import draw_confusion, draw_controls, draw_coverage, draw_likelihood, draw_scatter
from umbrella.evaluation.group_metrics import MAIN_METRIC, MAIN_REFERENCE, Estimate, Group, main_metrics
from umbrella.evaluation.image_use import ImageUse
from umbrella.evaluation.predictions import Prediction, write_predictions
from umbrella.evaluation.verdict import format_estimate, format_interval, format_value, make_verdict, metric_name
from umbrella.fileio import write_csv
from umbrella.html import render
from umbrella.paths import METRICS, REPORT
from umbrella.plots import png_data_url, save_png

OTHER_METRICS = {
    "classes": [
        "likelihood/subjects/balanced_accuracy",
        "generated/subjects/balanced_accuracy",
        "generated/votes/balanced_accuracy",
        "likelihood/subjects/auc",
    ],
    "choices": ["likelihood/conversations/accuracy", "generated/conversations/accuracy"],
    "numbers": ["likelihood/subjects/rmse", "likelihood/subjects/pearson", "generated/subjects/mae"],
    "texts": ["generated/conversations/rouge_l", "generated/conversations/exact"],
    "joint": [],
}
"""Metrics that tables of subgroups show beside the main one."""
UNDEFINED = Estimate(float("nan"), float("nan"), float("nan"))
MAX_ROWS = 60
"""Subgroups that a table of the page shows; metrics.json has all."""


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one evaluation of one model on one split."""

    settings: Settings
    model: str
    """The path of the checkpoint; of several folds, that of the settings of their trainings."""
    split: str
    predictions: Mapping[str, Sequence[Prediction]]
    """Condition to predictions, in the order of the data."""
    groups: Mapping[str, Sequence[Group]]
    """Condition to the groups of ``subgroups.tabulate``."""
    facts: Mapping[str, str | int | float]
    """Shown above the metrics: data fingerprint, quarantined samples, seconds, processes."""
    notes: Sequence[str] = ()
    """Warnings, such as subjects that are also in the training split."""
    image_use: Mapping[str, ImageUse] = field(default_factory=dict)
    """Target to how its answers depend on the image."""
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    """Target to its calibration."""
    confounds: Mapping[str, ConfoundAnalysis] = field(default_factory=dict)
    """By target; so is ``site_drop``."""
    site_drop: Mapping[str, SiteDrop] = field(default_factory=dict)
    comparisons: Sequence[ModelComparison] = ()
    name: str = ""
    """What people call the model; its path if empty."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Words to relative addresses, at the head of the page."""

    @property
    def verdicts(self) -> dict[str, str]:
        """Target to a sentence about what its result shows."""
        # A target with and without labels has two groups; the one with labels replaces that of texts.
        ordered = {c: sorted(of, key=lambda g: (g.target, g.kind != "texts")) for c, of in self.groups.items()}
        wholes = {c: {g.target: g for g in groups if g.by == "all"} for c, groups in ordered.items()}
        return {
            target: make_verdict(
                group,
                {c: of[target] for c, of in wholes.items() if c != AS_ASKED and target in of},
                [
                    p
                    for p in self.predictions[AS_ASKED]
                    if p.target == target and (p.label is None) == (group.kind == "texts")
                ],
                self.image_use.get(target),
                self.confounds.get(target),
                [one for one in self.comparisons if one.target == target],
                self.settings.evaluate.confidence,
            )
            for target, group in wholes[AS_ASKED].items()
            if group.kind != "joint"
        }


@dataclass(frozen=True)
class Case:
    """One prediction that the report shows with its volumes."""

    prediction: Prediction
    kind: str
    """"best" or "worst"."""
    pictures: tuple[bytes, ...]
    """A PNG of three planes for each volume, in reading order."""
    mapped: bool = False
    """Whether the pictures include occlusion maps."""


def _make_section(
    result: EvaluationResult, whole: Group, cases: Sequence[Case], folder: Path, number: int
) -> dict[str, Any]:
    """What the page shows of one target; ``whole`` is the group of all its predictions. Draws its figures."""
    conditions = [name for name in CONDITIONS if name in result.groups]
    breakdowns: dict[str, dict[str, list[Group | None]]] = {}  # by to value to a group for each condition that has one
    for i, condition in enumerate(conditions):
        for group in result.groups[condition]:
            if (group.target, group.kind) == (whole.target, whole.kind):
                row = breakdowns.setdefault(group.by, {}).setdefault(group.value, [None] * len(conditions))
                row[i] = group
    metric = (main_metrics(whole) or [f"generated/subjects/{MAIN_METRIC[whole.kind]}"])[0]
    reference = MAIN_REFERENCE[whole.kind]
    named = zip(conditions, breakdowns.pop("all")[whole.value], strict=True)
    wholes = [(CONDITION_NAMES[name], group) for name, group in named if group]
    values = [(name, group.metrics.get(metric, UNDEFINED)) for name, group in wholes]
    names = [name.split("/", 2) for name in whole.metrics]
    largest = {}
    for by, rows in breakdowns.items():
        groups = [group for group, *_ in rows.values() if group]
        shown = [n for g in groups for n in (*g.metrics.get(metric, ()), g.references.get(reference, 0.0))]
        largest[by] = max(filter(isfinite, shown), default=1.0) or 1.0
    stem = f"{number}_{re.sub('[^A-Za-z0-9]+', '_', whole.target)[:40].strip('_')}"
    own = [p for p in result.predictions[AS_ASKED] if p.target == whole.target and p.label is not None]
    drawings = list(_figures(whole, values, own))
    calibration = result.calibration.get(whole.target) if whole.kind in ("classes", "choices") else None
    if calibration:
        drawings.append(("coverage", draw_coverage, calibration.coverage, calibration.accuracy))
    figures = {name: (folder / f"{stem}_{name}.png", *drawn) for name, *drawn in drawings}
    if found := result.confounds.get(whole.target):
        scores = {f"model, matched for {name} (n = {size})": score for name, (size, score) in found.matched.items()}
        scores = {"model": found.model, **scores, "confounds alone": found.confounds_alone}
        drawn = [(name, score, format_value(score.value)) for name, score in scores.items()]
        lines = [(name, value) for name, value in whole.references.items() if name == "chance"]
        drawing = (draw_controls, drawn, metric_name(found.metric), lines, len(drawn) - 1)
        figures["confounds"] = folder / f"{stem}_confounds.png", *drawing
    return {
        "whole": whole,
        "metric": metric,
        "reference": reference,
        "wholes": wholes,
        "conditions": values,
        "breakdowns": {by: list(rows.values()) for by, rows in breakdowns.items()},
        "largest": largest,
        "levels": list(dict.fromkeys(f"{way}/{level}" for way, level, _ in names)),
        "metrics": sorted(dict.fromkeys(name for *_, name in names), key=lambda name: "/" in name),
        "other_metrics": [name for name in OTHER_METRICS[whole.kind] if name in whole.metrics and name != metric],
        "pictures": {name: save_png(*arguments) for name, arguments in figures.items()},
        "calibration": calibration,
        "cases": [case for case in cases if case.prediction.target == whole.target],
    }


def _figures(
    whole: Group, conditions: Sequence[tuple[str, Estimate]], predictions: Sequence[Prediction]
) -> Iterator[tuple[Any, ...]]:
    """(name, function that draws, its arguments) of each figure of a target."""
    if any(isfinite(estimate.value) for _, estimate in conditions):
        names = {"chance": "chance", "mean/mae": "always the mean training label"}
        lines = [(name, whole.references[key]) for key, name in names.items() if key in whole.references]
        rows = [(condition, estimate, format_value(estimate.value)) for condition, estimate in conditions]
        yield "controls", draw_controls, rows, metric_name(MAIN_METRIC[whole.kind]), lines
    matrices = [
        (name.replace("/", ",\n"), counts)
        for level in ("subjects", "conversations")
        for name, counts in whole.confusion.items()
        if name.endswith(f"/{level}")
    ]
    if matrices:
        yield "confusion", draw_confusion, matrices, whole.classes
    if whole.kind == "classes" and any(p.probabilities for p in predictions):
        yield "likelihood", draw_likelihood, predictions, whole.classes
    if whole.kind == "numbers" and any(p.answer is not None for p in predictions):
        yield "scatter", draw_scatter, predictions, whole.target


def write_evaluation(folder: Path, result: EvaluationResult, cases: Sequence[Case]) -> Path:
    """Write all files of an evaluation, each one atomically, and return the path of the page."""
    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        page = write_report(Path(temporary), result, cases)
        for condition, predictions in result.predictions.items():
            write_predictions(predictions_file(Path(temporary), condition), predictions)
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file == page):  # the page last
            os.replace(file, folder / file.name)
    return folder / page.name


def predictions_file(folder: Path, condition: str) -> Path:
    """Return the file of the predictions under a condition."""
    return folder / f"predictions{'' if condition == AS_ASKED else f'_{condition}'}.jsonl"


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
    if rows := [row for use in result.image_use.values() for row in use.table]:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        write_csv(folder / "image_use.csv", columns, (list(map(row.get, columns)) for row in rows))
    predictions = result.predictions[AS_ASKED]
    wholes = [group for group in result.groups[AS_ASKED] if group.by == "all"]
    sections = [_make_section(result, whole, cases, folder, number) for number, whole in enumerate(wholes, start=1)]
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
        conversations=_count_conversations(predictions),
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
    title = f"{result.split}: {_count_conversations(result.predictions[AS_ASKED])} conversations"
    table = Table(title=title, title_justify="left", collapse_padding=True)
    for column in ("target", "metric", *(CONDITION_NAMES[name] for name in conditions), "constant answer", "invalid"):
        table.add_column(column, overflow="fold")
    wholes = {name: {(g.target, g.kind): g for g in result.groups[name] if g.by == "all"} for name in conditions}
    for (target, kind), group in wholes[AS_ASKED].items():
        for name in main_metrics(group):
            cells = []
            for condition in conditions:
                whole = wholes[condition].get((target, kind))
                estimate = whole.metrics.get(name, UNDEFINED) if whole else UNDEFINED
                cells.append(format_estimate(estimate))
            way, level, metric = name.split("/", 2)
            reference = group.references.get(MAIN_REFERENCE[group.kind])
            counted = way == "generated" and group.invalid is not None
            invalid = f"{group.invalid} of {group.conversations}" if counted else ""
            table.add_row(target, f"{metric_name(metric)}, {way}, {level}", *cells, format_value(reference), invalid)
    console.print(table)
    for target, words in result.verdicts.items():
        console.print(f"{target}: {words}", markup=False, highlight=False, soft_wrap=True)
    for c in result.comparisons:
        values = f"{format_value(c.this)}, {c.other} {format_value(c.that)}"
        words = f"difference {format_value(c.difference.value)} ({format_interval(c.difference)})"
        line = f"{c.target}: {metric_name(c.metric)} {values}; {words}, p = {format_value(c.p_adjusted)} (Holm)"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"evaluation:     {page.as_uri()}", markup=False, highlight=False, soft_wrap=True)


def _count_conversations(predictions: Sequence[Prediction]) -> int:
    return len({p.conversation_id or p.task_id for p in predictions})


def _write_metrics(file: Path, result: EvaluationResult) -> None:
    """Write the groups of all conditions and the further analyses as JSON; undefined numbers are null."""
    content: dict[str, Any] = {name: [asdict(group) for group in groups] for name, groups in result.groups.items()}
    if result.image_use:
        content["image_use"] = {name: asdict(replace(use, table=())) for name, use in result.image_use.items()}
    if result.calibration:
        content["calibration"] = {target: asdict(of_one) for target, of_one in result.calibration.items()}
    for name, parts in (("confounds", result.confounds), ("site_drop", result.site_drop)):
        content |= {name: {target: asdict(part) for target, part in parts.items()}} if parts else {}
    content |= {"comparisons": [asdict(part) for part in result.comparisons]} if result.comparisons else {}
    text = json.dumps(_nan_to_none(content), ensure_ascii=False, indent=1, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _nan_to_none(content: Any) -> Any:
    if isinstance(content, Estimate):
        content = content._asdict()
    if isinstance(content, dict):
        return {key: _nan_to_none(inner) for key, inner in content.items()}
    if isinstance(content, list | tuple):
        return [_nan_to_none(inner) for inner in content]
    return None if isinstance(content, float) and not isfinite(content) else content


def _write_csv(file: Path, result: EvaluationResult) -> None:
    """Write a row for each prediction under each condition, with a column for the probability of each label.

    The probabilities of candidates of a question's own are one column of JSON.
    """
    rows = [(condition, p) for condition, predictions in result.predictions.items() for p in predictions]
    labels = sorted({label for _, p in rows if not p.candidates for label in p.probabilities})
    fields = ("task_id", "task_type", "subject_id", "target", "label", "truth", "text")
    answers = ("answer", "5%", "95%", "said", "answer_nll", "answer_tokens")

    def row(condition: str, p: Prediction) -> list[Any]:
        volumes = "; ".join(f"{modality}:{path}" for modality, path in p.volumes)
        metadata = json.dumps(dict(p.metadata), ensure_ascii=False, default=str)
        interval = p.number_interval if p.numbers else (None, None)
        values = [p.answer, *interval, p.predicted, p.answer_nll, p.answer_tokens]
        given = [getattr(p, name) for name in fields]
        own = json.dumps(dict(p.probabilities), ensure_ascii=False) if p.candidates else None
        shares = [None] * len(labels) if p.candidates else map(p.probabilities.get, labels)
        return [condition, *given, *values, *shares, own, volumes, metadata]

    columns = [*(f"p({label})" for label in labels), "probabilities"]
    header = ["condition", *fields, *answers, *columns, "volumes", "metadata"]
    write_csv(file, header, (row(condition, p) for condition, p in rows))

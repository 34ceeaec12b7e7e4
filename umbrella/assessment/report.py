"""The answer of an evaluation as files: one page to read, its pictures, and the numbers and rows to compute with."""

import re
from collections.abc import Sequence
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

from umbrella.assessment import figures
from umbrella.assessment.assessment import AS_ASKED, CONDITIONS, Assessment
from umbrella.assessment.cases import Case
from umbrella.assessment.files import write_answers, write_metrics
from umbrella.assessment.section import CHIEF, NOT_KNOWN, WORDS, Section, section_of
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.subgroups import Estimate
from umbrella.html import render
from umbrella.paths import METRICS, REPORT
from umbrella.plots import embedded, save

NAMES = {"mae": "MAE", "rmse": "RMSE", "r2": "R²", "auc": "ROC area", "brier": "Brier score", "f1": "F1 (macro)"}
NAMES |= {"token_f1": "token F1", "rouge_l": "ROUGE-L", "exact": "exact match", "pearson": "Pearson r"}
ROWS = 60
"""Parts of a breakdown that the page shows; all are in metrics.json."""


def write_report(folder: Path, assessment: Assessment, cases: Sequence[Case]) -> Path:
    """Write ``report.html``, ``metrics.json``, ``predictions.csv`` and the PNGs of the figures.

    Args:
        folder: made when missing; files of these names in it are replaced.
        cases: as ``cases.draw_cases`` gives them; none: the page shows none.

    Returns:
        The page. It needs nothing but itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics(folder / METRICS, assessment)  # the numbers first, before anything that could fail
    write_answers(folder / "predictions.csv", assessment)
    sections = [section_of(assessment, whole) for whole in assessment.groups[AS_ASKED] if whole.by == "all"]
    for number, section in enumerate(sections, start=1):
        section.cases = [case for case in cases if case.prediction.target == section.name]
        stem = f"{number}_{re.sub('[^A-Za-z0-9]+', '_', section.name)[:40].strip('_')}"
        section.pictures = _draw(folder, stem, section, assessment.predictions[AS_ASKED])
    asked = assessment.predictions[AS_ASKED]
    page = render(
        Path(__file__).with_name("report.html"),
        {
            "value": value,
            "interval": interval,
            "named": named,
            "embedded": embedded,
            "image": lambda file: embedded(file.read_bytes()),
        },
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        assessment=assessment,
        settings=assessment.settings.evaluate,
        conversations=len(asked),
        subjects=len({p.subject_id for p in asked}),
        sections=sections,
        conditions=[WORDS[name] for name in CONDITIONS if name in assessment.groups],
        unknown=NOT_KNOWN,
        shown=ROWS,
    )
    file = folder / REPORT
    file.write_text(page, encoding="utf-8", errors="backslashreplace")
    return file


def value(number: float | None) -> str:
    """A metric for people: three digits behind the point up to 1, else three that count; – where it is not defined."""
    if number is None or not isfinite(number):
        return "–"
    return f"{number:.3f}" if abs(number) <= 1 else f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def interval(estimate: Estimate) -> str:
    """Where the metric lies: ``0.71 to 0.92``; empty where that is not known."""
    known = isfinite(estimate.low) and isfinite(estimate.high)
    return f"{value(estimate.low)} to {value(estimate.high)}" if known else ""


def named(metric: str) -> str:
    """The name of a metric in words: ``recall of male``."""
    name, _, label = metric.partition("/")
    return NAMES.get(name, name.replace("_", " ")) + (f" of {label}" if label else "")


def _draw(folder: Path, stem: str, section: Section, predictions: Sequence[Prediction]) -> dict[str, Path]:
    whole, own = section.whole, [p for p in predictions if p.target == section.name]
    pictures = {}

    def draw(name: str, *about: Any) -> None:
        pictures[name] = save(folder / f"{stem}_{name}.png", *about)

    if any(isfinite(estimate.value) for _, estimate in section.conditions):
        known = {"chance": "chance", "mean/mae": "always the mean training label"}
        lines = [(words, whole.references[key]) for key, words in known.items() if key in whole.references]
        rows = [(condition, estimate, value(estimate.value)) for condition, estimate in section.conditions]
        draw("controls", figures.draw_controls, rows, named(CHIEF[whole.kind]), lines)
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

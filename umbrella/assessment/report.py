"""The answer of an evaluation as files: one page to read, its pictures, and the numbers and rows to compute with."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

from umbrella.assessment import figures
from umbrella.assessment.assessment import AS_ASKED, CONDITIONS, Assessment
from umbrella.assessment.cases import Case
from umbrella.drawing import embedded, save
from umbrella.evaluation.prediction import Prediction
from umbrella.evaluation.tables import Estimate, Group
from umbrella.pages import render

WORDS = {AS_ASKED: "as asked", "shuffled": "other subjects' volumes", "text_only": "text only"}
"""Condition to how the page calls it."""
NAMES = {"mae": "MAE", "rmse": "RMSE", "r2": "R²", "auc": "ROC area", "brier": "Brier score", "f1": "F1 (macro)"}
NAMES |= {"token_f1": "token F1", "rouge_l": "ROUGE-L", "exact": "exact match", "pearson": "Pearson r"}
CHIEF = {"classes": "balanced_accuracy", "numbers": "mae", "texts": "token_f1"}
"""What a target is judged by: over subjects, by likelihood where there is one."""
BESIDE = {
    "classes": [
        "likelihood/subjects/balanced_accuracy",
        "generated/subjects/balanced_accuracy",
        "generated/votes/balanced_accuracy",
        "likelihood/subjects/auc",
    ],
    "numbers": ["generated/subjects/rmse", "generated/subjects/pearson", "generated/conversations/mae"],
    "texts": ["generated/conversations/rouge_l", "generated/conversations/exact"],
}
"""Metrics of breakdowns beside the chief one."""
NOT_KNOWN = Estimate(float("nan"), float("nan"), float("nan"))
ROWS = 60
"""Parts of a breakdown that the page shows; all are in metrics.json."""


@dataclass
class Section:
    """What the page says of one target."""

    name: str
    whole: Group
    metric: str
    """What it is judged by, with way and level."""
    conditions: list[tuple[str, Estimate]]
    """(condition in words, the chief metric under it)."""
    breakdowns: dict[str, list[list[Group | None]]]
    """What makes the parts to their groups: for each part, one per condition, None where it has none."""
    pictures: dict[str, Path] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)

    @property
    def levels(self) -> list[str]:
        """``<way>/<level>`` of the whole, in order."""
        return list(dict.fromkeys("/".join(name.split("/")[:2]) for name in self.whole.metrics))

    @property
    def measures(self) -> list[str]:
        """Metrics of the whole, those of one class last."""
        names = dict.fromkeys(name.split("/", 2)[2] for name in self.whole.metrics)
        return sorted(names, key=lambda name: "/" in name)

    @property
    def beside(self) -> list[str]:
        """Metrics that stand in breakdowns beside the chief one."""
        there = [name for name in BESIDE[self.whole.kind] if name in self.whole.metrics]
        return [name for name in there if name != self.metric]

    @property
    def reference(self) -> str:
        """Which reference the chief metric is compared with."""
        return {"classes": "chance", "numbers": "mean/mae", "texts": ""}[self.whole.kind]

    @property
    def compared(self) -> bool:
        """Whether there are comparisons with a reference."""
        return "comparison_type" in self.breakdowns

    def scale(self, rows: Sequence[Sequence[Group | None]]) -> float:
        """The largest value that is drawn for these parts."""
        groups = [groups[0] for groups in rows if groups[0]]
        found = [n for g in groups for n in (*g.metrics.get(self.metric, ()), g.references.get(self.reference, 0.0))]
        return max((n for n in found if isfinite(n)), default=1.0) or 1.0


def write_report(folder: Path, assessment: Assessment, cases: Sequence[Case]) -> Path:
    """Write ``report.html``, ``metrics.json``, ``predictions.csv`` and the PNGs of the figures.

    Args:
        folder: made when missing; files of these names in it are replaced.
        cases: as ``cases.draw_cases`` gives them; none: the page shows none.

    Returns:
        The page. It needs nothing but itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_metrics(folder / "metrics.json", assessment)  # the numbers first, before anything that could fail
    _write_predictions(folder / "predictions.csv", assessment)
    sections = [_section(assessment, whole) for whole in assessment.groups[AS_ASKED] if whole.by == "all"]
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
    file = folder / "report.html"
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


def _section(assessment: Assessment, whole: Group) -> Section:
    choices = [
        f"{way}/{level}/{CHIEF[whole.kind]}"
        for way in ("likelihood", "generated")
        for level in ("subjects", "conversations")
    ]
    metric = next((name for name in choices if name in whole.metrics), choices[0])
    parts: dict[str, dict[str, list[Group | None]]] = {}
    there = [name for name in CONDITIONS if name in assessment.groups]
    for place, condition in enumerate(there):
        for group in assessment.groups[condition]:
            if group.target == whole.target:
                row = parts.setdefault(group.by, {}).setdefault(group.value, [None] * len(there))
                row[place] = group
    whole_row = parts.pop("all")[whole.value]
    return Section(
        name=whole.target,
        whole=whole,
        metric=metric,
        conditions=[
            (WORDS[name], group.metrics.get(metric, NOT_KNOWN))
            for name, group in zip(there, whole_row, strict=True)
            if group is not None
        ],
        breakdowns={by: list(of_value.values()) for by, of_value in parts.items()},
    )


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


def _write_metrics(file: Path, assessment: Assessment) -> None:
    groups = {condition: [asdict(g) for g in groups] for condition, groups in assessment.groups.items()}
    for group in (group for of_condition in groups.values() for group in of_condition):
        group["metrics"] = {name: dict(zip(Estimate._fields, e, strict=True)) for name, e in group["metrics"].items()}
    text = json.dumps(_without_nan(groups), ensure_ascii=False, indent=1, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _without_nan(inner) for key, inner in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(inner) for inner in content]
    return None if isinstance(content, float) and not isfinite(content) else content


def _write_predictions(file: Path, assessment: Assessment) -> None:
    rows = [(condition, p) for condition, own in assessment.predictions.items() for p in own]
    labels = sorted({label for _, p in rows for label in p.probabilities})
    fields = ["task_id", "task_type", "subject_id", "target", "label", "truth", "text", "said"]
    fields += ["answer_nll", "answer_tokens"]
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        table = csv.writer(out)
        table.writerow(["condition", *fields, *(f"p({label})" for label in labels), "volumes", "metadata"])
        for condition, p in rows:
            volumes = "; ".join(f"{modality}:{path}" for modality, path in p.volumes)
            metadata = json.dumps(dict(p.metadata), ensure_ascii=False, default=str)
            likely = [p.probabilities.get(label) for label in labels]
            table.writerow([condition, *(getattr(p, name) for name in fields), *likely, volumes, metadata])

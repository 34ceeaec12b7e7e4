"""The numbers and the answers of an evaluation as files to compute with."""

import json
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from umbrella.assessment.assessment import Assessment
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.subgroups import Estimate
from umbrella.fileio import write_csv


def write_metrics(file: Path, assessment: Assessment) -> None:
    """All groups of all conditions as JSON: condition to groups; what is not defined is null."""
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


def write_answers(file: Path, assessment: Assessment) -> None:
    """A row for each answer under each condition; probabilities have a column for each label."""
    rows = [(condition, p) for condition, own in assessment.predictions.items() for p in own]
    labels = sorted({label for _, p in rows for label in p.probabilities})
    fields = ["task_id", "task_type", "subject_id", "target", "label", "truth", "text", "said"]
    fields += ["answer_nll", "answer_tokens"]

    def row(condition: str, p: Prediction) -> list[Any]:
        volumes = "; ".join(f"{modality}:{path}" for modality, path in p.volumes)
        metadata = json.dumps(dict(p.metadata), ensure_ascii=False, default=str)
        likely = [p.probabilities.get(label) for label in labels]
        return [condition, *(getattr(p, name) for name in fields), *likely, volumes, metadata]

    header = ["condition", *fields, *(f"p({label})" for label in labels), "volumes", "metadata"]
    write_csv(file, header, (row(condition, p) for condition, p in rows))

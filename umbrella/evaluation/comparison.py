"""Comparison of two models on the same subjects and questions: paired bootstrap and permutation test."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from umbrella.base import UserError
from umbrella.evaluation.group_metrics import CHUNK, Estimate, estimate
from umbrella.evaluation.metrics import main_metric, main_metric_name
from umbrella.evaluation.predictions import Prediction, read_predictions, subject_answers
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.paths import PREDICTIONS

Question = tuple[str, str, str, str | float | None]
"""task_id, subject, target and label."""


@dataclass(frozen=True)
class ModelComparison:
    """The main metric of one target for this model and for that of another run, over subjects that both answer."""

    target: str
    metric: str
    """Name of the main metric."""
    other: str
    """Name of the other run."""
    subjects: int
    left_out: int
    """Questions of either run that the other one does not have."""
    this: float
    that: float
    difference: Estimate
    """``this`` minus ``that``, with the interval of a paired bootstrap over subjects."""
    p: float
    """Two-sided, of a permutation test that exchanges all answers of both models for random subjects."""
    p_adjusted: float
    """Corrected for all defined p of the evaluation (Holm, Scandinavian Journal of Statistics 6:65, 1979)."""


def read_runs(name: str, evaluations: Path) -> dict[str, list[Prediction]]:
    """Read the predictions of other runs, by name, the newest one first.

    Args:
        name: of an evaluation, or what the names of several have before a "-"; or a folder with predictions.jsonl.
        evaluations: the folder of evaluations.

    Raises:
        UserError: there is no such run, or its predictions cannot be read.
    """
    known = {file.parent for file in evaluations.glob(f"*/{PREDICTIONS}")}
    exact = [folder for folder in (evaluations / name, Path(name)) if (folder / PREDICTIONS).is_file()]
    folders = exact[:1] or [folder for folder in known if folder.name.startswith(f"{name}-")]
    if not folders:
        names = ", ".join(sorted(folder.name for folder in known)) or "none yet"
        raise UserError(f"compare={name}: there is no such evaluation; in {evaluations} there are {names}")
    try:
        files = sorted((folder / PREDICTIONS for folder in folders), key=lambda file: -file.stat().st_mtime)
        return {file.parent.name: read_predictions(file) for file in files}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"compare={name}: its {PREDICTIONS} cannot be read; evaluate that run again") from None


def question_of(prediction: Prediction) -> Question:
    """Return the question that a prediction answers."""
    return prediction.task_id, prediction.subject_id, prediction.target, prediction.label


def newest_runs(runs: Mapping[str, Sequence[Prediction]], questions: Iterable[Question]) -> dict[str, str]:
    """Return the newest run with any of the questions of each target that have a label.

    Raises:
        UserError: no run has any of these questions.
    """
    asked = {question for question in questions if question[-1] is not None}
    found = {p.target: name for name, of_run in reversed([*runs.items()]) for p in of_run if question_of(p) in asked}
    if not found:
        raise UserError(f"compare: {', '.join(runs)} has none of these questions; evaluate both on the same split")
    return found


def compare_models(
    predictions: Iterable[Prediction],
    runs: Mapping[str, Sequence[Prediction]],
    settings: EvaluateSettings,
    seed: int = 0,
) -> list[ModelComparison]:
    """Compare a model with the newest other run of each target that has classes or numbers, see ``ModelComparison``.

    Args:
        runs: see ``read_runs``.
        seed: of ``settings.bootstrap`` resamples and as many permutations.

    Raises:
        UserError: see ``newest_runs``.
    """
    own, found = {question_of(p): p for p in predictions if p.label is not None}, []
    for target, name in sorted(newest_runs(runs, own).items()):
        mine = {question for question in own if question[2] == target}
        other = {question_of(p): p for p in runs[name] if p.target == target}
        both = [[answers[question] for question in own if question in mine & other.keys()] for answers in (own, other)]
        this, that = ({(p.subject_id, p.label): p for p in subject_answers(of_model)} for of_model in both)
        common = [subject for subject in this if subject in that]
        if common:
            rows = [[of_model[subject] for subject in common] for of_model in (this, that)]
            found.append(_compare(name, len(mine ^ other.keys()), rows, settings, seed))
    found.sort(key=lambda comparison: (isnan(comparison.p), comparison.p))
    tests = sum(not isnan(comparison.p) for comparison in found)
    corrected = np.maximum.accumulate([(tests - i) * comparison.p for i, comparison in enumerate(found)])
    found = [replace(c, p_adjusted=float(np.minimum(p, 1))) for c, p in zip(found, corrected, strict=True)]
    return sorted(found, key=lambda comparison: comparison.target)


def comparison_notes(predictions: Iterable[Prediction], comparisons: Iterable[ModelComparison]) -> list[str]:
    """A note that names the targets that ``compare_models`` left out; empty if there are none."""
    left_out = sorted({p.target for p in predictions} - {comparison.target for comparison in comparisons})
    reason = "only classes and numbers that both runs answer are, without questions that have candidates of their own"
    return [f"not compared with another run: {', '.join(left_out)}; {reason}"] if left_out else []


def _compare(
    run: str, left_out: int, answers: Sequence[Sequence[Prediction]], settings: EvaluateSettings, seed: int
) -> ModelComparison:
    """Compare the answers of two models about the same subjects, in the same order."""
    this, that = answers
    subjects, places = np.unique([p.subject_id for p in this], return_inverse=True)
    score = main_metric([*this, *that])

    def values(first: NDArray, second: NDArray) -> NDArray:
        """The metric of answers by this model, ``first`` of each subject, and by the other one, ``second``."""
        return score(np.hstack([first[:, places], second[:, places]]))

    def metrics(weights: NDArray) -> dict[str, NDArray]:
        found = {"this": values(weights, 0 * weights), "that": values(0 * weights, weights)}
        return found | {"difference": found["this"] - found["that"]}

    estimates = estimate(metrics, len(subjects), settings, seed)
    random, permuted = np.random.default_rng(seed), []
    for _ in range(0, settings.bootstrap, CHUNK):
        kept = random.integers(0, 2, (CHUNK, len(subjects)))
        permuted.append(values(kept, 1 - kept) - values(1 - kept, kept))
    this_one, that_one, difference = estimates["this"].value, estimates["that"].value, estimates["difference"]
    exceeding = np.abs(permuted) >= abs(difference.value) - 1e-12
    p = nan if isnan(difference.value) else (1 + int(exceeding.sum())) / (1 + exceeding.size)
    fields = this[0].target, main_metric_name(this), run, len(subjects), left_out
    return ModelComparison(*fields, this_one, that_one, difference, p, p)

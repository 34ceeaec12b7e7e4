"""From predictions to what is measured on them, by way and level. Numbers and texts; classes: ``class_counting.py``."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.classes import ratio
from umbrella.evaluation.intervals import Measure
from umbrella.evaluation.numbers import number_metrics
from umbrella.evaluation.prediction import Prediction
from umbrella.evaluation.subjects import Answer, mean_number
from umbrella.evaluation.texts import text_scores

People = Mapping[str, int]
"""Subject to its position in the weights that a measure is given."""


@dataclass
class Counted:
    """Fields of ``tables.Group``, and ``measures``: ``<way>/<level>`` to what is measured there."""

    measures: dict[str, Measure] = field(default_factory=dict)
    references: dict[str, float] = field(default_factory=dict)
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    ties: dict[str, int] = field(default_factory=dict)
    invalid: int | None = None

    def measure(self, weights: NDArray) -> dict[str, NDArray]:
        """All numbers by their whole names, see ``intervals.Measure``."""
        levels = self.measures.items()
        return {f"{level}/{name}": value for level, of in levels for name, value in of(weights).items()}


def generated(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Those with an answer that is not chosen from candidates. A regression gives a number, and no text."""
    return [p for p in predictions if p.text is not None or p.said is not None]


def labels_of(predictions: Sequence[Prediction]) -> list[str | float]:
    """One label for each subject; each of its labels, where they differ (see ``subjects``)."""
    return [label for _, label in dict.fromkeys((p.subject_id, p.label) for p in predictions) if label is not None]


def count_numbers(predictions: Sequence[Prediction], training: Sequence[str | float], people: People) -> Counted:
    """Predictions whose labels are numbers.

    Args:
        training: the labels whose mean is the reference.
    """
    counted = Counted()
    rows = generated(predictions)
    answers = [Answer(p.subject_id, float(p.label or 0), _valid(p.said)) for p in rows]
    if rows:
        counted.invalid = sum(answer.said is None for answer in answers)
    for level, these in (("conversations", answers), ("subjects", mean_number(answers))):
        if any(answer.said is not None for answer in these):
            counted.measures[f"generated/{level}"] = _of_numbers(these, people)
    labels = np.array([float(label) for label in labels_of(predictions)])
    error = labels - fmean(map(float, training))
    counted.references = {"mean/mae": float(np.abs(error).mean()), "mean/rmse": float(np.sqrt((error**2).mean()))}
    return counted


def count_texts(predictions: Sequence[Prediction], people: People) -> Counted:
    """Predictions that are free text: scores of conversations, and their means over those of a subject."""
    scores: dict[str, list[dict[str, float]]] = defaultdict(list)
    for p in predictions:
        if p.text is not None:
            scores[p.subject_id].append(text_scores(p.truth, p.text))
    if not scores:
        return Counted()
    each = [(subject, score) for subject, group in scores.items() for score in group]
    means = [(s, {name: fmean(one[name] for one in group) for name in group[0]}) for s, group in scores.items()]
    levels = {"generated/conversations": each, "generated/subjects": means}
    return Counted({level: _of_texts(rows, people) for level, rows in levels.items()}, invalid=0)


def _valid(said: str | float | None) -> float | None:
    return float(said) if isinstance(said, int | float) and isfinite(said) else None


def _of_numbers(answers: Sequence[Answer], people: People) -> Measure:
    valid = [answer for answer in answers if answer.said is not None]
    subject = np.array([people[answer.subject] for answer in valid])
    truth, said = (np.array(values, float) for values in zip(*((a.truth, a.said) for a in valid), strict=True))
    return lambda weights: number_metrics(truth, said, weights[:, subject])


def _of_texts(rows: Sequence[tuple[str, Mapping[str, float]]], people: People) -> Measure:
    subject = np.array([people[subject] for subject, _ in rows])
    scores = {name: np.array([score[name] for _, score in rows]) for name in rows[0][1]}

    def measure(weights: NDArray) -> dict[str, NDArray]:
        drawn = weights[:, subject]
        return {name: ratio(drawn @ values, drawn.sum(1)) for name, values in scores.items()}

    return measure

"""The metrics of a group of predictions, by way of answering and level (see ``subgroups.Group``)."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.bootstrap import MetricFunction
from umbrella.evaluation.metrics import (
    class_indices,
    class_metrics,
    confusion_matrix,
    number_metrics,
    probability_metrics,
    ratio,
    text_metrics,
)
from umbrella.evaluation.predictions import (
    Answer,
    Prediction,
    majority_vote,
    mean_number,
    mean_probability,
    most_likely,
)

SubjectIndex = Mapping[str, int]
"""Subject to its column in the weights of a ``MetricFunction``."""


@dataclass
class GroupMetrics:
    """Metric functions by ``<way>/<level>``, and the fields of ``subgroups.Group`` of the same names."""

    functions: dict[str, MetricFunction] = field(default_factory=dict)
    references: dict[str, float] = field(default_factory=dict)
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    ties: dict[str, int] = field(default_factory=dict)
    invalid: int | None = None

    def compute(self, weights: NDArray) -> dict[str, NDArray]:
        """All metrics by their full names, see ``bootstrap.MetricFunction``."""
        levels = self.functions.items()
        return {f"{level}/{name}": value for level, of in levels for name, value in of(weights).items()}


def distinct_labels(predictions: Sequence[Prediction]) -> list[str | float]:
    """The label of each subject; several for a subject whose label differs between conversations."""
    return [label for _, label in dict.fromkeys((p.subject_id, p.label) for p in predictions) if label is not None]


def group_class_metrics(
    predictions: Sequence[Prediction], classes: Sequence[str], training: Sequence[str | float], index: SubjectIndex
) -> GroupMetrics:
    """Metrics of predictions whose labels are classes.

    Args:
        training: labels of the training data; the most frequent one is a reference.
    """
    result = GroupMetrics()
    scored = [p for p in predictions if p.probabilities]
    if scored:
        answers = [Answer(p.subject_id, str(p.label), most_likely(p.probabilities), p.probabilities) for p in scored]
        _add_class_metrics(result, "likelihood", scored, answers, classes, index)
    generated = _generated(predictions)
    if generated:
        found = [str(p.said) if str(p.said) in classes else None for p in generated]
        answers = [Answer(p.subject_id, str(p.label), said) for p, said in zip(generated, found, strict=True)]
        _add_class_metrics(result, "generated", generated, answers, classes, index)
        result.invalid = found.count(None)

    labels = distinct_labels(predictions)
    most_frequent = Counter(sorted(map(str, training))).most_common(1)[0][0]
    result.references = {"chance": 1 / len(classes), "majority": labels.count(most_frequent) / len(labels)}
    references = [(p.label, reference) for p in predictions if (reference := _reference_label(p)) in classes]
    if references:
        result.references["copies_reference"] = fmean(label == reference for label, reference in references)
    return result


def group_number_metrics(
    predictions: Sequence[Prediction], training: Sequence[str | float], index: SubjectIndex
) -> GroupMetrics:
    """Metrics of predictions whose labels are numbers.

    Args:
        training: labels of the training data; their mean is a reference.
    """
    result = GroupMetrics()
    generated = _generated(predictions)
    answers = [Answer(p.subject_id, float(p.label or 0), _finite(p.said)) for p in generated]
    if generated:
        result.invalid = sum(answer.said is None for answer in answers)
    for level, of_level in (("conversations", answers), ("subjects", mean_number(answers))):
        if any(answer.said is not None for answer in of_level):
            result.functions[f"generated/{level}"] = _number_function(of_level, index)
    labels = np.array([float(label) for label in distinct_labels(predictions)])
    error = labels - fmean(map(float, training))
    result.references = {"mean/mae": float(np.abs(error).mean()), "mean/rmse": float(np.sqrt((error**2).mean()))}
    return result


def group_text_metrics(predictions: Sequence[Prediction], index: SubjectIndex) -> GroupMetrics:
    """Metrics of free text, of conversations and as means over the conversations of a subject."""
    by_subject: dict[str, list[dict[str, float]]] = defaultdict(list)
    for p in predictions:
        if p.text is not None:
            by_subject[p.subject_id].append(text_metrics(p.truth, p.text))
    if not by_subject:
        return GroupMetrics()
    each = [(subject, metrics) for subject, group in by_subject.items() for metrics in group]
    means = [(s, {name: fmean(one[name] for one in group) for name in group[0]}) for s, group in by_subject.items()]
    levels = {"generated/conversations": each, "generated/subjects": means}
    return GroupMetrics({level: _text_function(rows, index) for level, rows in levels.items()}, invalid=0)


def _generated(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Predictions with a generated answer. A regression model gives a number without text."""
    return [p for p in predictions if p.text is not None or p.said is not None]


def _add_class_metrics(
    result: GroupMetrics,
    way: str,
    predictions: Sequence[Prediction],
    answers: Sequence[Answer],
    classes: Sequence[str],
    index: SubjectIndex,
) -> None:
    """Add one way of answering. ``answers`` are those of ``predictions``, in order."""
    votes, result.ties[way] = majority_vote(answers)
    by_subject = {"subjects": mean_probability(answers)} if answers[0].probabilities else {}
    levels = {"conversations": answers, **by_subject, "votes": votes}
    for level, of_level in levels.items():
        references = [_reference_label(p) for p in predictions] if level == "conversations" else []
        result.functions[f"{way}/{level}"] = _class_function(of_level, references, classes, index)
        indices, weights = class_indices(of_level, classes), np.ones((1, len(of_level)))
        counts = confusion_matrix(*indices, len(classes), weights)[0]
        result.confusion[f"{way}/{level}"] = counts.astype(int).tolist()


def _class_function(
    answers: Sequence[Answer], references: Sequence[str], classes: Sequence[str], index: SubjectIndex
) -> MetricFunction:
    """Args: references: the label of the reference of each answer, or empty."""
    subject = np.array([index[answer.subject] for answer in answers])
    truth, predicted = class_indices(answers, classes)
    probabilities = np.array([[a.probabilities.get(label, 0.0) for label in classes] for a in answers])
    compared = np.array([label in classes for label in references], bool)
    copied = [a.said == label and label in classes for a, label in zip(answers, references, strict=False)]

    def metrics(weights: NDArray) -> dict[str, NDArray]:
        drawn = weights[:, subject]
        values = class_metrics(confusion_matrix(truth, predicted, len(classes), drawn), classes)
        if len(set(truth.tolist())) < 2:  # a constant answer would reach 1
            values["balanced_accuracy"] = np.full(len(weights), np.nan)
        if answers[0].probabilities:
            values |= probability_metrics(truth, probabilities, drawn)
        if compared.any():
            values["copies_reference"] = ratio(drawn @ np.array(copied, bool), drawn @ compared)
        return values

    return metrics


def _number_function(answers: Sequence[Answer], index: SubjectIndex) -> MetricFunction:
    valid = [answer for answer in answers if answer.said is not None]
    subject = np.array([index[answer.subject] for answer in valid])
    truth, predicted = (np.array(values, float) for values in zip(*((a.truth, a.said) for a in valid), strict=True))
    return lambda weights: number_metrics(truth, predicted, weights[:, subject])


def _text_function(rows: Sequence[tuple[str, Mapping[str, float]]], index: SubjectIndex) -> MetricFunction:
    subject = np.array([index[subject] for subject, _ in rows])
    values = {name: np.array([metrics[name] for _, metrics in rows]) for name in rows[0][1]}

    def mean(weights: NDArray) -> dict[str, NDArray]:
        drawn = weights[:, subject]
        return {name: ratio(drawn @ of_name, drawn.sum(1)) for name, of_name in values.items()}

    return mean


def _reference_label(prediction: Prediction) -> str:
    return str(prediction.metadata.get("reference_label"))


def _finite(said: str | float | None) -> float | None:
    return float(said) if isinstance(said, int | float) and isfinite(said) else None

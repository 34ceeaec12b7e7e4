"""The metrics of a group of predictions, by way of answering and level."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.bootstrap import Measure
from umbrella.evaluation.metrics import (
    class_metrics,
    codes,
    confusion,
    number_metrics,
    probability_metrics,
    ratio,
    text_scores,
)
from umbrella.evaluation.predictions import (
    Answer,
    Prediction,
    majority_vote,
    mean_number,
    mean_probability,
    most_likely,
)

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


def count_classes(
    predictions: Sequence[Prediction], classes: Sequence[str], training: Sequence[str | float], people: People
) -> Counted:
    """Predictions whose labels are classes.

    Args:
        training: the labels whose most frequent one is the reference.
    """
    counted = Counted()
    by_likelihood = [p for p in predictions if p.probabilities]
    if by_likelihood:
        likely = [
            Answer(p.subject_id, str(p.label), most_likely(p.probabilities), p.probabilities) for p in by_likelihood
        ]
        _count(counted, "likelihood", by_likelihood, likely, classes, people)
    by_words = generated(predictions)
    if by_words:
        found = [str(p.said) if str(p.said) in classes else None for p in by_words]
        words = [Answer(p.subject_id, str(p.label), said) for p, said in zip(by_words, found, strict=True)]
        _count(counted, "generated", by_words, words, classes, people)
        counted.invalid = found.count(None)

    labels = labels_of(predictions)
    most_frequent = Counter(sorted(map(str, training))).most_common(1)[0][0]
    counted.references = {"chance": 1 / len(classes), "majority": labels.count(most_frequent) / len(labels)}
    references = [(p.label, reference) for p in predictions if (reference := _reference(p)) in classes]
    if references:
        counted.references["copies_reference"] = fmean(label == reference for label, reference in references)
    return counted


def _count(
    counted: Counted,
    way: str,
    predictions: Sequence[Prediction],
    answers: Sequence[Answer],
    classes: Sequence[str],
    people: People,
) -> None:
    """Add one way of answering; answers are those to the predictions, in order."""
    votes, counted.ties[way] = majority_vote(answers)
    by_subject = {"subjects": mean_probability(answers)} if answers[0].probabilities else {}
    levels = {"conversations": answers, **by_subject, "votes": votes}
    for level, these in levels.items():
        shown = [_reference(p) for p in predictions] if level == "conversations" else []
        counted.measures[f"{way}/{level}"] = _measure(these, shown, classes, people)
        counts = confusion(*codes(these, classes), len(classes), np.ones((1, len(these))))[0]
        counted.confusion[f"{way}/{level}"] = counts.astype(int).tolist()


def _measure(answers: Sequence[Answer], shown: Sequence[str], classes: Sequence[str], people: People) -> Measure:
    """Args: shown: the labels of the answers' references, or nothing."""
    subject = np.array([people[answer.subject] for answer in answers])
    truth, said = codes(answers, classes)
    probabilities = np.array([[a.probabilities.get(label, 0.0) for label in classes] for a in answers])
    compared = np.array([label in classes for label in shown], bool)
    copied = np.array([a.said == label and label in classes for a, label in zip(answers, shown, strict=False)], bool)

    def measure(weights: NDArray) -> dict[str, NDArray]:
        drawn = weights[:, subject]
        metrics = class_metrics(confusion(truth, said, len(classes), drawn), classes)
        if len(set(truth.tolist())) < 2:  # always saying the one class would give 1
            metrics["balanced_accuracy"] = np.full(len(weights), np.nan)
        if answers[0].probabilities:
            metrics |= probability_metrics(truth, probabilities, drawn)
        if compared.any():
            metrics["copies_reference"] = ratio(drawn @ copied, drawn @ compared)
        return metrics

    return measure


def _reference(prediction: Prediction) -> str:
    return str(prediction.metadata.get("reference_label"))

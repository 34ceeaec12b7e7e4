"""From predictions of classes to what is measured on them, by way and level."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.classes import class_metrics, codes, confusion, probability_metrics, ratio
from umbrella.evaluation.counting import Counted, People, generated, labels_of
from umbrella.evaluation.intervals import Measure
from umbrella.evaluation.prediction import Prediction
from umbrella.evaluation.subjects import Answer, majority_vote, mean_probability, most_likely


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

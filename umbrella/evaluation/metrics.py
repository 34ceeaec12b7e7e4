"""Metrics of classes, probabilities, numbers and texts, and the validation metrics of trainings.

Metrics of classes and numbers are computed for many weightings of the same answers at once: one row of ``weights`` is
one resample of the bootstrap.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.predictions import (
    Prediction,
    conversations_with_labels,
    cut_note,
    mean_over_subjects,
    most_likely,
)

BINS = 10
"""Bins of equal width for calibration."""
NUMBER_METRICS = {"mae": "mae", "rmse": "rmse", "r": "pearson"}
"""Metrics of numbers in trainings: name to that of ``number_metrics``."""
MAX_DISAGREEMENT = 0.1
"""Share of the conversations of a target in which scored and generated answers may differ without a note."""
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def confusion_matrices(predictions: Sequence[Prediction], classes: Sequence[str]) -> NDArray:
    """The confusion matrix of each prediction, (n, classes, classes + 1): a single 1 at (true class, predicted class).

    The last column is for predictions that are no class.
    """
    index: dict[str | float | None, int] = {label: i for i, label in enumerate(classes)}
    matrices = np.zeros((len(predictions), len(classes), len(classes) + 1))
    for matrix, p in zip(matrices, predictions, strict=True):
        matrix[index[p.label], index.get(p.predicted, len(classes))] = 1
    return matrices


def balanced_accuracy(counts: NDArray) -> NDArray:
    """The mean recall over the classes that occur in the truth, (resamples,); NaN if none does. Chance is 1 / classes.

    Args:
        counts: (resamples, classes, classes + 1), weighted sums of ``confusion_matrices``.
    """
    return nan_mean(_recall(counts))


def class_metrics(counts: NDArray, classes: Sequence[str]) -> dict[str, NDArray]:
    """Metrics of a confusion matrix, (resamples,) each.

    ``f1`` is the mean over classes that are true or predicted. ``precision/<class>`` is NaN for a class that is never
    predicted, ``recall/<class>`` for one that is never true. With two classes, the last one is positive.

    Args:
        counts: see ``balanced_accuracy``.
    """
    correct = np.diagonal(counts, axis1=1, axis2=2)
    true, predicted = counts.sum(2), counts[:, :, :-1].sum(1)
    recall, precision = _recall(counts), ratio(correct, predicted)
    metrics = {
        "accuracy": ratio(correct.sum(1), true.sum(1)),
        "balanced_accuracy": balanced_accuracy(counts),
        "f1": nan_mean(ratio(2 * correct, true + predicted)),
    }
    if len(classes) == 2:
        metrics |= {"sensitivity": recall[:, 1], "specificity": recall[:, 0]}
    for i, label in enumerate(classes):
        metrics |= {f"recall/{label}": recall[:, i], f"precision/{label}": precision[:, i]}
    return metrics


def probability_metrics(truth: NDArray, probabilities: NDArray, weights: NDArray) -> dict[str, NDArray]:
    """``auc`` and the metrics of ``calibration_metrics``, (resamples,) each. Arguments as there."""
    return {"auc": auc(truth, probabilities, weights), **calibration_metrics(truth, probabilities, weights)}


def calibration_metrics(truth: NDArray, probabilities: NDArray, weights: NDArray) -> dict[str, NDArray]:
    """``brier`` and ``calibration_error``, (resamples,) each.

    Brier score (1950): the squared distance between probabilities and truth, summed over classes; with two classes half
    of that, which is the score of the positive class. Calibration error (Guo et al. 2017): the mean distance between
    the probability of the most likely label and its accuracy, in 10 bins of equal width.

    Args:
        truth: (n,), indices of the true classes.
        probabilities: (n, classes).
        weights: (resamples, n).
    """
    total = weights.sum(1)
    distance = ((probabilities - np.eye(probabilities.shape[1])[truth]) ** 2).sum(1)
    best = probabilities.max(1)
    correct = (probabilities[np.arange(len(truth)), truth] == best) & ((probabilities == best[:, None]).sum(1) == 1)
    gaps = np.abs(weights @ (np.eye(BINS)[calibration_bins(best)] * (correct - best)[:, None])).sum(1)
    return {
        "brier": ratio(weights @ distance, total) / (2 if probabilities.shape[1] == 2 else 1),
        "calibration_error": ratio(gaps, total),
    }


def calibration_bins(probabilities: NDArray) -> NDArray:
    """The index of the bin of each probability. Bins are closed on the right: 0.2 is in (0.1, 0.2]."""
    return np.clip(np.ceil(probabilities * BINS).astype(int) - 1, 0, BINS - 1)


def auc(truth: NDArray, probabilities: NDArray, weights: NDArray) -> NDArray:
    """Area under the ROC curve, (resamples,): of the last of two classes, otherwise the mean of one against the rest.

    Classes that all or none of the answers have are left out; NaN if no class is left. Arguments as
    ``calibration_metrics``.
    """
    areas = []
    for label in [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1]):
        order = np.argsort(probabilities[:, label], kind="stable")
        positive, ordered = truth[order] == label, weights[:, order]
        # The first of each run of equal probabilities, which count half.
        starts = np.flatnonzero(np.diff(probabilities[order, label], prepend=-np.inf))
        positives = np.add.reduceat(ordered * positive, starts, axis=1)
        negatives = np.add.reduceat(ordered * ~positive, starts, axis=1)
        below = np.cumsum(negatives, 1) - negatives / 2
        areas.append(ratio((positives * below).sum(1), positives.sum(1) * negatives.sum(1)))
    return nan_mean(np.stack(areas, 1))


def number_metrics(truth: NDArray, predicted: NDArray, weights: NDArray) -> dict[str, NDArray]:
    """``mae``, ``rmse``, ``r2`` and ``pearson``, (resamples,) each; NaN where undefined (no or only equal numbers).

    Args:
        truth, predicted: (n,), not empty.
        weights: (resamples, n).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        total = weights.sum(1)
        error = predicted - truth
        squared = weights @ error**2
        y, y_squares = _centred_squares(truth, weights)
        p, p_squares = _centred_squares(predicted, weights)
        products = weights @ (y * p) - (weights @ y) * (weights @ p) / total
        return {
            "mae": weights @ np.abs(error) / total,
            "rmse": np.sqrt(squared / total),
            "r2": 1 - squared / y_squares,
            "pearson": np.clip(products / np.sqrt(y_squares * p_squares), -1, 1),
        }


def main_metric_name(subjects: Sequence[Prediction]) -> str:
    """The metric that stands for a target with these classes or numbers as labels."""
    return "balanced_accuracy" if isinstance(subjects[0].label, str) else "mae"


def main_metric(subjects: Sequence[Prediction]) -> Callable[[NDArray], NDArray]:
    """The main metric of the answers about n subjects: a function from weights (resamples, n) to values (resamples,).

    The balanced accuracy is undefined if there is one class only.
    """
    if subjects and main_metric_name(subjects) == "mae":
        truth, predicted = np.array([(p.label, p.predicted) for p in subjects], float).T
        return lambda weights: number_metrics(truth, predicted, weights)["mae"]
    classes = sorted({str(p.label) for p in subjects})
    matrices = confusion_matrices(subjects, classes) * (len(classes) > 1)
    return lambda weights: balanced_accuracy(np.tensordot(weights, matrices, 1))


def text_metrics(truth: str, text: str) -> dict[str, float]:
    """Metrics of one text, each from 0 to 1.

    ``exact`` and ``token_f1`` as in SQuAD (Rajpurkar et al. 2016): without case, punctuation and English articles;
    token_f1 is the F1 of the common words. ``rouge_l`` (Lin 2004): the F1 of the longest common subsequence of
    lower-case words, articles included. Two texts without words are equal.
    """
    a, b = (ARTICLES.sub(" ", one.lower().translate(PUNCTUATION)).split() for one in (truth, text))
    all_a, all_b = (re.findall(r"[^\W_]+", one.lower()) for one in (truth, text))
    return {
        "token_f1": _f1((Counter(a) & Counter(b)).total(), a, b),
        "rouge_l": _f1(_common_subsequence(all_a, all_b), all_a, all_b),
        "exact": float(a == b),
    }


def ratio(part: NDArray, whole: NDArray) -> NDArray:
    """part / whole, of one shape; NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def metric_names(classes: Mapping[str, int], several: bool = False, numbers: Iterable[str] = ()) -> list[str]:
    """Names of the metrics of ``validation_metrics`` in a training.

    Args:
        classes: target to the number of classes among the labels that are scored.
        several: whether a conversation has several class labels.
        numbers: targets whose numbers are scored.
    """
    names = ["eval/loss"] + ["eval/balanced_accuracy"] * any(number > 1 for number in classes.values())
    names += ["eval/subset_accuracy"] * several
    for target, number in sorted(classes.items()):
        names += [f"eval/{target}/balanced_accuracy"] * (number > 1) + [f"eval/{target}/accuracy"]
    return names + [f"eval/{target}/{name}" for target in sorted(numbers) for name in NUMBER_METRICS]


def chance_level(metric: str, classes: Mapping[str, int]) -> float | None:
    """The expected value of a balanced accuracy for random answers; None for other metrics.

    Args:
        classes: target to the number of candidates, for targets with a balanced accuracy.
    """
    levels = {f"eval/{target}/balanced_accuracy": 1 / number for target, number in classes.items()}
    if metric == "eval/balanced_accuracy" and levels:
        return sum(levels.values()) / len(levels)
    return levels.get(metric)


def validation_metrics(predictions: Iterable[Prediction], prefix: str = "eval") -> dict[str, float]:
    """Metrics that trainings report for the validation split.

    - ``<prefix>/loss``: mean nats per token of the true last answers.
    - ``<prefix>/<target>/balanced_accuracy``: over subjects, by the mean probability over the conversations of a
      subject; a tie is no answer. A subject whose label differs between conversations counts once per label. Absent
      if all labels are of one class.
    - ``<prefix>/<target>/accuracy``: over conversations.
    - ``<prefix>/balanced_accuracy``: the mean over targets; absent if there is none.
    - ``<prefix>/<target>/mae``, ``rmse`` and ``r`` (Pearson): of the medians of numbers, over subjects.
    - ``<prefix>/subset_accuracy``: the share of the conversations with several class labels in which all answers are
      right; absent if there is none.
    """
    predictions = list(predictions)
    nats, tokens = sum(p.answer_nll or 0.0 for p in predictions), sum(p.answer_tokens for p in predictions)
    metrics = {f"{prefix}/loss": nats / tokens}
    by_target: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        if p.probabilities:
            by_target[p.target].append(p)
    over_subjects = []
    for target, scored in sorted(by_target.items()):
        hits: dict[Any, list[bool]] = defaultdict(list)
        for p in mean_over_subjects(scored):
            hits[p.label].append(p.predicted == p.label)
        if len(hits) > 1:
            over_subjects.append(fmean(map(fmean, hits.values())))
            metrics[f"{prefix}/{target}/balanced_accuracy"] = over_subjects[-1]
        metrics[f"{prefix}/{target}/accuracy"] = fmean(most_likely(p.probabilities) == p.label for p in scored)
    numeric: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        if p.numbers:
            numeric[p.target].append(p)
    for target, scored in sorted(numeric.items()):
        pairs = np.array([(p.label, p.answer) for p in mean_over_subjects(scored)], float)
        values = number_metrics(pairs[:, 0], pairs[:, 1], np.ones((1, len(pairs))))
        metrics |= {f"{prefix}/{target}/{name}": float(values[of][0]) for name, of in NUMBER_METRICS.items()}
    if over_subjects:
        metrics[f"{prefix}/balanced_accuracy"] = sum(over_subjects) / len(over_subjects)
    if several := conversations_with_labels(p for p in predictions if p.probabilities):
        right = [all(most_likely(p.probabilities) == p.label for p in of_one) for of_one in several]
        metrics[f"{prefix}/subset_accuracy"] = fmean(right)
    return metrics


def prediction_notes(predictions: Iterable[Prediction]) -> list[str]:
    """Notes on generated answers that were cut, and on targets where they differ from the scored answers."""
    generated = [p for p in predictions if p.text is not None]
    notes = [cut_note(sum(p.cut for p in generated), len(generated))]
    by_target: dict[str, list[bool]] = defaultdict(list)
    for p in generated:
        if p.probabilities:
            by_target[p.target].append(p.predicted != most_likely(p.probabilities))
    for target, differs in sorted(by_target.items()):
        if sum(differs) > MAX_DISAGREEMENT * len(differs):
            notes.append(
                f"{target}: in {sum(differs)} of {len(differs)} conversations the generated answer is not the candidate"
                " with the highest probability; train longer, or compare both in the predictions"
            )
    return [note for note in notes if note]


def _recall(counts: NDArray) -> NDArray:
    return ratio(np.diagonal(counts, axis1=1, axis2=2), counts.sum(2))


def nan_mean(values: NDArray) -> NDArray:
    """The mean over the last axis of the values that are not NaN; NaN if there is none."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(-1), defined.sum(-1))


def _centred_squares(values: NDArray, weights: NDArray) -> tuple[NDArray, NDArray]:
    """(values minus their mean, weighted sum of squares about the mean of each resample).

    The sum is NaN where all values are equal, which means that they differ by no more than rounding errors.
    """
    centred = values - values.mean()
    total, squares = weights.sum(1), weights @ centred**2
    about_mean = squares - (weights @ centred) ** 2 / total
    rounding = np.maximum(1e-12 * squares, total * (1e-12 * np.abs(values).max()) ** 2)
    return centred, np.where(about_mean > rounding, about_mean, np.nan)


def _f1(common: int, a: Sequence[str], b: Sequence[str]) -> float:
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    previous = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(previous[j] + 1 if word == other else max(previous[j + 1], row[j]))
        previous = row
    return previous[-1]

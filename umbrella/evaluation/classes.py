"""Metrics of classes, for many weightings of the same answers at once. Also macro F1, AUC, Brier and calibration."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.subjects import Answer

BINS = 10
"""Bins of equal width that calibration is measured and drawn in."""


def codes(answers: Sequence[Answer], classes: Sequence[str]) -> tuple[NDArray, NDArray]:
    """Positions in ``classes`` of what is true and of what is said, (n,) each; what is no class is len(classes)."""
    position = {label: i for i, label in enumerate(classes)}
    truth = np.array([position[str(a.truth)] for a in answers], int)
    return truth, np.array([position.get(str(a.said), len(classes)) for a in answers], int)


def confusion(truth: NDArray, said: NDArray, classes: int, weights: NDArray) -> NDArray:
    """Counts (resamples, classes, classes + 1) of (true, said); the last column counts what is no class.

    Args:
        truth, said: (n,), see ``codes``.
        weights: (resamples, n), how often each answer counts.
    """
    cells = np.zeros((len(truth), classes * (classes + 1)))
    cells[np.arange(len(truth)), truth * (classes + 1) + said] = 1
    return (weights @ cells).reshape(len(weights), classes, classes + 1)


def balanced_accuracy(counts: NDArray) -> NDArray:
    """The mean over the true classes of the share of that class that is said right; chance is 1 / classes.

    A class that is never true does not count. NaN where nothing is true.
    """
    return _mean_of_defined(_recall(counts))


def class_metrics(counts: NDArray, classes: Sequence[str]) -> dict[str, NDArray]:
    """What follows from ``confusion``, (resamples,) each.

    ``f1`` is the mean over classes that are true or said; ``precision/<class>`` is NaN where the class is never said,
    ``recall/<class>`` where it is never true. Of two classes, the last is the positive one.
    """
    right = np.diagonal(counts, axis1=1, axis2=2)
    true, said = counts.sum(2), counts[:, :, :-1].sum(1)
    recall, precision = _recall(counts), ratio(right, said)
    metrics = {
        "accuracy": ratio(right.sum(1), true.sum(1)),
        "balanced_accuracy": balanced_accuracy(counts),
        "f1": _mean_of_defined(ratio(2 * right, true + said)),
    }
    if len(classes) == 2:
        metrics |= {"sensitivity": recall[:, 1], "specificity": recall[:, 0]}
    for i, label in enumerate(classes):
        metrics |= {f"recall/{label}": recall[:, i], f"precision/{label}": precision[:, i]}
    return metrics


def probability_metrics(truth: NDArray, probabilities: NDArray, weights: NDArray) -> dict[str, NDArray]:
    """``auc``, ``brier`` and ``calibration_error``, (resamples,) each.

    Brier score (1950): the squared distance of the probabilities from the truth, summed over classes; halved where
    there are two, which makes it that of the positive class. Calibration error (Guo et al. 2017): the mean distance
    between probability and share of right answers of the most likely label, in 10 bins of equal width.

    Args:
        truth: (n,), positions of the true classes.
        probabilities: (n, classes).
        weights: (resamples, n), how often each answer counts.
    """
    total = weights.sum(1)
    distance = ((probabilities - np.eye(probabilities.shape[1])[truth]) ** 2).sum(1)
    best = probabilities.max(1)
    right = (probabilities[np.arange(len(truth)), truth] == best) & ((probabilities == best[:, None]).sum(1) == 1)
    bins = np.clip(np.ceil(best * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.abs(weights @ (np.eye(BINS)[bins] * (right - best)[:, None])).sum(1)
    return {
        "auc": auc(truth, probabilities, weights),
        "brier": ratio(weights @ distance, total) / (2 if probabilities.shape[1] == 2 else 1),
        "calibration_error": ratio(gaps, total),
    }


def auc(truth: NDArray, probabilities: NDArray, weights: NDArray) -> NDArray:
    """Area under the ROC curve, (resamples,): of the last of two classes, else the mean of one class against the rest.

    Classes that all or no answers have do not count; NaN where none is left. Arguments as ``probability_metrics``.
    """
    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    return _mean_of_defined(np.stack([_one_auc(truth == i, probabilities[:, i], weights) for i in classes], 1))


def ratio(part: NDArray, whole: NDArray) -> NDArray:
    """part / whole, of one shape; NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _one_auc(positive: NDArray, score: NDArray, weights: NDArray) -> NDArray:
    order = np.argsort(score, kind="stable")
    steps = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # where equal scores begin: those count half
    drawn = weights[:, order]
    positives = np.add.reduceat(drawn * positive[order], steps, axis=1)
    negatives = np.add.reduceat(drawn * ~positive[order], steps, axis=1)
    below = np.cumsum(negatives, 1) - negatives / 2
    return ratio((positives * below).sum(1), positives.sum(1) * negatives.sum(1))


def _recall(counts: NDArray) -> NDArray:
    return ratio(np.diagonal(counts, axis1=1, axis2=2), counts.sum(2))


def _mean_of_defined(values: NDArray) -> NDArray:
    """The mean over the last axis of what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(-1), defined.sum(-1))

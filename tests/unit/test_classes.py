"""Metrics of classes: against scikit-learn, with weights, and worked out by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as sk

from umbrella.evaluation.metrics import (
    balanced_accuracy,
    class_indices,
    class_metrics,
    confusion_matrix,
    probability_metrics,
)
from umbrella.evaluation.predictions import Answer

CLASSES = ["a", "b", "c"]


def counts(truth: str, said: str, classes: str = "mf") -> NDArray:
    answers = [Answer(str(i), t, s if s != "-" else None) for i, (t, s) in enumerate(zip(truth, said, strict=True))]
    return confusion_matrix(*class_indices(answers, classes), len(classes), np.ones((1, len(answers))))


def draw(size: int, classes: int) -> tuple[NDArray, NDArray, NDArray]:
    random = np.random.default_rng(size)
    truth = np.concatenate([np.arange(classes), random.integers(0, classes, size - classes)])
    # Two decimals: some are equal, within a class and between classes.
    raw = np.round(random.dirichlet(np.ones(classes), size) + np.eye(classes)[truth] * 0.3, 2) + 0.01
    return truth, raw / raw.sum(1, keepdims=True), random.integers(0, 4, (5, size)).astype(float)


@pytest.mark.parametrize("size", [9, 40, 200])
@pytest.mark.parametrize("classes", [2, 3])
def test_what_is_said_is_measured_as_scikit_learn_does_with_the_same_weights(size: int, classes: int) -> None:
    truth, probabilities, weights = draw(size, classes)
    said = probabilities.argmax(1)
    said[:2] = classes  # says none of them
    ours = class_metrics(confusion_matrix(truth, said, classes, weights), CLASSES[:classes])
    for i, w in enumerate(weights):
        labels = range(classes)
        f1 = sk.f1_score(truth, said, labels=labels, average="macro", sample_weight=w)
        precision, recall, _, _ = sk.precision_recall_fscore_support(
            truth, said, labels=labels, sample_weight=w, zero_division=np.nan
        )
        assert ours["accuracy"][i] == pytest.approx(sk.accuracy_score(truth, said, sample_weight=w))
        assert ours["balanced_accuracy"][i] == pytest.approx(np.nanmean(recall))
        assert ours["f1"][i] == pytest.approx(f1)
        assert [ours[f"recall/{c}"][i] for c in CLASSES[:classes]] == pytest.approx(recall, nan_ok=True)
        assert [ours[f"precision/{c}"][i] for c in CLASSES[:classes]] == pytest.approx(precision, nan_ok=True)


@pytest.mark.parametrize("size", [9, 40, 200])
@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_are_measured_as_scikit_learn_does_with_the_same_weights(size: int, classes: int) -> None:
    truth, probabilities, weights = draw(size, classes)
    weights[:, :classes] += 1  # scikit-learn wants each class
    ours = probability_metrics(truth, probabilities, weights)
    for i, w in enumerate(weights):
        scores = probabilities[:, 1] if classes == 2 else probabilities
        auc = sk.roc_auc_score(truth, scores, sample_weight=w, multi_class="ovr")
        distance = ((probabilities - np.eye(classes)[truth]) ** 2).sum(1)
        assert ours["auc"][i] == pytest.approx(auc)
        assert ours["brier"][i] == pytest.approx(np.average(distance, weights=w) / (2 if classes == 2 else 1))
        if classes == 2:
            assert ours["brier"][i] == pytest.approx(sk.brier_score_loss(truth, scores, sample_weight=w))


def test_a_weight_of_two_is_the_same_as_the_answer_twice() -> None:
    truth, probabilities, weights = draw(40, 3)
    twice = np.repeat(np.arange(40), weights[0].astype(int))
    weighted = probability_metrics(truth, probabilities, weights[:1])
    repeated = probability_metrics(truth[twice], probabilities[twice], np.ones((1, len(twice))))
    assert {k: v[0] for k, v in weighted.items()} == pytest.approx({k: v[0] for k, v in repeated.items()})


def test_each_true_class_counts_the_same_and_no_answer_is_a_wrong_one() -> None:
    assert balanced_accuracy(counts("mmmf", "mmmm")) == 0.5
    assert balanced_accuracy(counts("mmmf", "m-ff")) == pytest.approx((1 / 3 + 1) / 2)
    # A class that is said and never true does not count.
    assert balanced_accuracy(counts("mm", "mf")) == 0.5


def test_confusion_has_a_row_per_truth_and_a_last_column_for_no_answer() -> None:
    assert counts("mmmf", "mf-f").tolist() == [[[1, 1, 1], [0, 1, 0]]]


def test_the_last_of_two_classes_is_the_positive_one() -> None:
    found = class_metrics(counts("mmmff", "mm-mf", "fm"), "fm")
    assert found["sensitivity"] == pytest.approx(2 / 3)
    assert found["specificity"] == 0.5


def test_what_has_no_cases_is_not_a_number_and_is_left_out_of_means() -> None:
    found = class_metrics(counts("mm", "m-"), "mf")
    assert np.isnan(found["recall/f"])
    assert np.isnan(found["precision/f"])
    assert found["balanced_accuracy"] == 0.5
    assert np.isnan(probability_metrics(np.array([1, 1]), np.array([[0.1, 0.9]] * 2), np.ones((1, 2)))["auc"])
    assert np.isnan(balanced_accuracy(np.zeros((1, 2, 3))))


def test_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    truth = np.array([0, 1, 1, 0])
    sure = np.array([0.9, 0.88, 0.65, 0.5])  # bins (0.8, 0.9], (0.6, 0.7], (0.4, 0.5]; the last one is a tie: wrong
    probabilities = np.stack([[0.9, 0.88, 0.35, 0.5], [0.1, 0.12, 0.65, 0.5]], 1)
    gaps = abs((1 + 0) - (sure[0] + sure[1])) + abs(1 - sure[2]) + abs(0 - sure[3])
    found = probability_metrics(truth, probabilities, np.ones((1, 4)))
    assert found["calibration_error"][0] == pytest.approx(gaps / 4)
    tie = probability_metrics(np.array([0]), np.array([[0.4, 0.4, 0.2]]), np.ones((1, 1)))
    assert tie["calibration_error"][0] == pytest.approx(0.4)

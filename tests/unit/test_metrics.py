"""Metrics of classes, probabilities, numbers and texts, and the validation metrics of trainings."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sk

from tests.conftest import make_prediction
from umbrella.evaluation.group_metrics import tabulate
from umbrella.evaluation.metrics import (
    chance_level,
    class_metrics,
    confusion_matrices,
    metric_names,
    number_metrics,
    prediction_notes,
    probability_metrics,
    text_metrics,
    validation_metrics,
)
from umbrella.evaluation.predictions import Prediction, majority_vote, mean_over_subjects
from umbrella.evaluation.settings import EvaluateSettings

CLASSES = ["a", "b", "c"]


def scored(subject: str, label: Any, target: str = "sex", nll: float = 1.0, tokens: int = 1, **p: float) -> Prediction:
    return make_prediction(subject, label, target=target, answer_nll=nll, answer_tokens=tokens, probabilities=p)


def test_subjects_are_aggregated_by_mean_probability_and_by_majority_vote() -> None:
    confident, other = scored("a", "m", m=0.9, f=0.1), scored("a", "m", m=0.4, f=0.6)
    (mean,) = mean_over_subjects([confident, other, other])
    assert (mean.predicted, mean.probabilities["m"]) == ("m", pytest.approx(1.7 / 3))
    # Sums of these differ by rounding errors only: a tie.
    tie = [scored("a", "m", m=x, f=y) for x, y in ((0.1, 0.3), (0.2, 0.2), (0.3, 0.1))]
    assert mean_over_subjects(tie)[0].predicted is None

    def votes(**by_subject: list[Any]) -> tuple[list[Any], int]:
        found, ties = majority_vote(make_prediction(s, predicted=p) for s, of_one in by_subject.items() for p in of_one)
        return [p.predicted for p in found], ties

    assert votes(a=["m", "f", "f"], b=["m", "f"], c=[None, None, "m"], d=[None]) == (["f", None, "m", None], 1)


def test_numbers_of_a_subject_are_averaged_for_each_of_its_labels_without_invalid_ones() -> None:
    rows = [("a", 41, 40.0), ("a", 51, 50.0), ("a", 41, 45.0), ("a", 41, None), ("b", 20, None)]
    means = mean_over_subjects(make_prediction(s, label, predicted=number) for s, label, number in rows)
    assert [(p.subject_id, p.label, p.predicted) for p in means] == [("a", 41, 42.5), ("a", 51, 50.0), ("b", 20, None)]


def test_validation_metrics_are_over_subjects_targets_and_tokens() -> None:
    rows = [
        scored("a", "m", nll=3.0, tokens=2, m=0.9, f=0.1),
        scored("a", "m", nll=0.0, tokens=0, m=0.4, f=0.6),
        scored("b", "f", nll=3.0, m=0.5, f=0.5),  # a tie is no answer
        scored("a", "old", "group", nll=0.0, tokens=0, old=0.9, young=0.1),
        scored("a", "AD", "diagnosis", AD=0.1, CN=0.9),
        scored("a", "CN", "diagnosis", AD=0.1, CN=0.9),  # a subject with two labels counts once for each
        scored("a", 63.5, "age", nll=4.0, tokens=5),
    ]
    assert validation_metrics(rows, prefix="test") == {
        "test/loss": 12 / 10,
        "test/diagnosis/balanced_accuracy": 0.5,
        "test/diagnosis/accuracy": 0.5,
        "test/group/accuracy": 1.0,  # of one class: no balanced accuracy
        "test/sex/balanced_accuracy": 0.5,
        "test/sex/accuracy": 1 / 3,
        "test/balanced_accuracy": 0.5,
    }


def test_notes_report_answers_that_are_cut_or_differ_from_the_scored_ones() -> None:
    sure = {"female": 0.2, "male": 0.8}
    agree = [make_prediction(text="male.", predicted="male", probabilities=sure)] * 9
    differs = make_prediction(text="", cut=True, probabilities=sure)
    number = make_prediction(label=40, target="age", text="40.", predicted=40.0)
    scored_only = make_prediction(probabilities=sure)
    assert prediction_notes([*agree, number, scored_only]) == []
    cut = "1 of 11 generated answers were cut before they ended; raise evaluate.max_new_tokens"
    assert prediction_notes([*agree, differs, number, scored_only]) == [cut], "one of ten is no more than a tenth"
    _, note = prediction_notes([*agree[1:], differs, number])
    assert note.startswith("sex: in 1 of 9 conversations the generated answer is not the candidate with the highest")


@pytest.mark.parametrize("classes", [{}, {"sex": 2}, {"sex": 1}, {"sex": 1, "diagnosis": 2}])
def test_metric_names_are_those_of_the_validation_metrics(classes: dict[str, int]) -> None:
    labels = [(target, "mf"[i]) for target, number in classes.items() for i in range(number)]
    rows = [scored("a", 63.5, "age"), *(scored("a", label, of, m=0.9, f=0.1) for of, label in labels)]
    assert sorted(validation_metrics(rows)) == sorted(metric_names(classes))


def test_the_chance_level_is_the_mean_over_targets_of_one_in_the_number_of_classes() -> None:
    classes = {"sex": 2, "diagnosis": 4}
    assert chance_level("eval/diagnosis/balanced_accuracy", classes) == 0.25
    assert chance_level("eval/balanced_accuracy", classes) == 0.375
    assert chance_level("eval/loss", classes) is None
    assert chance_level("eval/balanced_accuracy", {}) is None


def matrices(truth: str, predicted: str, classes: str = "mf") -> NDArray:
    rows = [make_prediction(label=t, predicted=p) for t, p in zip(truth, predicted, strict=True)]
    return confusion_matrices(rows, classes)


def of_classes(truth: str, predicted: str, classes: str = "mf") -> dict[str, float]:
    counts = matrices(truth, predicted, classes).sum(0, keepdims=True)
    return {name: value[0] for name, value in class_metrics(counts, classes).items()}


def draw(size: int, classes: int) -> tuple[NDArray, NDArray, NDArray]:
    """Labels, probabilities with ties, and five weightings of them."""
    random = np.random.default_rng(size)
    truth = np.concatenate([np.arange(classes), random.integers(0, classes, size - classes)])
    raw = np.round(random.dirichlet(np.ones(classes), size) + np.eye(classes)[truth] * 0.3, 2) + 0.01
    return truth, raw / raw.sum(1, keepdims=True), random.integers(0, 4, (5, size)).astype(float)


@pytest.mark.parametrize("size", [9, 200])
@pytest.mark.parametrize("classes", [2, 3])
def test_class_metrics_equal_those_of_scikit_learn(size: int, classes: int) -> None:
    truth, probabilities, weights = draw(size, classes)
    predicted = probabilities.argmax(1)
    predicted[:2] = classes  # no class
    counts = np.tensordot(
        weights, matrices(*("".join("abc-"[i] for i in x) for x in (truth, predicted)), "abc"[:classes]), 1
    )
    ours = class_metrics(counts, CLASSES[:classes])
    for i, w in enumerate(weights):
        options = {"labels": range(classes), "sample_weight": w}
        precision, recall, _, _ = sk.precision_recall_fscore_support(truth, predicted, zero_division=np.nan, **options)
        assert ours["accuracy"][i] == pytest.approx(sk.accuracy_score(truth, predicted, sample_weight=w))
        assert ours["balanced_accuracy"][i] == pytest.approx(np.nanmean(recall))
        assert ours["f1"][i] == pytest.approx(sk.f1_score(truth, predicted, average="macro", **options))
        assert [ours[f"recall/{c}"][i] for c in CLASSES[:classes]] == pytest.approx(recall, nan_ok=True)
        assert [ours[f"precision/{c}"][i] for c in CLASSES[:classes]] == pytest.approx(precision, nan_ok=True)


@pytest.mark.parametrize("size", [9, 200])
@pytest.mark.parametrize("classes", [2, 3])
def test_probability_metrics_equal_those_of_scikit_learn(size: int, classes: int) -> None:
    truth, probabilities, weights = draw(size, classes)
    weights[:, :classes] += 1  # scikit-learn wants each class
    ours = probability_metrics(truth, probabilities, weights)
    for i, w in enumerate(weights):
        scores = probabilities[:, 1] if classes == 2 else probabilities
        distance = np.average(((probabilities - np.eye(classes)[truth]) ** 2).sum(1), weights=w)
        brier = sk.brier_score_loss(truth, scores, sample_weight=w) if classes == 2 else distance
        assert ours["auc"][i] == pytest.approx(sk.roc_auc_score(truth, scores, sample_weight=w, multi_class="ovr"))
        assert ours["brier"][i] == pytest.approx(brier)
    twice = np.repeat(np.arange(size), weights[0].astype(int))
    repeated = probability_metrics(truth[twice], probabilities[twice], np.ones((1, len(twice))))
    assert {k: v[0] for k, v in ours.items()} == pytest.approx({k: v[0] for k, v in repeated.items()})


def test_each_true_class_has_the_same_weight_and_no_answer_is_wrong() -> None:
    assert matrices("mmmf", "mf-f").sum(0).tolist() == [[1, 1, 1], [0, 1, 0]]
    assert of_classes("mmmf", "mmmm")["balanced_accuracy"] == 0.5
    assert of_classes("mmmf", "m-ff")["balanced_accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert of_classes("mm", "mf")["balanced_accuracy"] == 0.5, "a class that is predicted and never true does not count"


def test_the_last_of_two_classes_is_positive() -> None:
    found = of_classes("mmmff", "mm-mf", "fm")
    assert (found["sensitivity"], found["specificity"]) == (pytest.approx(2 / 3), 0.5)


def test_metrics_without_cases_are_nan_and_left_out_of_means() -> None:
    found = of_classes("mm", "m-")
    assert np.isnan([found["recall/f"], found["precision/f"]]).all()
    assert found["balanced_accuracy"] == 0.5
    assert np.isnan(probability_metrics(np.array([1, 1]), np.array([[0.1, 0.9]] * 2), np.ones((1, 2)))["auc"])


def test_the_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    best = np.array([0.9, 0.88, 0.65, 0.5])  # bins (0.8, 0.9], (0.6, 0.7], (0.4, 0.5]; the last one is a tie: wrong
    probabilities = np.stack([[0.9, 0.88, 0.35, 0.5], [0.1, 0.12, 0.65, 0.5]], 1)
    gaps = abs((1 + 0) - (best[0] + best[1])) + abs(1 - best[2]) + abs(0 - best[3])
    found = probability_metrics(np.array([0, 1, 1, 0]), probabilities, np.ones((1, 4)))
    assert found["calibration_error"][0] == pytest.approx(gaps / 4)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_number_metrics_equal_those_of_scikit_learn_and_scipy(offset: float) -> None:
    random = np.random.default_rng(0)
    truth = random.normal(50, 15, 60) + offset
    predicted = truth + random.normal(2, 8, 60)
    weights = random.integers(0, 4, (5, 60)).astype(float)
    ours = number_metrics(truth, predicted, weights)
    for i, w in enumerate(weights):
        repeated = np.repeat(np.arange(60), w.astype(int))
        assert ours["mae"][i] == pytest.approx(sk.mean_absolute_error(truth, predicted, sample_weight=w))
        assert ours["rmse"][i] == pytest.approx(sk.root_mean_squared_error(truth, predicted, sample_weight=w))
        assert ours["r2"][i] == pytest.approx(sk.r2_score(truth, predicted, sample_weight=w))
        assert ours["pearson"][i] == pytest.approx(stats.pearsonr(truth[repeated], predicted[repeated]).statistic)


def test_numbers_that_differ_by_rounding_errors_only_have_no_r2_and_no_correlation() -> None:
    same, other = np.full(3, 0.1) * 3, np.array([1.0, 2.0, 4.0])
    weights = np.array([[1.0, 1, 1], [3, 0, 0], [0, 0, 0]])
    found = number_metrics(same, other, weights)
    assert np.isnan([found["r2"], found["pearson"]]).all()
    found = number_metrics(other, same, weights)
    assert np.isnan(found["pearson"]).all()
    assert np.isnan(found["r2"]).tolist() == [False, True, True]
    assert np.isnan(found["mae"]).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("truth", "text", "token_f1", "rouge_l", "exact"),
    [
        ("The scan is normal.", "the scan is normal", 1, 1, 1),
        ("A scan is normal.", "The scan is normal", 1, 3 / 4, 1),  # articles count for ROUGE
        ("old brain small", "small old brain", 1, 2 / 3, 0),  # the order counts for ROUGE
        ("large left lesion", "lesion", 0.5, 0.5, 0),
        ("lesion lesion", "lesion", 2 / 3, 2 / 3, 0),
        ("lesion", "", 0, 0, 0),
        ("...", "", 1, 1, 1),
    ],
)
def test_text_metrics_are_those_of_squad_and_rouge(
    truth: str, text: str, token_f1: float, rouge_l: float, exact: float
) -> None:
    expected = {"token_f1": token_f1, "rouge_l": rouge_l, "exact": exact}
    assert text_metrics(truth, text) == pytest.approx(expected)
    assert text_metrics(text, truth) == pytest.approx(expected)


GRID = tuple(float(age) for age in range(20, 81))


def scored_number(subject: str, label: float, centre: float, spread: float, shift: float = 0) -> Prediction:
    shares = stats.norm.pdf(GRID, centre + shift, spread)
    shares /= shares.sum()
    return make_prediction(
        subject, label, target="age", numbers=GRID, number_probabilities=tuple(shares), text="x", predicted=50.0
    )


def test_numbers_are_scored_by_the_median_of_the_mean_distribution_of_a_subject() -> None:
    rng = np.random.default_rng(0)
    centres, labels = rng.uniform(30, 70, 40), rng.uniform(25, 75, 40).round()
    rows = [
        scored_number(f"sub-{i}", float(labels[i]), float(centres[i]) + shift, 4.0)
        for i in range(40)
        for shift in (-3, 3)
    ]
    values = validation_metrics(rows)
    mixtures = np.array([[p.number_probabilities for p in rows[2 * i : 2 * i + 2]] for i in range(40)]).mean(1)
    medians = [GRID[int(np.flatnonzero(np.cumsum(of_one) >= 0.5)[0])] for of_one in mixtures]
    assert values["eval/age/mae"] == pytest.approx(sk.mean_absolute_error(labels, medians))
    assert values["eval/age/rmse"] == pytest.approx(sk.root_mean_squared_error(labels, medians))
    assert values["eval/age/r"] == pytest.approx(stats.pearsonr(labels, medians).statistic)
    assert {f"eval/age/{name}" for name in ("mae", "rmse", "r")} < {*metric_names({}, numbers=["age"])}

    (group, *_) = tabulate(rows, EvaluateSettings(bootstrap=100, breakdown=[]), 0, {"age": [40, 60]})
    found = {name: estimate.value for name, estimate in group.metrics.items()}
    assert found["likelihood/subjects/mae"] == pytest.approx(values["eval/age/mae"])
    assert found["generated/subjects/mae"] == pytest.approx(sk.mean_absolute_error(labels, np.full(40, 50.0)))
    nearest = [GRID.index(label) for label in labels]
    assert found["likelihood/subjects/nll"] == pytest.approx(np.mean(-np.log(mixtures[range(40), nearest])))
    assert found["likelihood/subjects/mae_of_mean"] == pytest.approx(np.abs(mixtures @ GRID - labels).mean())


def test_the_intervals_of_calibrated_distributions_contain_nine_of_ten_labels() -> None:
    rng = np.random.default_rng(1)
    centres = rng.uniform(40, 60, 2000)
    labels = rng.normal(centres, 5).round()
    rows = [
        scored_number(f"s{i}", float(label), float(centre), 5.0)
        for i, (label, centre) in enumerate(zip(labels, centres, strict=True))
    ]
    (group, *_) = tabulate(rows, EvaluateSettings(bootstrap=100, breakdown=[]))
    assert group.metrics["likelihood/subjects/interval_coverage"].value == pytest.approx(0.9, abs=0.03)
    assert group.metrics["likelihood/subjects/interval_width"].value == pytest.approx(2 * 1.645 * 5, abs=1)

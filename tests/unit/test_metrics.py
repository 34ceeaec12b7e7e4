"""Metrics of classes, probabilities, numbers and texts, and the validation metrics of trainings."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sk

from umbrella.evaluation.metrics import (
    balanced_accuracy,
    chance_level,
    class_indices,
    class_metrics,
    confusion_matrix,
    metric_names,
    number_metrics,
    prediction_notes,
    probability_metrics,
    text_metrics,
    validation_metrics,
)
from umbrella.evaluation.predictions import Answer, Prediction


def scored(
    subject: str, label: str | float, target: str = "sex", nll: float = 1.0, tokens: int = 1, **p: float
) -> Prediction:
    found = {"probabilities": p, "answer_nll": nll, "answer_tokens": tokens}
    return Prediction("t", "T1", subject, target, label, str(label), **found)


def test_a_subject_is_predicted_by_the_mean_probability_of_its_conversations() -> None:
    metrics = validation_metrics(
        [
            scored("a", "m", m=0.9, f=0.1),  # one sure conversation outweighs
            scored("a", "m", m=0.4, f=0.6),  # two that lean to the other side
            scored("a", "m", m=0.4, f=0.6),
            scored("b", "f", m=0.7, f=0.3),
            scored("c", "f", m=0.2, f=0.8),
        ]
    )
    assert metrics["eval/sex/balanced_accuracy"] == (1 + 0.5) / 2
    assert metrics["eval/sex/accuracy"] == 2 / 5
    assert metrics["eval/balanced_accuracy"] == 0.75


def test_equal_probabilities_predict_nothing() -> None:
    metrics = validation_metrics(
        [scored("a", "m", m=0.5, f=0.5), scored("b", "f", m=0.25, f=0.75), scored("b", "f", m=0.75, f=0.25)]
    )
    assert metrics["eval/sex/balanced_accuracy"] == 0
    assert metrics["eval/sex/accuracy"] == 1 / 3


def test_a_subject_whose_label_differs_between_conversations_counts_once_for_each() -> None:
    older = [
        scored("a", "first", "older", first=0.9, second=0.1),
        scored("a", "second", "older", first=0.7, second=0.3),
    ]
    assert validation_metrics(older)["eval/older/balanced_accuracy"] == 0.5


def test_targets_are_averaged_and_the_loss_is_per_token() -> None:
    metrics = validation_metrics(
        [
            scored("a", "m", nll=3.0, tokens=2, m=0.9, f=0.1),
            scored("b", "f", nll=3.0, tokens=1, m=0.1, f=0.9),
            scored("a", "old", "group", nll=0.0, tokens=0, old=0.9, young=0.1),
            scored("a", "AD", "diagnosis", nll=1.0, tokens=1, AD=0.1, CN=0.9),
            scored("b", "CN", "diagnosis", nll=1.0, tokens=1, AD=0.1, CN=0.9),
            scored("a", 63.5, "age", nll=4.0, tokens=5),
        ],
        prefix="test",
    )
    assert metrics == {
        "test/loss": 12 / 10,
        "test/diagnosis/balanced_accuracy": 0.5,
        "test/diagnosis/accuracy": 0.5,
        "test/group/accuracy": 1.0,  # all are old: no balanced accuracy
        "test/sex/balanced_accuracy": 1.0,
        "test/sex/accuracy": 1.0,
        "test/balanced_accuracy": 0.75,
    }


def test_generated_answers_that_are_cut_or_differ_from_the_scored_ones_are_reported() -> None:
    sure = {"female": 0.2, "male": 0.8}
    agree = [Prediction("t", "T1", "a", "sex", "male", "male.", text="male.", said="male", probabilities=sure)] * 9
    [differs] = [Prediction("t", "T1", "a", "sex", "male", "male.", text="", cut=True, probabilities=sure)]
    [number] = [Prediction("t", "T1", "a", "age", 40, "40.", text="40.", said=40.0)]
    [silent] = [Prediction("t", "T1", "a", "sex", "male", "male.", probabilities=sure)]
    assert prediction_notes([*agree, number, silent]) == []
    cut = "1 of 11 generated answers were cut before they ended; raise evaluate.max_new_tokens"
    assert prediction_notes([*agree, differs, number, silent]) == [cut], "one of ten is no more than a tenth"
    _, note = prediction_notes([*agree[1:], differs, number])
    assert note.startswith("sex: in 1 of 9 conversations the generated answer is not the candidate with the highest")


def test_without_classes_there_is_only_the_loss() -> None:
    assert validation_metrics([scored("a", 63.5, "age", nll=2.0, tokens=4)]) == {"eval/loss": 0.5}


@pytest.mark.parametrize("classes", [{}, {"sex": 2}, {"sex": 1}, {"sex": 1, "diagnosis": 2}])
def test_the_names_of_all_metrics_are_known_before_there_are_any(classes: dict[str, int]) -> None:
    labels = [(target, "mf"[i]) for target, number in classes.items() for i in range(number)]
    metrics = validation_metrics(
        [scored("a", 63.5, "age"), *(scored("a", label, of, m=0.9, f=0.1) for of, label in labels)]
    )
    assert sorted(metrics) == sorted(metric_names(classes))


def test_chance_is_the_mean_over_the_targets_of_one_in_the_number_of_classes() -> None:
    classes = {"sex": 2, "diagnosis": 4}
    assert chance_level("eval/diagnosis/balanced_accuracy", classes) == 0.25
    assert chance_level("eval/balanced_accuracy", classes) == 0.375
    assert chance_level("eval/loss", classes) is None
    assert chance_level("eval/balanced_accuracy", {}) is None


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


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_numbers_are_measured_as_scikit_learn_and_scipy_do(offset: float) -> None:
    random = np.random.default_rng(0)
    truth = random.normal(50, 15, 60) + offset
    said = truth + random.normal(2, 8, 60)
    weights = random.integers(0, 4, (5, 60)).astype(float)
    ours = number_metrics(truth, said, weights)
    for i, w in enumerate(weights):
        repeated = np.repeat(np.arange(60), w.astype(int))
        assert ours["mae"][i] == pytest.approx(sk.mean_absolute_error(truth, said, sample_weight=w))
        assert ours["rmse"][i] == pytest.approx(sk.root_mean_squared_error(truth, said, sample_weight=w))
        assert ours["r2"][i] == pytest.approx(sk.r2_score(truth, said, sample_weight=w))
        assert ours["pearson"][i] == pytest.approx(stats.pearsonr(truth[repeated], said[repeated]).statistic)


def test_what_varies_by_rounding_alone_does_not_vary() -> None:
    same, other = np.full(3, 0.1) * 3, np.array([1.0, 2.0, 4.0])
    drawn = np.array([[1.0, 1, 1], [3, 0, 0], [0, 0, 0]])
    found = number_metrics(same, other, drawn)
    assert np.isnan(found["r2"]).all()
    assert np.isnan(found["pearson"]).all()
    found = number_metrics(other, same, drawn)
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
def test_texts_are_measured_as_squad_and_rouge_do(
    truth: str, text: str, token_f1: float, rouge_l: float, exact: float
) -> None:
    expected = {"token_f1": token_f1, "rouge_l": rouge_l, "exact": exact}
    assert text_metrics(truth, text) == pytest.approx(expected)
    assert text_metrics(text, truth) == pytest.approx(expected)

"""What trainings report, worked out by hand."""

import pytest

from umbrella.evaluation.metrics import chance_level, metric_names, prediction_notes, validation_metrics
from umbrella.evaluation.predictions import Prediction


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

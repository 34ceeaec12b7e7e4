"""The groups of an evaluation and their metrics."""

from typing import Any

import numpy as np
import pytest

from tests.conftest import make_prediction
from umbrella.evaluation.group_metrics import Group, tabulate
from umbrella.evaluation.metrics import validation_metrics
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.settings import EvaluateSettings

SETTINGS = EvaluateSettings(bootstrap=100)
BALANCED = "likelihood/subjects/balanced_accuracy"


def scored(subject: str, label: str, male: float, target: str = "sex", **metadata: Any) -> Prediction:
    task_type = metadata.pop("task_type", "T1")
    probabilities = {"female": 1 - male, "male": male}
    return make_prediction(
        subject, label, target=target, task_type=task_type, probabilities=probabilities, metadata=metadata
    )


def generated(subject: str, label: str | float | None, predicted: Any, target: str = "sex") -> Prediction:
    return make_prediction(subject, label, target=target, predicted=predicted, text=f"{predicted}.")


def only(groups: list[Group], by: str = "all", value: str = "", target: str = "sex") -> Group:
    (group,) = [g for g in groups if (g.target, g.by, g.value) == (target, by, value)]
    return group


def values(group: Group) -> dict[str, float]:
    return {name: estimate.value for name, estimate in group.metrics.items()}


def random_predictions(subjects: int = 30) -> list[Prediction]:
    random = np.random.default_rng(0)
    made = []
    for i in range(subjects):
        label = ("male", "female")[i % 3 == 0]
        shares = random.random(random.integers(1, 5)).round(1).tolist()
        made += [scored(f"s{i}", label, share, site="AB"[i % 2]) for share in shares]
        made.append(generated(f"s{i}", ("AD", "CN")[i % 2], "AD", "diagnosis"))
    return made


def test_subgroups_come_in_order_without_the_target_itself() -> None:
    rows = [
        scored("a", "male", 0.9, task="one", site="B", sex="male", age=19),
        scored("b", "male", 0.9, task="two", site="A", sex="male", age=20.0),
        scored("c", "male", 0.9, task_type="T3", task="two", comparison_type="same_sex", age=75, site=None),
        scored("d", "male", 0.9, task_type="T3", task="two", reference_label="female", age=40),
    ]
    assert [(group.by, group.value, group.conversations) for group in tabulate(rows, SETTINGS)] == [
        ("all", "", 4),
        ("task_type", "T1", 2),
        ("task_type", "T3", 2),
        ("task", "one", 1),
        ("task", "two", 3),
        ("comparison_type", "same", 1),
        ("comparison_type", "different", 1),
        ("site", "A", 1),
        ("site", "B", 1),
        ("age", "below 20", 1),
        ("age", "20 to 40", 1),
        ("age", "40 to 60", 1),
        ("age", "60 and above", 1),
    ]
    assert [group.by for group in tabulate(rows[:1], SETTINGS)] == ["all", "site", "age"], "of one task: no subgroup"


def test_a_model_that_copies_the_reference_shows_in_its_metric_and_in_the_comparisons() -> None:
    rows = []
    for i in range(8):
        label, reference = ("male", "female")[i % 2], ("male", "female")[i // 2 % 2]
        copied = 0.9 if reference == "male" else 0.1
        rows.append(scored(f"s{i}", label, copied, task_type="T3", reference_label=reference))
        rows.append(scored(f"s{i}", label, 0.9 if label == "male" else 0.1))
    groups, name = tabulate(rows, SETTINGS), "likelihood/conversations/copies_reference"
    for by, value, accuracy in (
        ("task_type", "T3", 0.5),
        ("comparison_type", "same", 1.0),
        ("comparison_type", "different", 0.0),
    ):
        group = only(groups, by, value)
        assert group.metrics[name] == (1.0, 1.0, 1.0)
        assert group.metrics["likelihood/conversations/accuracy"].value == accuracy
        assert group.references["copies_reference"] == accuracy, "of a model that is always right"
    assert only(groups).metrics[name].value == 1.0, "of the comparisons in it"
    assert name not in only(groups, "task_type", "T1").metrics


def test_trainings_and_evaluations_give_the_same_metrics_for_the_same_predictions() -> None:
    rows = [row for row in random_predictions() if row.probabilities]
    summary, metrics = validation_metrics(rows), values(only(tabulate(rows, SETTINGS)))
    assert metrics[BALANCED] == summary["eval/sex/balanced_accuracy"] > 0.3
    assert metrics["likelihood/conversations/accuracy"] == summary["eval/sex/accuracy"]


def test_one_true_class_gives_no_balanced_accuracy() -> None:
    found = values(only(tabulate([scored("a", "male", 0.9), scored("b", "male", 0.9)], SETTINGS)))
    assert np.isnan(found[BALANCED])
    assert found["likelihood/subjects/accuracy"] == 1


def test_an_invalid_class_is_wrong_and_an_invalid_number_is_left_out() -> None:
    rows = [
        generated("a", "male", "male"),
        generated("a", "male", None),
        generated("b", "female", "no class"),
        generated("a", 40, 43.0, "age"),
        generated("b", 50, None, "age"),
    ]
    sex, age = (only(tabulate(rows, SETTINGS), target=target) for target in ("sex", "age"))
    assert (sex.invalid, age.invalid) == (2, 1)
    assert sex.confusion["generated/conversations"] == [[0, 0, 1], [0, 1, 1]]
    assert values(sex)["generated/conversations/accuracy"] == pytest.approx(1 / 3)
    assert values(sex)["generated/votes/balanced_accuracy"] == 0.5
    assert values(age)["generated/conversations/mae"] == 3.0


def test_metrics_have_the_names_that_the_docstring_says_and_those_of_what_was_generated_only() -> None:
    assert tabulate([], SETTINGS) == []
    classes = ["accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity"]
    classes += [f"{name}/{label}" for name in ("recall", "precision") for label in ("female", "male")]
    likely = only(tabulate([scored("a", "male", 0.9)], SETTINGS))
    probable = [*classes, "auc", "brier", "calibration_error"]
    expected = {f"likelihood/{level}/{name}" for level in ("conversations", "subjects") for name in probable}
    assert (set(likely.metrics), likely.invalid) == (expected | {f"likelihood/votes/{name}" for name in classes}, None)
    rows = [generated("a", "male", "male"), generated("b", "female", None)]
    rows += [generated("a", 3, 4.0, "age"), generated("a", None, None, "x")]
    levels = ("conversations", "subjects")
    for group, names, of in (
        (only(tabulate(rows, SETTINGS)), classes, ("conversations", "votes")),
        (only(tabulate(rows, SETTINGS), target="age"), ["mae", "rmse", "r2", "pearson"], levels),
        (only(tabulate(rows, SETTINGS), target="x"), ["token_f1", "rouge_l", "exact"], levels),
    ):
        assert set(group.metrics) == {f"generated/{level}/{name}" for level in of for name in names}


def test_references_are_the_metrics_of_the_training_labels_over_subjects() -> None:
    rows = [scored(s, label, 0.5) for s, label in (("a", "male"), ("a", "male"), ("b", "female"), ("c", "female"))]
    rows += [generated("a", 40, 40.0, "age"), generated("b", 50, 50.0, "age")]
    groups = tabulate(rows, SETTINGS, training={"sex": ["male", "male", "female", "other"], "age": [30, 50]})
    assert only(groups).classes == ("female", "male", "other")
    assert only(groups).references == {"chance": 1 / 2, "majority": 1 / 3}
    assert only(groups, target="age").references == pytest.approx({"mean/mae": 5, "mean/rmse": 50**0.5})
    # Without training labels: of these subjects, each once.
    assert only(tabulate(rows, SETTINGS)).references == {"chance": 0.5, "majority": 2 / 3}


def test_copies_and_order_of_the_conversations_change_neither_metrics_nor_intervals() -> None:
    rows = random_predictions()
    for a, b, c in zip(*(tabulate(of, SETTINGS) for of in (rows, rows * 3, rows[::-1])), strict=True):
        assert (b.conversations, b.ties) == (3 * a.conversations, a.ties)
        for name, estimate in a.metrics.items():
            assert b.metrics[name] == pytest.approx(estimate, nan_ok=True), name
        assert values(c) == pytest.approx(values(a), nan_ok=True)

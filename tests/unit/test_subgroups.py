"""Tables of an evaluation: which groups there are, and what their numbers are."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from umbrella.evaluation.metrics import validation_metrics
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.evaluation.subgroups import Group, tabulate

SETTINGS = EvaluateSettings(bootstrap=100)
GENERATED = ("generated/conversations", "generated/votes")


def prediction(
    subject: str,
    label: str | float | None,
    male: float | None = None,
    said: str | float | None = None,
    text: str | None = None,
    target: str = "sex",
    task_type: str = "T1",
    **metadata: Any,
) -> Prediction:
    return Prediction(
        task_id="t",
        task_type=task_type,
        subject_id=subject,
        target=target,
        label=label,
        truth=f"{label}.",
        metadata=metadata,
        probabilities={} if male is None else {"female": 1 - male, "male": male},
        answer_nll=1.0,
        answer_tokens=1,
        text=text,
        said=said,
    )


def only(groups: list[Group], by: str = "all", value: str = "", target: str = "sex") -> Group:
    (group,) = [g for g in groups if (g.target, g.by, g.value) == (target, by, value)]
    return group


def values(group: Group) -> dict[str, float]:
    return {name: estimate.value for name, estimate in group.metrics.items()}


def overall(groups: list[Group], metric: str = "likelihood/subjects/balanced_accuracy") -> float:
    """The mean of a metric over the targets for which it is defined."""
    found = [values(group).get(metric, np.nan) for group in groups if group.by == "all"]
    defined = [value for value in found if not np.isnan(value)]
    return float(np.mean(defined)) if defined else np.nan


def random_predictions(subjects: int = 30) -> list[Prediction]:
    random = np.random.default_rng(0)
    made = []
    for i in range(subjects):
        label = ("male", "female")[i % 3 == 0]
        for _ in range(random.integers(1, 5)):
            male = round(float(random.random()), 1)
            made.append(prediction(f"s{i}", label, male, site="AB"[i % 2]))
        made.append(prediction(f"s{i}", ("AD", "CN")[i % 2], target="diagnosis", said="AD", text="AD."))
    return made


def test_parts_come_in_order_and_the_target_itself_is_none() -> None:
    rows = [
        prediction("a", "male", 0.9, task="one", site="B", sex="male", age=19),
        prediction("b", "male", 0.9, task="two", site="A", sex="male", age=20.0),
        prediction("c", "male", 0.9, task_type="T3", task="two", comparison_type="same_sex", age=75, site=None),
        prediction("d", "male", 0.9, task_type="T3", task="two", reference_label="female", age=40),
    ]
    found = [(group.by, group.value, group.conversations) for group in tabulate(rows, SETTINGS)]
    assert found == [
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
    one_task = tabulate(rows[:1], SETTINGS)
    assert [group.by for group in one_task] == ["all", "site", "age"]


def test_a_copier_of_the_reference_is_seen_at_once() -> None:
    rows = []
    for i in range(8):
        label, reference = ("male", "female")[i % 2], ("male", "female")[i // 2 % 2]
        rows.append(
            prediction(f"s{i}", label, 0.9 if reference == "male" else 0.1, task_type="T3", reference_label=reference)
        )
        rows.append(prediction(f"s{i}", label, 0.9 if label == "male" else 0.1, said=label, text=label))
    groups = tabulate(rows, SETTINGS)
    name = "likelihood/conversations/copies_reference"
    for by, value, accuracy, when_right in (
        ("task_type", "T3", 0.5, 0.5),
        ("comparison_type", "same", 1.0, 1.0),
        ("comparison_type", "different", 0.0, 0.0),
    ):
        group = only(groups, by, value)
        assert group.metrics[name] == (1.0, 1.0, 1.0)
        assert group.metrics["likelihood/conversations/accuracy"].value == accuracy
        assert group.references["copies_reference"] == when_right
    assert only(groups).metrics[name].value == 1.0  # of the comparisons in it
    assert name not in only(groups, "task_type", "T1").metrics


def test_trainings_and_tables_give_the_same_numbers_for_the_same_predictions() -> None:
    rows = [row for row in random_predictions() if row.probabilities]
    rows += [prediction(p.subject_id, p.label, 0.7, target="other") for p in rows]
    rows = [replace(p, answer_nll=1.0, answer_tokens=1) for p in rows]
    summary, groups = validation_metrics(rows), tabulate(rows, SETTINGS)
    for target in ("sex", "other"):
        metrics = values(only(groups, target=target))
        assert metrics["likelihood/subjects/balanced_accuracy"] == summary[f"eval/{target}/balanced_accuracy"]
        assert metrics["likelihood/conversations/accuracy"] == summary[f"eval/{target}/accuracy"]
    assert overall(groups) == summary["eval/balanced_accuracy"]
    assert summary["eval/sex/balanced_accuracy"] + 0.3 > 0.5  # not by being empty
    assert np.isnan(overall([]))


def test_one_true_class_gives_no_balanced_accuracy() -> None:
    rows = [prediction("a", "male", 0.9), prediction("b", "male", 0.9)]
    rows += [prediction("a", "male", 0.9, target="other"), prediction("b", "female", 0.9, target="other")]
    groups = tabulate(rows, SETTINGS)
    name = "likelihood/subjects/balanced_accuracy"
    assert np.isnan(values(only(groups))[name])
    assert values(only(groups))["likelihood/subjects/accuracy"] == 1
    assert overall(groups) == values(only(groups, target="other"))[name] == 0.5


def test_an_invalid_class_is_wrong_and_an_invalid_number_is_left_out() -> None:
    rows = [
        prediction("a", "male", said="male", text="male"),
        prediction("a", "male", text="a brain"),
        prediction("b", "female", said="unheard of", text="unheard of"),
        prediction("a", 40, said=43.0, text="43", target="age"),
        prediction("b", 50, text="old", target="age"),
    ]
    sex, age = (only(tabulate(rows, SETTINGS), target=target) for target in ("sex", "age"))
    assert (sex.invalid, age.invalid) == (2, 1)
    assert sex.confusion["generated/conversations"] == [[0, 0, 1], [0, 1, 1]]
    assert values(sex)["generated/conversations/accuracy"] == pytest.approx(1 / 3)
    assert values(sex)["generated/votes/balanced_accuracy"] == 0.5
    assert values(age)["generated/conversations/mae"] == 3.0


def test_what_was_not_generated_has_no_numbers() -> None:
    group = only(tabulate([prediction("a", "male", 0.9), prediction("b", "female", 0.4)], SETTINGS))
    assert group.invalid is None
    assert {name.split("/")[0] for name in group.metrics} == {"likelihood"}
    assert tabulate([], SETTINGS) == []


def test_ways_levels_and_metrics_have_the_names_that_the_docstring_says() -> None:
    row = prediction("a", "male", 0.9, "male", "male")
    said = ["accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity"]
    said += [f"{name}/{label}" for name in ("recall", "precision") for label in ("female", "male")]
    probable = [*said, "auc", "brier", "calibration_error"]
    expected = {f"likelihood/{level}/{name}" for level in ("conversations", "subjects") for name in probable}
    expected |= {f"{level}/{name}" for level in ("likelihood/votes", *GENERATED) for name in said}
    assert set(only(tabulate([row], SETTINGS)).metrics) == expected
    number = only(tabulate([prediction("a", 3, said=4.0, target="age")], SETTINGS), target="age")
    levels = ("generated/conversations", "generated/subjects")
    assert set(number.metrics) == {f"{level}/{name}" for level in levels for name in ("mae", "rmse", "r2", "pearson")}
    text = only(tabulate([prediction("a", None, text="b", target="x")], SETTINGS), target="x")
    assert set(text.metrics) == {f"{level}/{name}" for level in levels for name in ("token_f1", "rouge_l", "exact")}
    assert text.kind == "texts"


def test_references_are_what_the_training_labels_give_of_subjects() -> None:
    rows = [prediction(s, label, 0.5) for s, label in (("a", "male"), ("a", "male"), ("b", "female"), ("c", "female"))]
    rows += [prediction("a", 40, said=40.0, target="age"), prediction("b", 50, said=50.0, target="age")]
    training = {"sex": ["male", "male", "female", "other"], "age": [30, 50]}
    groups = tabulate(rows, SETTINGS, training=training)
    assert only(groups).classes == ("female", "male", "other")
    assert only(groups).references == {"chance": 1 / 3, "majority": 1 / 3}
    assert only(groups, target="age").references == pytest.approx({"mean/mae": 5, "mean/rmse": 50**0.5})
    # Without training labels: of these subjects, each once.
    assert only(tabulate(rows, SETTINGS)).references == {"chance": 0.5, "majority": 2 / 3}


def test_copies_of_conversations_change_no_number_and_do_not_shrink_the_interval() -> None:
    rows = random_predictions()
    once, thrice = tabulate(rows, SETTINGS), tabulate(rows * 3, SETTINGS)
    for a, b in zip(once, thrice, strict=True):
        assert b.conversations == 3 * a.conversations
        assert b.ties == a.ties
        for name, estimate in a.metrics.items():
            assert b.metrics[name] == pytest.approx(estimate, nan_ok=True), name
    low, high = only(once).metrics["likelihood/conversations/accuracy"][1:]
    assert high - low > 0.1


def test_numbers_do_not_depend_on_the_order_of_the_rows() -> None:
    rows = random_predictions()
    for a, b in zip(tabulate(rows, SETTINGS), tabulate(rows[::-1], SETTINGS), strict=True):
        assert values(a) == pytest.approx(values(b), nan_ok=True)

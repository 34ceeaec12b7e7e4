"""Comparison of two runs on the same questions."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import permutation_test
from sklearn.metrics import balanced_accuracy_score, mean_absolute_error

from tests.conftest import make_prediction
from umbrella.base import UserError
from umbrella.evaluation.comparison import (
    ModelComparison,
    compare_models,
    comparison_notes,
    newest_runs,
    question_of,
    read_runs,
)
from umbrella.evaluation.predictions import Prediction, write_predictions
from umbrella.evaluation.settings import EvaluateSettings

SETTINGS = EvaluateSettings(bootstrap=200)
SEXES = ("female", "male")


def ages(draw: np.random.Generator, number: int, error: float) -> list[Prediction]:
    made = []
    for i in range(number):
        answer = 20 + i % 60 + draw.normal(0, error)
        made.append(make_prediction(f"s{i}", 20.0 + i % 60, target="age", task_id=f"age {i}", predicted=answer))
    return made


def sexes(draw: np.random.Generator, number: int, right: float) -> list[Prediction]:
    made = []
    for i in range(number):
        said = i % 2 if draw.random() < right else 1 - i % 2
        answer: dict[str, Any] = {"probabilities": {SEXES[said]: 0.8, SEXES[1 - said]: 0.2}}
        made.append(make_prediction(f"s{i}", SEXES[i % 2], task_id=f"sex {i}", **answer))
    return made


def compare(this: list[Prediction], that: list[Prediction], bootstrap: int = 200) -> list[ModelComparison]:
    return compare_models(this, {"other": that}, SETTINGS.model_copy(update={"bootstrap": bootstrap}))


def test_a_known_difference_is_found_and_its_interval_has_its_coverage() -> None:
    draw = np.random.default_rng(0)
    found = [compare(sexes(draw, 60, 0.9), sexes(draw, 60, 0.6))[0] for _ in range(200)]
    assert 0.89 < np.mean([c.difference.low <= 0.3 <= c.difference.high for c in found]) < 0.99
    assert np.median([c.p for c in found]) < 0.01
    (age,) = compare(ages(draw, 200, 5), ages(draw, 200, 10))
    assert age.p < 0.01
    assert age.difference.low < -5 * np.sqrt(2 / np.pi) < age.difference.high < 0


def test_p_values_of_equal_models_are_uniform() -> None:
    draw = np.random.default_rng(1)
    p = [compare(ages(draw, 40, 5), ages(draw, 40, 5))[0].p for _ in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.1
    assert 0.4 < np.mean(p) < 0.6
    same = ages(draw, 40, 5)
    assert compare(same, same)[0].p == 1


def test_values_equal_scikit_learn_and_p_equals_scipy() -> None:
    draw = np.random.default_rng(2)
    this, that = ages(draw, 12, 5) + sexes(draw, 40, 0.8), ages(draw, 12, 8) + sexes(draw, 40, 0.6)
    age, sex = compare(this[1:], that[:-3], 20_000)
    assert (age.subjects, age.left_out, sex.subjects, sex.left_out) == (11, 1, 37, 3)
    errors = [np.array([abs(p.predicted - p.label) for p in rows[1:12]]) for rows in (this, that)]  # type: ignore
    assert age.this == pytest.approx(mean_absolute_error(errors[0], np.zeros(11)))
    assert age.that == pytest.approx(errors[1].mean())
    exact = permutation_test(
        errors, lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", n_resamples=5000
    )
    assert age.p == pytest.approx(exact.pvalue, abs=0.02)
    labels = [p.label for p in this[12:-3]]
    assert sex.this == pytest.approx(balanced_accuracy_score(labels, [p.answer for p in this[12:-3]]))
    assert sex.that == pytest.approx(balanced_accuracy_score(labels, [p.answer for p in that[12:-3]]))
    low, high = sorted((age.p, sex.p))
    assert sorted((age.p_adjusted, sex.p_adjusted)) == [2 * low, max(2 * low, high)]


def test_an_undefined_p_is_no_test_of_the_correction() -> None:
    draw = np.random.default_rng(4)
    this, that = ([*ages(draw, 12, error), *sexes(draw, 1, 1)] for error in (5, 8))
    age, sex = compare(this, that)
    assert np.isnan([sex.p, sex.p_adjusted]).all()
    assert age.p_adjusted == age.p


def test_targets_that_are_not_compared_are_named() -> None:
    draw = np.random.default_rng(5)
    own = {"metadata": {"candidates": {"a": "a.", "b": "b."}}, "probabilities": {"a": 0.9, "b": 0.1}}
    texts = [make_prediction("s0", None, target="finding", text="normal")]
    choices = [make_prediction("s0", "a", target="choice", **own)]
    both = [*ages(draw, 9, 1), *texts, *choices]
    this = [*both, *sexes(draw, 9, 1)]
    (note,) = comparison_notes(this, compare(this, both))
    assert note.startswith("not compared with another run: choice, finding, sex; ")
    assert comparison_notes(both[:9], compare(both, both)) == []
    with pytest.raises(UserError, match="none of these questions"):
        newest_runs({"other": texts}, map(question_of, texts))


def test_the_newest_run_of_a_name_is_compared_for_each_target(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    answers = {"base-1-age": ages(draw, 9, 1), "base-2-age": ages(draw, 9, 1), "base-1-sex": sexes(draw, 9, 1)}
    for time, (name, of_run) in enumerate(answers.items()):
        (tmp_path / name).mkdir()
        write_predictions(tmp_path / name / "predictions.jsonl", of_run)
        os.utime(tmp_path / name / "predictions.jsonl", (time, time))
    runs = read_runs("base", tmp_path)
    asked = [question_of(p) for p in answers["base-1-age"] + answers["base-1-sex"]]
    assert newest_runs(runs, asked) == {"age": "base-2-age", "sex": "base-1-sex"}
    assert read_runs("base-1-age", tmp_path) == {"base-1-age": answers["base-1-age"]}
    assert read_runs(str(tmp_path / "base-1-age"), tmp_path / "x") == {"base-1-age": answers["base-1-age"]}
    with pytest.raises(UserError, match="there are base-1-age, base-1-sex, base-2-age"):
        read_runs("bas", tmp_path)
    with pytest.raises(UserError, match="none of these questions"):
        newest_runs(runs, [("another", *asked[0][1:])])
    (tmp_path / "base-1-age" / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_runs("base-1-age", tmp_path)

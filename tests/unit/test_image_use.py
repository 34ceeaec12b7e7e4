"""Whether answers need the image, and the verdict in words."""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import make_prediction
from tests.unit.test_evaluation_report import Page
from umbrella.config import Settings
from umbrella.evaluation.controls import SHOWN_LABEL
from umbrella.evaluation.group_metrics import Estimate, tabulate
from umbrella.evaluation.image_use import ImageUse, measure_image_use
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.report import AS_ASKED, CONDITIONS, EvaluationResult, print_evaluation, write_report
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.evaluation.verdict import is_better_than_chance
from umbrella.evaluation_run.evaluate import anonymised, with_cases

SETTINGS = EvaluateSettings(bootstrap=200)
ALL = (*CONDITIONS, "same_label", "other_label", "paraphrased")
VOLUMES = (("sMRI", "/a.nii"),)
AGES = np.linspace(20, 79, 40).round().tolist()
Answer = Callable[[int, Any, Any, str], Any]
"""(number of the subject, its label, the label of the volumes that are shown or None, condition) to an answer."""


def other_of(label: Any) -> Any:
    return {"male": "female", "female": "male"}[label] if isinstance(label, str) else (label + 30) % 60 + 20


def answers(answer: Answer, target: str = "sex", questions: int = 1, share: float = 0.9) -> dict[str, list[Prediction]]:
    """Condition to the answers of a model to questions about 40 subjects."""
    made: dict[str, list[Prediction]] = {}
    for condition in ALL:
        for i in range(40):
            label: Any = ("female", "male")[i % 2] if target == "sex" else AGES[i]
            shown = {AS_ASKED: label, "paraphrased": label, "same_label": label, "other_label": other_of(label)}
            shown["shuffled"] = ("female", "male")[i // 2 % 2] if target == "sex" else AGES[-i]
            said = answer(i, label, shown.get(condition), condition)
            fields: dict[str, Any] = {"predicted": said, "text": f"{said}", "metadata": {}, "volumes": VOLUMES}
            if target == "sex":
                fields["probabilities"] = {said: share, other_of(said): 1 - share}
            if condition in ("same_label", "other_label"):
                fields["metadata"] = {SHOWN_LABEL: shown[condition]}
            made.setdefault(condition, []).extend(
                make_prediction(f"sub-{i:02d}", label, target=target, task_id=f"{target}_{i}_{k}", **fields)
                for k in range(questions)
            )
    return made


def by_text(i: int, label: Any, shown: Any, condition: str) -> Any:
    return label


def by_image(i: int, label: Any, shown: Any, condition: str) -> Any:
    """Without an image it guesses, one answer for all."""
    return shown or ("male" if isinstance(label, str) else float(np.mean(AGES)))


def measured(predictions: Mapping[str, list[Prediction]], **options: Any) -> ImageUse:
    (use,) = measure_image_use(predictions, SETTINGS, **options).values()
    return use


def result_of(predictions: Mapping[str, list[Prediction]], **others: Any) -> EvaluationResult:
    groups = {c: tabulate(predictions[c], SETTINGS) for c in CONDITIONS}
    use = measure_image_use(predictions, SETTINGS)
    made = EvaluationResult(Settings(), "/m/step_1", "test", predictions, groups, {}, image_use=use)
    for name, value in others.items():  # fields of other parts of the report
        object.__setattr__(made, name, value)
    return made


@pytest.mark.parametrize("target", ["sex", "age"])
def test_a_model_that_reads_the_text_needs_no_image(target: str) -> None:
    use = measured(answers(by_text, target))
    assert use.quadrants == {"only_with_image": 0, "with_and_without": 40, "neither": 0, "only_without": 0}
    assert use.without_image == Estimate(1, 1, 1)
    assert (use.same_label.value, use.other_label.value, use.paraphrased.value) == (1, 0, 0)
    listed = [(reason, task_id.split("_")[0]) for reason, task_id in use.examples]
    assert listed == ([("right without the image", "sex")] * 5 if target == "sex" else [])


@pytest.mark.parametrize("target", ["sex", "age"])
def test_a_model_that_reads_the_image_needs_it_although_some_guesses_are_right(target: str) -> None:
    use = measured(answers(by_image, target))
    guesses = {"sex": 20, "age": sum(abs(age - np.mean(AGES)) <= use.tolerance for age in AGES)}[target]
    assert guesses > 8
    assert list(use.quadrants.values()) == [40 - guesses, guesses, 0, 0]
    assert use.without_image.value == pytest.approx(0, abs=1e-9)
    assert (use.same_label.value, use.other_label.value) == (1, 1)
    assert use.examples == [], "the usual guess"


def test_the_share_without_the_image_is_that_of_the_questions_with_a_cue() -> None:
    cue = answers(lambda i, label, *others: label if i % 4 < 2 else by_image(i, label, *others))
    use = measured(cue)
    assert use.without_image.value == pytest.approx(0.5)
    assert use.without_image.low < 0.4 < 0.6 < use.without_image.high
    # Two equal questions about each subject are no more evidence than one.
    twice = {c: [replace(p, task_id=f"{p.task_id}_{k}") for p in rows for k in range(2)] for c, rows in cue.items()}
    assert measured(twice).without_image == use.without_image


def test_a_number_is_right_within_half_the_mean_deviation_of_the_training_labels() -> None:
    training = {"age": [40.0, 60.0]}  # tolerance 5
    for error, right in ((5.0, 40), (5.1, 0)):
        use = measured(answers(lambda i, label, *_, e=error: label + e, "age"), training=training)
        assert (use.tolerance, use.quadrants["with_and_without"]) == (5, right)
    grid, shares = (40.0, 44.0, 60.0), (0.3, 0.6, 0.1)
    row = make_prediction("a", 44.0, numbers=grid, number_probabilities=shares, volumes=VOLUMES)
    rows = {c: [row] for c in (AS_ASKED, "blank")}
    assert measured(rows, training={"sex": [40.0, 60.0]}).table[0]["p(blank)"] == pytest.approx(0.9)


def choices(sizes: list[int], kept: Callable[[int], bool]) -> dict[str, list[Prediction]]:
    """Questions with as many texts of their own as candidates; only those of two or three are answered correctly.

    ``kept``: whether the answer to question i is the same with blank volumes.
    """
    made: dict[str, list[Prediction]] = {AS_ASKED: [], "blank": []}
    for (condition, rows), (i, size) in product(made.items(), enumerate(sizes)):
        texts = [f"{i}, option {k}" for k in range(size)]
        answer = texts[size > 3 or (condition == "blank" and not kept(i))]
        shares = {text: 0.9 if text == answer else 0.1 / (size - 1) for text in texts}
        fields: dict[str, Any] = {"metadata": {"candidates": texts}, "probabilities": shares, "volumes": VOLUMES}
        rows.append(make_prediction(f"sub-{i:02d}", texts[0], task_id=f"{i}", **fields))
    return made


@pytest.mark.parametrize("sizes", [[2] * 12, [3] * 12, [2] * 12 + [9] * 12])
def test_guesses_among_the_candidates_of_each_question_need_the_image_and_a_text_that_tells_does_not(
    sizes: list[int],
) -> None:
    guessing = measured(choices(sizes, lambda i: i % sizes[0] == 0))
    assert guessing.without_image.value == pytest.approx(0, abs=1e-9)
    telling = measured(choices(sizes, lambda i: True))
    assert telling.without_image == Estimate(1, 1, 1)
    assert [task_id for _, task_id in telling.examples] == ["0", "1", "2", "3", "4"]


def test_questions_without_volumes_are_left_out() -> None:
    rows = answers(by_text)
    mixed = {c: [replace(p, volumes=() if i % 4 else p.volumes) for i, p in enumerate(r)] for c, r in rows.items()}
    assert sum(measured(mixed).quadrants.values()) == 10


def test_an_answer_that_another_wording_changes_is_listed() -> None:
    def answer(i: int, label: Any, shown: Any, condition: str) -> Any:
        return other_of(label) if condition == "paraphrased" and i == 7 else by_image(i, label, shown, condition)

    use = measured(answers(answer))
    assert use.examples == [("changed by another wording", "sex_7_0")]
    assert use.paraphrased.value == pytest.approx(1 / 40)


def test_the_report_has_the_verdict_the_quadrants_and_a_row_for_each_question(tmp_path: Path) -> None:
    result = result_of(answers(by_text))
    page = Page(write_report(tmp_path, result, ()).read_text(encoding="utf-8"))
    assert page.text.index(result.verdicts["sex"]) < page.text.index("Results")
    assert "sex_0_0" in page.text
    content = json.loads((tmp_path / "metrics.json").read_text())["image_use"]["sex"]
    assert content["quadrants"]["with_and_without"] == 40
    assert content["without_image"] == {"value": 1, "low": 1, "high": 1}
    with (tmp_path / "image_use.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task_id"] for row in rows] == [p.task_id for p in result.predictions[AS_ASKED]]
    cells = {(row["blank"], row["p(blank)"], row["label shown in other_label"]) for row in rows}
    assert cells == {("male", "0.9", "female"), ("female", "0.9", "male")}
    hidden = anonymised(result, {"sub-01"}, "salt").image_use["sex"]
    assert (hidden.examples, hidden.table, hidden.quadrants) == ((), (), result.image_use["sex"].quadrants)


def test_the_verdict_says_what_the_answers_come_from() -> None:
    assert result_of(answers(by_image)).verdicts["sex"] == (
        "better than chance; not compared with the baseline; 0% of the right answers do not need the image (0% to 0%);"
        " without the subject's own volumes it is not better than chance; confounds were not tested."
    )
    text = result_of(answers(by_text, "age")).verdicts["age"]
    assert text.startswith("better than always saying the mean; ")
    assert "100% of the right answers do not need the image" in text
    assert "it is better than always saying the mean also with other subjects' volumes and with blank volumes" in text


def test_the_verdict_names_a_constant_answer_and_a_target_at_chance_has_no_cases() -> None:
    for target, said in (("sex", "male"), ("age", "44")):
        result = result_of(answers(lambda *_, said=said: said if said == "male" else float(said), target))
        (group,) = result.groups[AS_ASKED]
        assert is_better_than_chance(group) is False
        assert f"as the model always answers {said}; not compared" in result.verdicts[target]
        assert result.verdicts[target].startswith("not better than ")
        assert with_cases(result.groups[AS_ASKED], result.predictions[AS_ASKED]) == []
    good = result_of(answers(by_image))
    assert with_cases(good.groups[AS_ASKED], good.predictions[AS_ASKED]) == good.predictions[AS_ASKED]
    texts = [make_prediction(s, None, target="finding", text="a b", truth="a") for s in "abc"]
    (group,) = tabulate(texts, SETTINGS)
    assert is_better_than_chance(group) is None
    assert with_cases([group], texts) == texts


@pytest.mark.parametrize("target", ["sex", "age"])
def test_the_result_of_a_target_with_labels_is_not_replaced_by_that_of_a_text(target: str, tmp_path: Path) -> None:
    of_target = answers(by_image, target)
    text = make_prediction("sub-40", None, target=target, text="a b", truth="a")
    result = result_of({condition: [*rows, text] for condition, rows in of_target.items()})
    assert result.verdicts == result_of(of_target).verdicts
    console = Console(record=True, width=300)
    print_evaluation(result, write_report(tmp_path, result, ()), console)
    assert (tmp_path / f"1_{target}_controls.png").is_file()
    assert f"{'balanced accuracy' if target == 'sex' else 'MAE'}, " in console.export_text()


def test_the_verdict_names_confounds_and_the_compared_run() -> None:
    def words(partial: float, matched: float, difference: float, p: float, pairs: int = 9, subjects: int = 40) -> str:
        of_pairs = {"age": (20, Estimate(0.9, 0.8, 1)), "volume": (2 * pairs, Estimate(0.9, matched, 1))}
        association = Estimate(partial + 0.2, partial, 1)
        confounds = SimpleNamespace(
            names=[*of_pairs], partial=association, matched=of_pairs, subjects=subjects, coefficients=4
        )
        metric, gain = "likelihood/subjects/balanced_accuracy", Estimate(difference, -1, 1)
        compared = SimpleNamespace(target="sex", metric=metric, other="baseline-sex", difference=gain, p_adjusted=p)
        return result_of(answers(by_image), confounds={"sex": confounds}, comparisons=[compared]).verdicts["sex"]

    assert "age, volume do not explain all of it." in words(0.1, 0.6, 0.1, 0.04)
    assert "; better than baseline-sex; " in words(0.1, 0.6, 0.1, 0.04)
    assert "; worse than baseline-sex; " in words(0.1, 0.6, -0.1, 0.04)
    assert "; not different from baseline-sex; " in words(0.1, 0.6, 0.1, 0.06)
    assert "; cannot be compared with baseline-sex; " in words(0.1, 0.6, nan, nan)
    assert "subjects matched for volume it is not better than chance (" in words(0.1, 0.4, 0.1, 0.04)
    assert "; no subjects of different classes have an equal volume." in words(0.1, nan, 0.1, 0.04, pairs=0)
    assert "; too few subjects of different classes have an equal volume." in words(0.1, nan, 0.1, 0.04, pairs=1)
    assert "age, volume may explain it" in words(-0.1, 0.6, 0.1, 0.04)
    assert "; too few subjects to test whether age, volume explain it." in words(nan, 0.6, 0.1, 0.04, subjects=7)
    # With enough subjects it is undefined because the confounds determine the label or the answer.
    assert "age, volume may explain it" in words(nan, 0.6, 0.1, 0.04)

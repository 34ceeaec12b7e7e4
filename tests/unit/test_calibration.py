"""Temperature scaling, calibration before and after it, and accuracy against coverage."""

import json
from math import log
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from tests.conftest import make_prediction
from umbrella.config import Settings
from umbrella.evaluation.calibration import (
    LIMIT,
    apply_temperatures,
    calibrate,
    fit_temperatures,
    read_temperatures,
)
from umbrella.evaluation.group_metrics import tabulate
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.report import AS_ASKED, EvaluationResult, write_report
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.training.checkpoint_files import CheckpointWriter, TrainingState

FEW = EvaluateSettings(bootstrap=100)
LABELS = ("female", "male")


def simulated(temperature: float, n: int = 4000, seed: int = 0) -> list[Prediction]:
    """Labels drawn from softmax(z), and the probabilities softmax(z * temperature)."""
    random = np.random.default_rng(seed)
    made = []
    for i, z in enumerate(random.normal(0, 1.5, n)):
        label = LABELS[int(random.random() < 1 / (1 + np.exp(-z)))]
        male = 1 / (1 + np.exp(-z * temperature))
        made.append(make_prediction(f"s{i}", label, probabilities={"female": 1 - male, "male": male}))
    return made


def nll(predictions: list[Prediction]) -> float:
    return log_loss([p.label for p in predictions], [[*p.probabilities.values()] for p in predictions], labels=LABELS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_is_the_planted_one_and_has_the_least_loss(temperature: float) -> None:
    predictions = simulated(temperature)
    fitted = fit_temperatures(predictions)
    assert fitted["sex"] == pytest.approx(temperature, rel=0.1)
    best = nll(apply_temperatures(predictions, fitted))
    for factor in (0.97, 1.03):
        assert best < nll(apply_temperatures(predictions, {"sex": factor * fitted["sex"]}))


def test_overconfident_predictions_get_a_temperature_above_one_and_a_lower_error() -> None:
    temperatures = fit_temperatures(simulated(4.0))
    assert temperatures["sex"] > 2
    held_out = simulated(4.0, 2000, seed=1)
    (found,) = calibrate(held_out, temperatures, FEW).values()
    for metric in ("calibration_error", "brier"):
        assert found.after[metric].high < found.before[metric].low
    assert found.before["brier"].value == pytest.approx(
        brier_score_loss([p.label == "male" for p in held_out], [p.probabilities["male"] for p in held_out])
    )


def test_the_calibration_error_is_the_distance_of_confidence_and_accuracy() -> None:
    rows = [make_prediction(f"s{i}", LABELS[i < 6], probabilities={"female": 0.05, "male": 0.95}) for i in range(10)]
    (found,) = calibrate(rows, {}, FEW).values()
    assert found.before["calibration_error"].value == pytest.approx(0.95 - 0.6)
    assert (found.temperature, found.after) == (None, {})


def test_without_an_optimum_the_temperature_is_one_and_it_stays_within_its_limits() -> None:
    right = [
        make_prediction(f"s{i}", LABELS[i % 2], probabilities={LABELS[i % 2]: 0.6, "other": 0.4}) for i in range(8)
    ]
    assert fit_temperatures(right) == {"sex": 1.0}
    wrong = [make_prediction(f"s{i}", "male", probabilities={"female": 0.99, "male": 0.01}) for i in range(8)]
    assert fit_temperatures(wrong)["sex"] == pytest.approx(LIMIT, rel=0.01)
    assert fit_temperatures([make_prediction("a", 41.0, target="age")]) == {}


def test_candidates_may_differ_in_number_and_a_probability_may_be_zero() -> None:
    sure = make_prediction("a", "A", probabilities={"A": 0.8, "B": 0.2})
    unsure = make_prediction("b", "C", probabilities={"A": 0.7, "B": 0.0, "C": 0.3})
    temperatures = fit_temperatures([sure, unsure, sure])
    first, second = apply_temperatures([sure, unsure], temperatures)
    t = temperatures["sex"]
    expected = 0.7 ** (1 / t) / (0.7 ** (1 / t) + 0.3 ** (1 / t))
    assert second.probabilities["A"] == pytest.approx(expected, rel=1e-6)
    assert log(first.probabilities["A"] / first.probabilities["B"]) == pytest.approx(log(4) / t)
    (other,) = apply_temperatures([sure], {"age": 3.0})
    assert other == sure


def test_accuracy_against_coverage_answers_the_most_certain_subjects_first() -> None:
    shares, right = [0.9, 0.8, 0.8, 0.7, 0.6], [True, True, False, True, False]
    rows = [
        make_prediction(f"s{i}", LABELS[i_right], probabilities={"female": 1 - share, "male": share})
        for i, (share, i_right) in enumerate(zip(shares, right, strict=True))
    ]
    (found,) = calibrate(rows[::-1], {}, FEW).values()
    assert found.coverage == pytest.approx((0.2, 0.6, 0.8, 1.0))
    assert found.accuracy == pytest.approx((1, 2 / 3, 3 / 4, 3 / 5))
    assert found.area.value == pytest.approx(0.2 * 1 + 0.4 * 2 / 3 + 0.2 * 3 / 4 + 0.2 * 3 / 5)
    assert found.area.low < found.area.value < found.area.high


def test_checkpoints_hold_the_temperatures(tmp_path: Path) -> None:
    assert read_temperatures(tmp_path) == {}
    writer = CheckpointWriter(tmp_path, {}, lambda folder, weights: None, Settings(), {})
    writer.write(TrainingState(3), {}, {}, {}, {"sex": 1.5})
    writer.wait()
    assert read_temperatures(tmp_path / "step_0000003") == {"sex": 1.5}


def test_the_report_shows_the_calibration_before_and_after(tmp_path: Path) -> None:
    predictions = simulated(4.0, 60)
    groups = {AS_ASKED: tabulate(predictions, FEW)}
    result = EvaluationResult(Settings(), "/m/step_1", "test", {AS_ASKED: predictions}, groups, {})
    result.calibration.update(calibrate(predictions, {"sex": 4.0}, FEW))  # type: ignore[attr-defined]
    text = write_report(tmp_path, result, ()).read_text(encoding="utf-8")
    assert "The temperature, 4.00, was fitted on the validation split" in text
    assert "with the highest probabilities, to which the temperature is applied, are answered" in text
    assert "1_sex_coverage" in {file.stem for file in tmp_path.glob("*.png")}
    written = json.loads((tmp_path / "metrics.json").read_text())["calibration"]["sex"]
    before, after = (written[key]["calibration_error"]["value"] for key in ("before", "after"))
    assert after < before

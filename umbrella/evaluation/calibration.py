"""Temperature scaling, the calibration before and after it, and the accuracy when uncertain answers are left out."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import exp, log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

from umbrella.base import UserError
from umbrella.evaluation.group_metrics import Estimate, MetricFunction, estimate
from umbrella.evaluation.metrics import calibration_metrics, ratio
from umbrella.evaluation.predictions import Prediction, mean_over_subjects
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.paths import CALIBRATION

LIMIT = 20.0
"""Temperatures are between 1 / LIMIT and LIMIT."""


@dataclass(frozen=True)
class Calibration:
    """The calibration of the class probabilities of one target."""

    temperature: float | None
    """Fitted on the validation split; None: unknown."""
    before: Mapping[str, Estimate]
    """``brier`` and ``calibration_error`` over conversations, without the temperature."""
    after: Mapping[str, Estimate]
    """The same with the temperature; empty if it is unknown."""
    coverage: tuple[float, ...]
    """Share of subjects that are answered, for each threshold of the highest probability, from high to low. The
    temperature is applied if it is known."""
    accuracy: tuple[float, ...]
    """The accuracy of these answers."""
    area: Estimate
    """The mean of ``accuracy`` over all coverages: 1 - AURC (Geifman and El-Yaniv, NeurIPS 2017)."""


def fit_temperatures(predictions: Iterable[Prediction]) -> dict[str, float]:
    """Fit a temperature T for each target with classes: p^(1/T), normalised, has the least negative log likelihood.

    Source: C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. If every true label has the highest
    probability, the likelihood has no maximum, and T is 1.

    Args:
        predictions: for the validation split.
    """
    temperatures = {}
    for target, rows in _scored(predictions).items():
        probabilities, truth = _arrays(rows)
        logits = _log(probabilities)
        true = logits[np.arange(len(rows)), truth]

        def nll(log_temperature: float, logits: NDArray = logits, true: NDArray = true) -> float:
            return float((logsumexp(logits / exp(log_temperature), axis=1) - true / exp(log_temperature)).mean())

        fitted = minimize_scalar(nll, bounds=(-log(LIMIT), log(LIMIT)), method="bounded").x
        temperatures[target] = 1.0 if (true == logits.max(1)).all() else round(exp(fitted), 4)
    return temperatures


def read_temperatures(checkpoint: str | Path, required: bool = False) -> dict[str, float]:
    """Read the temperatures of a checkpoint by target; empty if it has none.

    Raises:
        UserError: ``required``, and it has none.
    """
    file = Path(checkpoint) / CALIBRATION
    temperatures = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if required and not temperatures:
        raise UserError(f"evaluate.calibrated: {checkpoint} has no temperatures; leave it out, or train again")
    return temperatures


def apply_temperatures(predictions: Iterable[Prediction], temperatures: Mapping[str, float]) -> list[Prediction]:
    """Return the predictions with scaled probabilities; those of targets without a temperature stay as they are."""
    scaled = []
    for p in predictions:
        if p.probabilities and p.target in temperatures:
            shares = softmax(_log(np.array([*p.probabilities.values()])) / temperatures[p.target]).tolist()
            p = replace(p, probabilities=dict(zip(p.probabilities, shares, strict=True)))
        scaled.append(p)
    return scaled


def calibrate(
    predictions: Iterable[Prediction], temperatures: Mapping[str, float], settings: EvaluateSettings, seed: int = 0
) -> dict[str, Calibration]:
    """Measure the calibration of each target with classes.

    Args:
        predictions: without temperature scaling.
        seed: of the bootstrap.
    """
    found = {}
    for target, rows in _scored(predictions).items():
        scaled = apply_temperatures(rows, temperatures)
        before, after = (
            _bootstrap(of_one, partial(calibration_metrics, truth, probabilities), settings, seed)
            for of_one in (rows, scaled)
            for probabilities, truth in [_arrays(of_one)]
        )
        subjects = mean_over_subjects(scaled)
        subjects.sort(key=lambda p: -max(p.probabilities.values()))
        confidence = np.array([max(p.probabilities.values()) for p in subjects])
        correct = np.array([p.predicted == p.label for p in subjects], float)
        ends = np.append(np.flatnonzero(np.diff(confidence)), len(subjects) - 1)  # equal ones are answered together
        coverage, accuracy = (v[0] for v in _coverage_curve(correct, ends, np.ones((1, len(subjects)))))
        area = _bootstrap(subjects, partial(_area, correct, ends), settings, seed)["area"]
        known = temperatures.get(target)
        found[target] = Calibration(
            known, before, after if known else {}, tuple(coverage.tolist()), tuple(accuracy.tolist()), area
        )
    return found


def _scored(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Target to the predictions with a label that has a probability."""
    by_target: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        if p.label in p.probabilities:
            by_target[p.target].append(p)
    return dict(sorted(by_target.items()))


def _arrays(predictions: Sequence[Prediction]) -> tuple[NDArray, NDArray]:
    """(probabilities (n, labels), 0 beyond the labels of a prediction; indices (n,) of the true labels)."""
    size = max(len(p.probabilities) for p in predictions)
    rows = [[*p.probabilities.values()] + [0.0] * (size - len(p.probabilities)) for p in predictions]
    return np.array(rows), np.array([[*p.probabilities].index(str(p.label)) for p in predictions])


def _log(probabilities: NDArray) -> NDArray:
    return np.log(np.maximum(probabilities, np.finfo(float).tiny))


def _bootstrap(
    predictions: Sequence[Prediction], metrics: MetricFunction, settings: EvaluateSettings, seed: int
) -> dict[str, Estimate]:
    index = {subject: i for i, subject in enumerate(dict.fromkeys(p.subject_id for p in predictions))}
    columns = [index[p.subject_id] for p in predictions]
    return estimate(lambda weights: metrics(weights[:, columns]), len(index), settings, seed)


def _coverage_curve(correct: NDArray, ends: NDArray, weights: NDArray) -> tuple[NDArray, NDArray]:
    """Coverage and accuracy, (resamples, thresholds) each. ``correct`` (n,) and weights: the most certain first."""
    answered, right = np.cumsum(weights, 1)[:, ends], np.cumsum(weights * correct, 1)[:, ends]
    return ratio(answered, np.broadcast_to(weights.sum(1)[:, None], answered.shape)), ratio(right, answered)


def _area(correct: NDArray, ends: NDArray, weights: NDArray) -> dict[str, NDArray]:
    coverage, accuracy = _coverage_curve(correct, ends, weights)
    return {"area": (np.diff(coverage, prepend=0) * np.nan_to_num(accuracy)).sum(1)}

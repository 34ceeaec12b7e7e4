"""Intervals from resampling subjects: against known distributions."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from umbrella.evaluation.bootstrap import Estimate, MetricFunction, estimate
from umbrella.evaluation.settings import EvaluateSettings

SETTINGS = EvaluateSettings()


def mean_of(values: NDArray) -> MetricFunction:
    return lambda weights: {"mean": weights @ values / weights.sum(1)}


def right(count: int, of: int) -> MetricFunction:
    return mean_of(np.arange(of) < count)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("count", "of"), [(76, 100), (30, 40), (10, 200)])
def test_the_interval_of_a_share_has_the_quantiles_of_the_binomial_distribution(
    count: int, of: int, confidence: float
) -> None:
    settings = EvaluateSettings(bootstrap=20_000, confidence=confidence)
    found = estimate(right(count, of), of, settings)["mean"]
    tail = (1 - confidence) / 2
    assert found.value == count / of
    assert found.low == pytest.approx(binom.ppf(tail, of, count / of) / of, abs=1.01 / of)
    assert found.high == pytest.approx(binom.ppf(1 - tail, of, count / of) / of, abs=1.01 / of)


def test_95_of_100_intervals_hold_the_true_mean() -> None:
    random = np.random.default_rng(0)
    settings = EvaluateSettings(bootstrap=200)
    held = []
    for _ in range(400):
        found = estimate(mean_of(random.normal(3, 2, 60)), 60, settings, seed=1)["mean"]
        held.append(found.low <= 3 <= found.high)
    # Binomial error of 400 draws: 0.011; percentiles of 60 values are a little narrow.
    assert 0.91 <= np.mean(held) <= 0.98


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    first, again, other = (estimate(right(30, 40), 40, SETTINGS, seed)["mean"] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_wider_coverage_has_a_wider_interval() -> None:
    narrow, wide = (estimate(right(30, 40), 40, EvaluateSettings(confidence=c))["mean"] for c in (0.68, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_resamples_without_a_class_do_not_count() -> None:
    # The recall of a class that one of three subjects has is not defined in about 30% of the draws.
    def recall(weights: NDArray) -> dict[str, NDArray]:
        return {"recall": np.where(weights[:, 0] > 0, 1.0, np.nan), "never": np.full(len(weights), np.nan)}

    found = estimate(recall, 3, SETTINGS)
    assert found["recall"] == Estimate(1.0, 1.0, 1.0)
    assert np.isnan(found["never"]).all()


@pytest.mark.parametrize("subjects", [0, 1])
def test_fewer_than_two_subjects_have_no_interval(subjects: int) -> None:
    found = estimate(lambda weights: {"one": np.ones(len(weights))}, subjects, SETTINGS)["one"]
    assert found.value == 1
    assert np.isnan([found.low, found.high]).all()


def test_as_many_subjects_are_drawn_as_there_are_as_often_as_asked() -> None:
    totals: list[float] = []

    def measure(weights: NDArray) -> dict[str, NDArray]:
        totals.extend(weights.sum(1))
        return {}

    estimate(measure, 7, EvaluateSettings(bootstrap=250))
    assert totals == [7] * 251

"""Bootstrap intervals over subjects."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from umbrella.evaluation.group_metrics import Estimate, MetricFunction, estimate
from umbrella.evaluation.settings import EvaluateSettings


def mean_of(values: NDArray) -> MetricFunction:
    return lambda weights: {"mean": weights @ values / weights.sum(1)}


def share(count: int, of: int, seed: int = 0, **settings: float) -> Estimate:
    return estimate(mean_of(np.arange(of) < count), of, EvaluateSettings(**settings), seed)["mean"]


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("count", "of"), [(76, 100), (10, 200)])
def test_the_interval_of_a_share_has_the_quantiles_of_the_binomial_distribution(
    count: int, of: int, confidence: float
) -> None:
    found = share(count, of, bootstrap=20_000, confidence=confidence)
    tail = (1 - confidence) / 2
    assert found.value == count / of
    assert found.low == pytest.approx(binom.ppf(tail, of, count / of) / of, abs=1.01 / of)
    assert found.high == pytest.approx(binom.ppf(1 - tail, of, count / of) / of, abs=1.01 / of)


def test_95_of_100_intervals_contain_the_true_mean() -> None:
    random = np.random.default_rng(0)
    settings = EvaluateSettings(bootstrap=200)
    found = [estimate(mean_of(random.normal(3, 2, 60)), 60, settings, seed=1)["mean"] for _ in range(400)]
    # Binomial error of 400 draws: 0.011; percentiles of 60 values are a little narrow.
    assert 0.91 <= np.mean([one.low <= 3 <= one.high for one in found]) <= 0.98


def test_the_seed_determines_the_resamples() -> None:
    assert share(30, 40, seed=0) == share(30, 40, seed=0) != share(30, 40, seed=1)


def test_resamples_in_which_a_metric_is_undefined_are_left_out() -> None:
    def recall(weights: NDArray) -> dict[str, NDArray]:
        return {"recall": np.where(weights[:, 0] > 0, 1.0, np.nan), "never": np.full(len(weights), np.nan)}

    found = estimate(recall, 3, EvaluateSettings())
    assert found["recall"] == Estimate(1.0, 1.0, 1.0)
    assert np.isnan(found["never"]).all()


@pytest.mark.parametrize("subjects", [0, 1])
def test_fewer_than_two_subjects_have_no_interval(subjects: int) -> None:
    found = estimate(lambda weights: {"one": np.ones(len(weights))}, subjects, EvaluateSettings())["one"]
    assert found.value == 1
    assert np.isnan([found.low, found.high]).all()


def test_each_resample_has_as_many_subjects_as_the_data() -> None:
    totals: list[float] = []

    def measure(weights: NDArray) -> dict[str, NDArray]:
        totals.extend(weights.sum(1))
        return {}

    estimate(measure, 7, EvaluateSettings(bootstrap=250))
    assert totals == [7] * 251

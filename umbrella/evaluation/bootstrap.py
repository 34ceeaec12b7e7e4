"""Percentile bootstrap over subjects. Subjects are independent; conversations of one subject are not."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.settings import EvaluateSettings

CHUNK = 100
"""Resamples whose weights are in memory together."""

MetricFunction = Callable[[NDArray], Mapping[str, NDArray]]
"""Weights (resamples, subjects), how often each subject counts, to metrics (resamples,) by name."""


class Estimate(NamedTuple):
    """A metric with its bootstrap interval; NaN where undefined."""

    value: float
    low: float
    high: float


def estimate(metrics: MetricFunction, subjects: int, settings: EvaluateSettings, seed: int = 0) -> dict[str, Estimate]:
    """Compute metrics with percentile bootstrap intervals (Efron 1979).

    Subjects are drawn with replacement, with all of their conversations, ``settings.bootstrap`` times. The interval
    holds the middle ``settings.confidence`` of the resampled values. Resamples in which a metric is undefined, such as
    one without a class, are left out for it. All metrics share the same resamples, which depend on the seed and the
    number of subjects only. With fewer than two subjects the interval is undefined.
    """
    values = {name: float(value[0]) for name, value in metrics(np.ones((1, subjects))).items()}
    if subjects < 2:
        return {name: Estimate(value, np.nan, np.nan) for name, value in values.items()}
    random = np.random.default_rng(seed)
    resampled: dict[str, list[NDArray]] = {name: [] for name in values}
    for start in range(0, settings.bootstrap, CHUNK):
        for name, value in metrics(_draw(random, min(CHUNK, settings.bootstrap - start), subjects)).items():
            resampled[name].append(value)
    return {name: Estimate(value, *_interval(resampled[name], settings)) for name, value in values.items()}


def _interval(resampled: list[NDArray], settings: EvaluateSettings) -> list[float]:
    tail = (1 - settings.confidence) / 2
    defined = np.concatenate(resampled)
    defined = defined[~np.isnan(defined)]
    return np.quantile(defined, [tail, 1 - tail]).tolist() if len(defined) else [np.nan, np.nan]


def _draw(random: np.random.Generator, resamples: int, subjects: int) -> NDArray:
    drawn = random.integers(0, subjects, (resamples, subjects)) + subjects * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * subjects).reshape(resamples, subjects).astype(float)

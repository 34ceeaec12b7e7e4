"""Percentile intervals from resampling subjects: conversations of one subject are not independent, subjects are."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.settings import EvaluateSettings

AT_ONCE = 100
"""Resamples whose weights are in memory together."""

Measure = Callable[[NDArray], Mapping[str, NDArray]]
"""Weights (resamples, subjects), how often each subject counts, to numbers (resamples,) by name."""


class Estimate(NamedTuple):
    """A number with the interval that resampling the subjects gives. NaN where it is not defined."""

    value: float
    low: float
    high: float


def estimate(measure: Measure, subjects: int, settings: EvaluateSettings, seed: int = 0) -> dict[str, Estimate]:
    """Numbers with their percentile bootstrap intervals (Efron 1979).

    As many subjects are drawn with replacement as there are, with all of their conversations, ``settings.bootstrap``
    times; the interval holds the middle ``settings.confidence`` of the numbers that come out. Resamples in which a
    number is not defined, such as one without a class, do not count for it. All numbers are measured on the same
    draws, and the same seed and number of subjects give the same draws. With fewer than two subjects there is no
    interval.
    """
    values = {name: float(value[0]) for name, value in measure(np.ones((1, subjects))).items()}
    if subjects < 2:
        return {name: Estimate(value, np.nan, np.nan) for name, value in values.items()}
    random = np.random.default_rng(seed)
    resampled: dict[str, list[NDArray]] = {name: [] for name in values}
    for start in range(0, settings.bootstrap, AT_ONCE):
        for name, value in measure(_draw(random, min(AT_ONCE, settings.bootstrap - start), subjects)).items():
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

"""Metrics of numbers, for many weightings of the same answers at once."""

import numpy as np
from numpy.typing import NDArray


def number_metrics(truth: NDArray, said: NDArray, weights: NDArray) -> dict[str, NDArray]:
    """``mae``, ``rmse``, ``r2`` and ``pearson``; NaN where they are not defined (nothing drawn, all drawn the same).

    Args:
        truth, said: (n,), not empty.
        weights: (resamples, n), how often each answer counts.

    Returns:
        (resamples,) each.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        total = weights.sum(1)
        error = said - truth
        squared = weights @ error**2
        y, spread_y = _spread(truth, weights)
        p, spread_p = _spread(said, weights)
        together = weights @ (y * p) - (weights @ y) * (weights @ p) / total
        return {
            "mae": weights @ np.abs(error) / total,
            "rmse": np.sqrt(squared / total),
            "r2": 1 - squared / spread_y,
            "pearson": np.clip(together / np.sqrt(spread_y * spread_p), -1, 1),
        }


def _spread(values: NDArray, weights: NDArray) -> tuple[NDArray, NDArray]:
    """(values less their mean, for each resample their summed squares about its own mean). NaN where all are the same.

    All the same is what differs by no more than rounding does.
    """
    centred = values - values.mean()
    total, squares = weights.sum(1), weights @ centred**2
    about_mean = squares - (weights @ centred) ** 2 / total
    rounding = np.maximum(1e-12 * squares, total * (1e-12 * np.abs(values).max()) ** 2)
    return centred, np.where(about_mean > rounding, about_mean, np.nan)

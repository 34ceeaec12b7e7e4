"""Which of the swept settings moved the metric."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbrella.tuning.ranking import SEED, swept_names
from umbrella.tuning.results import Trial

LEAST = 8
"""Trials below which nothing is said."""
ROUNDS, TREES, SHUFFLES = 10, 50, 5


@dataclass(frozen=True)
class Importance:
    """What a forest that predicts the metric from the settings makes of each. ``why_not``: why there is no answer."""

    shares: dict[str, float]
    """Setting to its share of all importance, largest first."""
    chance: float = 0.0
    """The share that a setting without any effect may reach: 95% of the best shuffled copies stay below."""
    explained: float = 0.0
    """R² of the forest on trials that it has not seen. At most 1."""
    trials: int = 0
    why_not: str = ""

    @property
    def sure(self) -> list[str]:
        """Settings that matter more than chance would have it."""
        return [name for name, share in self.shares.items() if share > self.chance and not self.why_not]


def importance(trials: Sequence[Trial]) -> Importance:
    """How much each swept setting matters for the metric, over trials that have one and did not fail.

    Permutation importance (Breiman, 2001) in a random forest, beside a shuffled copy of each setting that tells what
    chance gives (as in Boruta: Kursa and Rudnicki, 2010). A setting that a point lacks takes the median of the others
    there, so that only its value can matter and not its presence, which another setting decides.
    """
    used = [t for t in trials if t.metric is not None and not t.failed]
    values = {name: _column(name, used) for name in swept_names(used) if name != SEED}
    values = {name: column for name, column in values.items() if len(set(column)) > 1}
    target = np.array([t.metric for t in used], float)
    if len(used) < LEAST:
        return Importance({}, trials=len(used), why_not=f"It takes {LEAST} measured trials; here: {len(used)}.")
    if not values:
        return Importance({}, trials=len(used), why_not="No setting other than the seed has two values.")
    if np.ptp(target) == 0:
        return Importance({}, trials=len(used), why_not="All trials have the same metric.")
    own, chance, explained = _forests(np.stack(list(values.values()), axis=1), target)
    total = own.sum()
    if explained <= 0 or total <= 0:
        words = f"What the settings did here does not tell how another trial would end (R² = {explained:.2f})."
        return Importance({}, explained=explained, trials=len(used), why_not=words)
    shares = dict(sorted(zip(values, (own / total).tolist(), strict=True), key=lambda pair: -pair[1]))
    return Importance(shares, float(chance / total), explained, len(used))


def _forests(settings: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Mean importance per column, 95% quantile over rounds of the best shuffled column, mean out-of-bag R²."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    draws, columns = np.random.default_rng(0), settings.shape[1]
    own, best_shuffled, explained = [], [], []
    for seed in range(ROUNDS):
        table = np.hstack([settings, draws.permuted(settings, axis=0)])
        forest = RandomForestRegressor(TREES, oob_score=True, random_state=seed).fit(table, target)
        found = permutation_importance(forest, table, target, n_repeats=SHUFFLES, random_state=seed).importances_mean
        own.append(np.maximum(found[:columns], 0))
        best_shuffled.append(found[columns:].max())
        explained.append(forest.oob_score_)
    return np.mean(own, axis=0), max(0.0, float(np.quantile(best_shuffled, 0.95))), float(np.mean(explained))


def _column(name: str, trials: Sequence[Trial]) -> np.ndarray:
    """A setting as numbers: itself, or its place among its values; the median where a trial lacks it."""
    present = [t.point[name] for t in trials if name in t.point]
    if is_number(present):
        codes = {t.trial_id: float(t.point[name]) for t in trials if name in t.point}
    else:
        places = {text: place for place, text in enumerate(sorted({json.dumps(v, default=str) for v in present}))}
        codes = {t.trial_id: places[json.dumps(t.point[name], default=str)] for t in trials if name in t.point}
    middle = np.quantile(list(codes.values()), 0.5, method="lower")
    return np.array([codes.get(t.trial_id, middle) for t in trials], float)


def is_number(values: Sequence[Any]) -> bool:
    """Whether all values are numbers, and none says yes or no."""
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)

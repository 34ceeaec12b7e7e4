"""Which trials a sweep runs: points that are known before, or one proposal of Optuna's after the other."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from umbrella.config import Settings
from umbrella.tuning.entry import combine
from umbrella.tuning.optuna_search import make_optuna_search
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.space import as_written, checked, distinct, read_space, with_seeds

EVALUATIONS = "evaluation"
"""The key of a report that counts evaluations."""


@dataclass(frozen=True)
class Search:
    """What Ray Tune is told of the trials: ``tune.Tuner(param_space=)``, and the rest for ``tune.TuneConfig``."""

    param_space: dict[str, Any]
    num_samples: int
    search_alg: Searcher | None
    trials: int
    """How many there will be; of a space that Optuna exhausts or ``tune.hours`` cuts short, at most."""


def make_search(settings: Settings, given: frozenset[str] = frozenset()) -> Search:
    """The search that ``settings.tune`` asks for. Every trial's ``config`` is a point: dotted names to values.

    Raises:
        UserError: as ``read_space`` and ``points``.
    """
    total = count_trials(settings, given)
    if settings.tune.search == "optuna":
        return Search({}, total, make_optuna_search(settings, read_space(settings, given)), total)
    # A grid over whole configurations: Ray Tune saves and restores it.
    return Search(tune.grid_search(points(settings, given)), 1, None, total)


def make_scheduler(settings: TuneSettings) -> TrialScheduler:
    """The scheduler that the settings ask for; metric and mode are ``tune.TuneConfig``'s."""
    if settings.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=EVALUATIONS,
        max_t=10**6,  # beyond any number of evaluations: a trial that is not stopped early ends by itself
        grace_period=settings.grace,
        reduction_factor=settings.reduction,
    )


def points(settings: Settings, given: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """Every trial's point, of a search that does not learn: dotted names to values, only those that are swept there.

    They are ``tune.samples`` times all combinations of the grids, each with values of its own for what is drawn. What
    is the same is run once, and each with every seed. The same settings give the same points in the same order.

    Raises:
        UserError: as ``read_space``; a point that the settings refuse.
    """
    entries = read_space(settings, given)
    rng = np.random.default_rng(settings.seed)
    sampled = (
        point
        for _ in range(settings.tune.samples)
        for point in combine(entries, lambda entry: entry.values if entry.kind == "grid" else [entry.draw(rng)])
    )
    found = distinct(as_written(point, settings) for point in sampled)
    for point in found:
        checked(settings, point)
    return [seeded for point in found for seeded in with_seeds(point, settings)]


def count_trials(settings: Settings, given: frozenset[str] = frozenset()) -> int:
    """How many trials the sweep has; see ``Search.trials``."""
    if settings.tune.search != "optuna":
        return len(points(settings, given))
    entries, count = read_space(settings, given), settings.tune.samples
    if all(entry.listed for entry in entries):
        count = sum(1 for _ in islice(combine(entries, lambda entry: entry.values), count))
    return count * settings.tune.seeds

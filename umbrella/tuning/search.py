"""Which trials a sweep runs: points that are known before, or one proposal of Optuna's after the other."""

import math
import pickle
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.tuning.parameter import Parameter, combinations
from umbrella.tuning.search_space import in_space_order, read_space, settings_at, unique_points, with_seeds
from umbrella.tuning.settings import TuneSettings

TIME_ATTRIBUTE = "evaluation"
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
        UserError: as ``read_space`` and ``list_points``.
    """
    total = count_trials(settings, given)
    if settings.tune.search == "optuna":
        return Search({}, total, make_optuna_search(settings, read_space(settings, given)), total)
    # A grid over whole configurations: Ray Tune saves and restores it.
    return Search(tune.grid_search(list_points(settings, given)), 1, None, total)


def make_scheduler(settings: TuneSettings) -> TrialScheduler:
    """The scheduler that the settings ask for; metric and mode are ``tune.TuneConfig``'s."""
    if settings.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=TIME_ATTRIBUTE,
        max_t=10**6,  # beyond any number of evaluations: a trial that is not stopped early ends by itself
        grace_period=settings.grace,
        reduction_factor=settings.reduction,
    )


def list_points(settings: Settings, given: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """Every trial's point, of a search that does not learn: dotted names to values, only those that are swept there.

    They are ``tune.samples`` times all combinations of the grids, each with values of its own for what is drawn. What
    is the same is run once, and each with every seed. The same settings give the same points in the same order.

    Raises:
        UserError: as ``read_space``; a point that the settings refuse.
    """
    parameters = read_space(settings, given)
    rng = np.random.default_rng(settings.seed)
    sampled = (
        point
        for _ in range(settings.tune.samples)
        for point in combinations(
            parameters, lambda parameter: parameter.values if parameter.kind == "grid" else [parameter.sample(rng)]
        )
    )
    found = unique_points(in_space_order(point, settings) for point in sampled)
    for point in found:
        settings_at(settings, point)
    return [seeded for point in found for seeded in with_seeds(point, settings)]


def count_trials(settings: Settings, given: frozenset[str] = frozenset()) -> int:
    """How many trials the sweep has; see ``Search.trials``."""
    if settings.tune.search != "optuna":
        return len(list_points(settings, given))
    parameters, count = read_space(settings, given), settings.tune.samples
    if all(parameter.categorical for parameter in parameters):
        count = sum(1 for _ in islice(combinations(parameters, lambda parameter: parameter.values), count))
    return count * settings.tune.seeds


if TYPE_CHECKING:
    import optuna

MAX_ATTEMPTS = 100
"""Proposals in a row that are no new point; then the search counts as done."""
POINT = "point"
"""The key of the point in a suggestion of ``OptunaSearch``, which holds Optuna's own parameters, too."""


def make_optuna_search(settings: Settings, parameters: Sequence[Parameter], storage: Any = None) -> "SeedRepeater":
    """Optuna's TPE (Bergstra et al., NeurIPS 2011), multivariate, a group of names for each case of the conditions.

    Args:
        storage: the study's, one of ``optuna.storages``; in memory if there is none.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions call these three experimental
        sampler = optuna.samplers.TPESampler(seed=settings.seed, multivariate=True, group=True, constant_liar=True)
    metric, space = f"best/{settings.tune.metric}", partial(_define, parameters)
    return SeedRepeater(OptunaSearch(space, metric, settings.tune.mode, sampler=sampler, storage=storage), settings)


@dataclass(eq=False)
class Proposal:
    """A point that the searcher has proposed under a name, and the results of its runs, one per seed."""

    name: str
    pending: list[dict[str, Any]]
    """The runs that have not started."""
    results: list[float] = field(default_factory=list)
    """Of the runs that did not fail."""


class SeedRepeater(Searcher):
    """Runs each point of another searcher with every seed, if the point is new and the settings accept it.

    The searcher gets the mean over the runs that did not fail. A point of which all runs failed counts as pruned:
    worse than any other. ``ray.tune.search.Repeater`` reports NaN for such a point, which Optuna refuses.
    """

    def __init__(self, searcher: Searcher, settings: Settings) -> None:
        super().__init__(metric=searcher.metric, mode=searcher.mode)
        # Not named ``searcher``: of what has such an attribute, Ray Tune saves that in a file of its own.
        self.proposer, self.settings = searcher, settings
        self.asked = 0
        self.seen: list[dict[str, Any]] = []
        self.latest: Proposal | None = None
        self.running: dict[str, Proposal] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next run: one more seed of the latest point, or the first seed of a new one."""
        if self.latest is None or not self.latest.pending:
            self.latest = self._propose()
        if self.latest is None:
            return Searcher.FINISHED
        self.running[trial_id] = self.latest
        return self.latest.pending.pop(0)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """A run ended, was stopped or failed. With the last run of a point, the searcher gets its result."""
        proposal = self.running.pop(trial_id, None)
        if proposal is None:  # after a restart, Ray Tune may complete a trial once more
            return
        value = math.nan if error else (result or {}).get(self.metric, math.nan)
        if math.isfinite(value):
            proposal.results.append(value)
        if not proposal.pending and proposal not in self.running.values():
            mean = {self.metric: fmean(proposal.results)} if proposal.results else None
            self.proposer.on_trial_complete(proposal.name, mean)

    def save(self, checkpoint_path: str) -> None:
        """Write the state, with that of the searcher: in one file, so that a kill cannot leave two that differ."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """Read what ``save`` wrote."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))

    def _propose(self) -> Proposal | None:
        """A new point that the settings accept; None when there seems to be none left."""
        for _ in range(MAX_ATTEMPTS):
            self.asked += 1
            name = str(self.asked)
            point = in_space_order(self.proposer.suggest(name)[POINT], self.settings)
            with suppress(UserError):
                if point not in self.seen:
                    settings_at(self.settings, point)
                    self.seen.append(point)
                    return Proposal(name, with_seeds(point, self.settings))
            self.proposer.on_trial_complete(name, error=True)
        return None


def _define(parameters: Sequence[Parameter], trial: "optuna.Trial") -> dict[str, dict[str, Any]]:
    """The define-by-run space. ``OptunaSearch`` splits names at slashes; under one key they stay whole."""
    return {POINT: next(combinations(parameters, lambda parameter: [_suggest(trial, parameter)]))}


def _suggest(trial: "optuna.Trial", parameter: Parameter) -> Any:
    if parameter.categorical:
        return parameter.values[trial.suggest_categorical(parameter.name, range(len(parameter.values)))]
    low, high = parameter.values[:2]
    logarithmic = parameter.kind == "loguniform"
    if parameter.kind == "quniform":
        value = low + trial.suggest_int(parameter.name, 0, parameter.steps) * parameter.values[2]
    elif parameter.integer:
        value = trial.suggest_int(parameter.name, int(low), int(high), log=logarithmic)
    else:
        value = trial.suggest_float(parameter.name, low, high, log=logarithmic)
    return parameter.rounded(value)

"""The search algorithm and the scheduler of a sweep: grid and random search or Optuna; ASHA or none."""

import math
import pickle
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.tuning.search_space import Parameter, combinations, read_space, settings_at, unique_points
from umbrella.tuning.settings import TuneSettings

if TYPE_CHECKING:
    import optuna

MAX_ATTEMPTS = 100
"""Number of consecutive proposals that are not new and valid, after which Optuna's search is considered exhausted."""
POINT = "point"
"""The key of the point in a suggestion of ``OptunaSearch``. The suggestion also holds Optuna's own parameters."""


def make_scheduler(settings: TuneSettings) -> TrialScheduler:
    """Make the scheduler of the settings. ``tune.TuneConfig`` gets metric and mode."""
    if settings.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="evaluation",  # the key of a trial's report that counts its evaluations
        max_t=10**6,  # more than any number of evaluations: the end of a trial is not ASHA's decision
        grace_period=settings.grace,
        reduction_factor=settings.reduction,
    )


def list_points(settings: Settings, fixed: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """List the points of a grid and random search; the same settings give the same list.

    All combinations of the grids are repeated ``tune.samples`` times, each with newly sampled values of the other
    parameters. Duplicates are removed; then each point is repeated for every seed.

    Returns:
        The points: dotted names to values. A point names only the parameters that are active in it.

    Raises:
        UserError: as ``read_space``; the values of a point are not valid together.
    """
    parameters = read_space(settings, fixed)
    rng = np.random.default_rng(settings.seed)
    sampled = (
        point
        for _ in range(settings.tune.samples)
        for point in combinations(parameters, lambda p: p.values if p.kind == "grid" else [p.sample(rng)])
    )
    found = unique_points(_in_space_order(point, settings) for point in sampled)
    for point in found:
        settings_at(settings, point)
    return [seeded for point in found for seeded in _with_seeds(point, settings)]


def count_trials(settings: Settings, fixed: frozenset[str] = frozenset()) -> int:
    """Number of trials of the sweep. Optuna, or the limit ``tune.hours``, may end it with fewer.

    Raises:
        UserError: as ``list_points``.
    """
    if settings.tune.search != "optuna":
        return len(list_points(settings, fixed))
    parameters, count = read_space(settings, fixed), settings.tune.samples
    if all(parameter.categorical for parameter in parameters):
        count = sum(1 for _ in islice(combinations(parameters, lambda p: p.values), count))
    return count * settings.tune.seeds


def _in_space_order(point: dict[str, Any], settings: Settings) -> dict[str, Any]:
    return {name: point[name] for name in settings.tune.space if name in point}


def _with_seeds(point: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """One point for each of ``tune.seeds``. With a single seed, the point itself, without a seed."""
    seeds = settings.tune.seeds
    return [{**point, "seed": settings.seed + k} if seeds > 1 else point for k in range(seeds)]


def make_optuna_search(settings: Settings, parameters: Sequence[Parameter], storage: Any = None) -> "SeedRepeater":
    """Make a search with Optuna's TPE sampler (Bergstra et al., NeurIPS 2011).

    The sampler is multivariate; parameters that are active together form a group.

    Args:
        storage: one of ``optuna.storages``; the study is kept in memory if None.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of Optuna call these arguments experimental
        sampler = optuna.samplers.TPESampler(seed=settings.seed, multivariate=True, group=True, constant_liar=True)
    metric, space = f"best/{settings.tune.metric}", partial(_define, parameters)
    return SeedRepeater(OptunaSearch(space, metric, settings.tune.mode, sampler=sampler, storage=storage), settings)


class SeedRepeater(Searcher):
    """Repeats each new, valid point of another searcher with every seed.

    The searcher gets the mean result of the runs that did not fail. If all runs of a point failed, Optuna counts it as
    pruned, which is worse than any result. (``ray.tune.search.Repeater`` reports NaN, which Optuna does not accept.)
    """

    def __init__(self, searcher: Searcher, settings: Settings) -> None:
        super().__init__(metric=searcher.metric, mode=searcher.mode)
        # Not named ``searcher``: Ray Tune saves an attribute of this name separately.
        self.proposer, self.settings = searcher, settings
        self.num_proposals = 0
        self.seen: list[dict[str, Any]] = []
        self.pending: list[dict[str, Any]] = []
        """Runs of the latest point that have not started."""
        self.running: dict[str, str] = {}
        """Id of a running trial to the searcher's name of its point."""
        self.results: defaultdict[str, list[float]] = defaultdict(list)
        """The searcher's name of a point to the results of its runs that did not fail."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Suggest the next run: the next seed of the latest point, or the first seed of a new point."""
        if not self.pending:
            self.pending = self._propose()
        if not self.pending:
            return Searcher.FINISHED
        self.running[trial_id] = str(self.num_proposals)
        return self.pending.pop(0)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Record the result of a run. After the last run of a point, report the point to the searcher."""
        name = self.running.pop(trial_id, None)
        if name is None:  # after a restart, Ray Tune may complete a trial again
            return
        value = math.nan if error else (result or {}).get(self.metric, math.nan)
        if math.isfinite(value):
            self.results[name].append(value)
        waiting = self.pending and name == str(self.num_proposals)
        if not waiting and name not in self.running.values():
            mean = {self.metric: fmean(self.results[name])} if self.results[name] else None
            self.proposer.on_trial_complete(name, mean)

    def save(self, checkpoint_path: str) -> None:
        """Write the state of both searchers to one file, so that a kill cannot leave states that differ."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """Restore the state from a file that ``save`` wrote."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))

    def _propose(self) -> list[dict[str, Any]]:
        """The runs of a new, valid point; empty if the search is exhausted."""
        for _ in range(MAX_ATTEMPTS):
            self.num_proposals += 1
            name = str(self.num_proposals)
            point = _in_space_order(self.proposer.suggest(name)[POINT], self.settings)
            with suppress(UserError):
                if point not in self.seen:
                    settings_at(self.settings, point)
                    self.seen.append(point)
                    return _with_seeds(point, self.settings)
            self.proposer.on_trial_complete(name, error=True)
        return []


def _define(parameters: Sequence[Parameter], trial: "optuna.Trial") -> dict[str, dict[str, Any]]:
    """The define-by-run space. Names stay below one key because ``OptunaSearch`` splits keys at slashes."""
    return {POINT: next(combinations(parameters, lambda p: [_suggest(trial, p)]))}


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

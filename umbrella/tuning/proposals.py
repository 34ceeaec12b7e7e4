"""Optuna as a searcher of Ray Tune's: points proposed from those before, each run with every seed."""

import math
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from ray.tune.search import Searcher

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.tuning.entry import Entry, combine
from umbrella.tuning.space import as_written, checked, with_seeds

if TYPE_CHECKING:
    import optuna

TRIES = 100
"""Proposals in a row that are no new point; then the search counts as done."""


@dataclass
class Proposal:
    """A point that Optuna asked for, and what its runs, one per seed, brought."""

    asked: "optuna.Trial"
    waiting: list[dict[str, Any]]
    """The runs that have not started."""
    best: dict[str, float] = field(default_factory=dict)
    """A run's best evaluation; NaN before its first."""
    open: set[str] = field(default_factory=set)
    """The runs that have not ended."""


class Proposals(Searcher):
    """Optuna's TPE (Bergstra et al., NeurIPS 2011), multivariate, a group of names for each case of the conditions.

    A trial counts with its best evaluation, as in the ranking, and a point with the mean over its seeds. A failed run
    is left out of that mean; a point of which all runs failed counts as worse than any other.
    Ray's ``OptunaSearch`` ends the sweep where a report lacks the metric, and ``Repeater`` takes last evaluations.
    """

    def __init__(self, settings: Settings, entries: Sequence[Entry]) -> None:
        import optuna

        super().__init__(metric=settings.tune.metric, mode=settings.tune.mode)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that these three are experimental
            sampler = optuna.samplers.TPESampler(seed=settings.seed, multivariate=True, group=True, constant_liar=True)
        direction: Literal["maximize", "minimize"] = "maximize" if settings.tune.mode == "max" else "minimize"
        self.settings, self.entries = settings, entries
        self.study = optuna.create_study(sampler=sampler, direction=direction)
        self.seen: list[dict[str, Any]] = []
        self.latest: Proposal | None = None
        self.proposals: dict[str, Proposal] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """The metric is known already, and the space is not Ray Tune's."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next run: of the latest point one more seed, or of a new one the first."""
        if self.latest is None or not self.latest.waiting:
            self.latest = self._ask()
        if self.latest is None:
            return Searcher.FINISHED
        self.proposals[trial_id] = self.latest
        self.latest.open.add(trial_id)
        self.latest.best[trial_id] = math.nan
        return self.latest.waiting.pop(0)

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """A trial evaluated."""
        if trial_id in self.proposals:
            value, best = result.get(self.metric), self.proposals[trial_id].best
            if isinstance(value, int | float) and math.isfinite(value):
                better = max if self.mode == "max" else min
                best[trial_id] = value if math.isnan(best[trial_id]) else better(value, best[trial_id])

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """A trial ended, was stopped or failed: with its point's last one, Optuna is told."""
        from optuna.trial import TrialState

        proposal = self.proposals.get(trial_id)
        if proposal is None or trial_id not in proposal.open:
            return
        if error:
            proposal.best[trial_id] = math.nan
        else:
            self.on_trial_result(trial_id, result or {})
        proposal.open.remove(trial_id)
        if proposal.open or proposal.waiting:
            return
        values = [value for value in proposal.best.values() if not math.isnan(value)]
        if values:
            self.study.tell(proposal.asked, fmean(values))
        else:
            self.study.tell(proposal.asked, state=TrialState.PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """Write all that is known, for ``Tuner.restore``."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """Read it back."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))

    def _ask(self) -> Proposal | None:
        """A new point that the settings take; None when there seems to be none left."""
        from optuna.trial import TrialState

        for _ in range(TRIES):
            asked = self.study.ask()
            (found,) = combine(self.entries, partial(_suggest, asked))
            point = as_written(found, self.settings)
            try:
                if point not in self.seen:
                    checked(self.settings, point)
                    self.seen.append(point)
                    return Proposal(asked, with_seeds(point, self.settings))
            except UserError:
                pass
            self.study.tell(asked, state=TrialState.FAIL)
        return None


def _suggest(asked: "optuna.Trial", entry: Entry) -> list[Any]:
    """One value, of Optuna's choice."""
    if entry.listed:
        return [entry.values[asked.suggest_categorical(entry.name, range(len(entry.values)))]]
    low, high = entry.values[:2]
    logarithmic = entry.kind == "loguniform"
    if entry.kind == "quniform":
        value = low + asked.suggest_int(entry.name, 0, entry.steps) * entry.values[2]
    elif entry.whole:
        value = asked.suggest_int(entry.name, int(low), int(high), log=logarithmic)
    else:
        value = asked.suggest_float(entry.name, low, high, log=logarithmic)
    return [entry.fitted(value)]

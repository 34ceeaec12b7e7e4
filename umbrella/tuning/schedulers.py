"""What stops a sweep's trials early, or changes them on the way."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.tuning.entry import Entry
from umbrella.tuning.space import is_given, read_space

ON_THE_WAY = ("optim.", "mask.", "train.augment.")
"""Settings that a training can change at a checkpoint: they change neither its weights' shapes nor its plan."""
EVALUATIONS = "evaluation"


class Population(PopulationBasedTraining):
    """Population-based training (Jaderberg et al., 2017) that comes to its end.

    The worst trials go on from checkpoints of the best, which may be of an earlier step. Where a metric falls with the
    steps, as in overfitting, two trials would set each other back for ever; here each step sets a trial back once.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.left: dict[str, int] = {}
        """The last evaluation that each trial left for another's checkpoint."""

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        evaluation = self._trial_state[trial].last_train_time
        if evaluation > self.left.get(trial.trial_id, 0):
            self.left[trial.trial_id] = evaluation
            super()._exploit(tune_controller, trial, trial_to_clone)


def make_scheduler(settings: Settings, given: frozenset[str] = frozenset()) -> TrialScheduler:
    """The scheduler that ``settings.tune`` asks for; metric and mode are ``tune.TuneConfig``'s.

    Raises:
        UserError: ``tune.perturb`` names what population-based training cannot change.
    """
    asked = settings.tune
    if asked.scheduler == "asha":
        return ASHAScheduler(
            time_attr=EVALUATIONS,
            max_t=10**6,  # beyond any number of evaluations: a trial that is not stopped early ends by itself
            grace_period=asked.grace,
            reduction_factor=asked.reduction,
        )
    if asked.scheduler == "median":
        return MedianStoppingRule(time_attr=EVALUATIONS, grace_period=asked.grace)
    if asked.scheduler == "pbt":
        entries = perturbed(settings, given)
        rng = np.random.default_rng([settings.seed, 1])  # not the numbers that the points were drawn with
        return Population(
            time_attr=EVALUATIONS,
            perturbation_interval=asked.perturb_every,
            # Ray moves along a list by one, and multiplies a number by 0.8 or 1.2, or draws it anew.
            hyperparam_mutations={e.name: list(e.values) if e.listed else partial(e.draw, rng) for e in entries},
            custom_explore_fn=partial(_within, [entry for entry in entries if not entry.listed]),
        )
    return FIFOScheduler()


def perturbed(settings: Settings, given: frozenset[str] = frozenset()) -> list[Entry]:
    """What population-based training changes.

    Raises:
        UserError: see ``make_scheduler``.
    """
    entries = {entry.name: entry for entry in read_space(settings, given)}
    for name in settings.tune.perturb:
        where = f"tune.perturb: {name}"
        if name not in entries:
            why = "set on the command line" if is_given(name, given) else "not swept"
            raise UserError(f"{where} is {why}; sweep it with tune.space.{name}, or name another one")
        if not name.startswith(ON_THE_WAY):
            raise UserError(f"{where} cannot change on the way; {', '.join(ON_THE_WAY)}* can")
        if entries[name].when or any(name in entry.when for entry in entries.values()):
            raise UserError(f"{where} is part of a condition, and cannot change on the way; take the condition out")
    return [entries[name] for name in settings.tune.perturb]


def _within(entries: Sequence[Entry], config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, **{entry.name: entry.fitted(config[entry.name]) for entry in entries}}

"""What stops a sweep's trials early, or changes them on the way."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.tuning.adoption import adopt, read_point, settle, stand_at
from umbrella.tuning.entry import Entry
from umbrella.tuning.folder import POINT, find_folder, trial_folder
from umbrella.tuning.space import is_given, read_space

ON_THE_WAY = ("optim.", "mask.", "train.augment.")
"""Settings that a training can change at a checkpoint: they change neither its weights' shapes nor its plan."""
EVALUATIONS = "evaluation"


class Median(MedianStoppingRule):
    """The median rule (Golovin et al., 2017), for trials that cost seconds to start and may tell evaluations again.

    Ray's pauses trials as long as there are too few to compare with, and counts what it is told again once more.
    """

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether the trial goes on after an evaluation."""
        told = [row[EVALUATIONS] for row in self._results[trial]] if trial in self._results else []
        if result[EVALUATIONS] in told or not isfinite(result[self._metric]):
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Its last evaluation counts for the others."""
        if isfinite(result.get(self._metric, nan)):
            super().on_trial_complete(tune_controller, trial, result)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Trial, time: float) -> str:
        return TrialScheduler.CONTINUE


class Population(PopulationBasedTraining):
    """Population-based training (Jaderberg et al., 2017) in step: it decides when all trials wait at an evaluation.

    The worst then go on from checkpoints of the best that are of the same step. Out of step, a trial would take an
    earlier checkpoint and have two values for the steps in between, or a later one and have none.

    A trial that waits holds nothing, so more than fit at once take turns.
    """

    at_once: ClassVar[float] = inf
    """Trials that this process runs at once. Ray keeps the scheduler with the sweep, which may go on elsewhere."""

    def __init__(self, **options: Any) -> None:
        super().__init__(synch=True, log_config=False, **options)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A trial is new, goes on after a kill, or is to be tried again."""
        if (self._folder(trial) / POINT).exists():
            folder = trial_folder(trial.storage.experiment_fs_path, trial.trial_id, trial.config)
            settle(folder)
            trial.set_config(read_point(folder))  # Ray's note may be older, or of what was not done any more
        if trial not in self._trial_state and trial.status == Trial.PENDING:
            trial.set_status(Trial.PAUSED)  # whatever is pending, Ray starts as soon as there are resources
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether the trial goes on after an evaluation, or waits for the others."""
        if result[EVALUATIONS] < self._next_perturbation_sync:  # an earlier decision's may be told again
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The next one; where the last that the others wait for has ended, they are decided on first."""
        alive = []
        for trial in tune_controller.get_trials():
            state = self._trial_state[trial]
            if trial.is_finished():  # Ray waits for those that have failed, for ever
                state.last_train_time = max(state.last_train_time, self._next_perturbation_sync)
            else:
                alive.append(trial)
        paused = [trial for trial in alive if trial.status == Trial.PAUSED]
        due = [trial for trial in paused if self._trial_state[trial].last_train_time < self._next_perturbation_sync]
        if alive and len(paused) == len(alive) and not due:
            self.on_trial_result(tune_controller, alive[0], self._trial_state[alive[0]].last_result)
            due = alive
        free = len(alive) - len(paused) < self.at_once
        return min(due, key=lambda trial: self._trial_state[trial].last_train_time) if due and free else None

    def _exploit(self, tune_controller: Any, trial: Trial, trial_to_clone: Trial) -> None:
        before, donor = trial.config, trial_to_clone.config
        here, there = self._folder(trial), self._folder(trial_to_clone)
        # A sweep that goes on after a kill is told of evaluations again that its trials have left behind.
        if stand_at(self._trial_state[trial].last_train_time, here, there):
            super()._exploit(tune_controller, trial, trial_to_clone)
            adopt(here, there, before, donor, trial.config)

    def _folder(self, trial: Trial) -> Path:
        return find_folder(trial.storage.experiment_fs_path, trial.trial_id, trial.config)


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
        return Median(time_attr=EVALUATIONS, grace_period=asked.grace)
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

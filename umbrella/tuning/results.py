"""The trials of a sweep as they ended, their ranking, and which settings matter."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from umbrella.fileio import write_csv
from umbrella.paths import POINT, TRIALS, checkpoint_folder
from umbrella.training.checkpoint_files import LOSS, best_checkpoint, ranking_key, read_history
from umbrella.tuning.search_space import format_point
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import FAILED, UNFINISHED, load_outcome, trial_id_of

SEED = "seed"
"""The setting that does not distinguish configurations: trials that differ only in it are repeated measurements."""
MIN_TRIALS = 8
"""Minimum number of trials for an estimate of the importance."""
ROUNDS, TREES, SHUFFLES = 10, 50, 5


@dataclass(frozen=True)
class Trial:
    """The result of a trial. ``metric``, ``loss`` and ``step`` are those of ``checkpoint``, its best one on disk."""

    trial_id: str
    point: dict[str, Any]
    state: str
    metric: float | None = None
    loss: float | None = None
    """Validation loss, in nats per token."""
    step: int | None = None
    checkpoint: str | None = None
    reason: str = ""
    """Why the trial ended early, in one line."""
    curve: Sequence[Mapping[str, Any]] = ()
    """The reports of its evaluations by step, see ``checkpoint_files.read_history``."""

    @property
    def name(self) -> str:
        """The values of the trial: "lr=3e-4 supervise=all"."""
        return format_point(self.point)

    @property
    def failed(self) -> bool:
        """Whether the trial ended with an error."""
        return self.state == FAILED

    @property
    def started(self) -> float | None:
        """Unix time of its start, in seconds; None without an evaluation."""
        return self.curve[0]["begun"] if self.curve else None

    @property
    def seconds(self) -> float | None:
        """Time from the start to the last evaluation, without the time between two attempts."""
        ends = {row["begun"]: row["time"] for row in self.curve}  # start of each attempt: time of its last evaluation
        return sum(end - begun for begun, end in ends.items()) if ends else None

    @property
    def first_evaluation(self) -> float | None:
        """Time from the start to the first evaluation, in seconds."""
        return self.curve[0]["time"] - self.curve[0]["begun"] if self.curve else None


def read_trials(sweep: str | Path, tune: TuneSettings) -> list[Trial]:
    """Read the trials of a sweep from its folder, in the order of their start.

    Args:
        tune: its metric and mode determine the best checkpoint of each trial.
    """
    trials = [_read_trial(file.parent, tune) for file in Path(sweep).glob(f"{TRIALS}/*/{POINT}")]
    return sorted(trials, key=lambda trial: (inf if trial.started is None else trial.started, trial.trial_id))


def _read_trial(folder: Path, tune: TuneSettings) -> Trial:
    curve, outcome, kept = read_history(folder), load_outcome(folder), best_checkpoint(folder, tune.metric, tune.mode)
    best = next((row for row in curve if checkpoint_folder(folder, row["step"]) == kept), {})
    known = {name: value for name, value in best.items() if name in (tune.metric, LOSS) and isfinite(value)}
    return Trial(
        trial_id=trial_id_of(folder),
        point=json.loads((folder / POINT).read_text(encoding="utf-8")),
        state=outcome.state if outcome else UNFINISHED,
        metric=known.get(tune.metric),
        loss=known.get(LOSS),
        step=best.get("step"),
        checkpoint=str(kept) if best else None,
        reason=outcome.reason if outcome else "",
        curve=curve,
    )


def chance_warning(trials: Sequence[Trial], tune: TuneSettings, chance: float | None, subjects: int) -> str:
    """A warning for a sweep in which no trial is better than chance; empty if one is, or if chance is unknown.

    Args:
        chance: value of the metric for random answers, between 0 and 1.
        subjects: number of subjects in the validation split. Metrics within two standard errors count as chance.
    """
    best = max((t.metric for t in trials if t.metric is not None), default=None)
    if chance is None or best is None or not subjects:
        return ""
    if best >= min(1.0, chance + 2 * sqrt(chance * (1 - chance) / subjects)):
        return ""
    return (
        f"No trial learnt the task: the best {tune.metric}, {best:.4g}, is not distinguishable from chance"
        f" ({chance:.4g}, {subjects} subjects). Try more epochs (train.epochs) or larger rates (optim.lr)."
    )


@dataclass(frozen=True)
class Configuration:
    """Values of the swept settings, and the trials with these values: one per seed, best first."""

    point: dict[str, Any]
    """The values, without the seed."""
    trials: tuple[Trial, ...]
    metrics: list[float]
    """Metrics of the trials that have one and did not fail. A stopped trial counts with its best evaluation."""
    mean: float | None
    """Mean of ``metrics``."""
    ci95: float | None
    """Half-width of the 95% confidence interval of the mean (Student's t); None with fewer than two metrics."""
    loss: float | None
    """Mean validation loss of the trials that did not fail."""

    @property
    def name(self) -> str:
        """The values: "lr=3e-4 supervise=all"."""
        return format_point(self.point)

    @property
    def failures(self) -> int:
        """Number of trials that failed."""
        return sum(t.failed for t in self.trials)

    @property
    def state_counts(self) -> str:
        """See ``count_states``."""
        return count_states(t.state for t in self.trials)


def count_states(states: Iterable[str]) -> str:
    """Number of trials in each state: ``4 finished, 1 failed``."""
    return ", ".join(f"{n} {state}" for state, n in Counter(states).most_common())


def rank_configurations(trials: Iterable[Trial], mode: str) -> list[Configuration]:
    """Rank configurations by mean metric, then by mean loss. Those with mostly failed trials come last."""
    from scipy.special import stdtrit

    groups: dict[str, list[Trial]] = {}
    for t in trials:
        groups.setdefault(json.dumps(t.point | {SEED: None}, sort_keys=True, default=str), []).append(t)
    found = []
    for group in groups.values():
        group.sort(key=lambda t: (not t.failed, ranking_key(t.metric, t.loss, mode)), reverse=True)
        point = {name: value for name, value in group[0].point.items() if name != SEED}
        metrics = [t.metric for t in group if t.metric is not None and not t.failed]
        losses = [t.loss for t in group if t.loss is not None and not t.failed]
        mean, loss = (fmean(values) if values else None for values in (metrics, losses))
        n = len(metrics)
        ci95 = float(stdtrit(n - 1, 0.975) * stdev(metrics) / sqrt(n)) if n > 1 else None
        found.append(Configuration(point, tuple(group), metrics, mean, ci95, loss))

    def key(c: Configuration) -> tuple[bool, tuple[float, float]]:
        return 2 * c.failures <= len(c.trials), ranking_key(c.mean, c.loss, mode)

    return sorted(found, key=key, reverse=True)


def best_trial(configurations: Sequence[Configuration]) -> Trial | None:
    """The best trial of the best configuration; None if it has no metric or failed."""
    best = configurations[0].trials[0] if configurations else None
    return best if best and best.metric is not None and not best.failed else None


def ranked_trials(configurations: Iterable[Configuration]) -> list[Trial]:
    """All trials in the order of the ranking. The first is the best trial of the best configuration."""
    return [trial for configuration in configurations for trial in configuration.trials]


def with_seeds(configurations: Sequence[Configuration]) -> bool:
    """Whether any configuration has more than one trial."""
    return any(len(c.trials) > 1 for c in configurations)


def swept_names(trials: Iterable[Trial]) -> list[str]:
    """All swept settings. The point of a trial omits settings that are inactive in it."""
    return list(dict.fromkeys(name for trial in trials for name in trial.point))


def format_interval(configuration: Configuration) -> str:
    """Format mean and interval: ``0.8125 ± 0.04 (n = 5)``; without an interval if there is one seed."""
    if configuration.mean is None:
        return ""
    half = "" if configuration.ci95 is None else f" ± {configuration.ci95:.2g}"
    return f"{configuration.mean:.4g}{half} (n = {len(configuration.metrics)})"


def write_ranking(configurations: Sequence[Configuration], metric: str, file: Path) -> None:
    """Write one row per trial, in the order of the ranking. Each swept setting has a column, empty where inactive.

    ``mean`` is the mean over seeds, ``ci95`` the half-width of its 95% confidence interval.
    """
    names = swept_names(ranked_trials(configurations))
    outcome = ["state", "reason", "step", "evaluations", "eval/loss", metric, "mean", "ci95", "seeds", "seconds"]
    rows = []
    for place, c in enumerate(configurations, 1):
        for t in c.trials:
            row = [place, t.trial_id, *(t.point.get(name, "") for name in names), t.state, t.reason]
            row += [t.step, len(t.curve), t.loss, t.metric, c.mean, c.ci95, len(c.metrics), t.seconds]
            rows.append([*row, t.checkpoint])
    write_csv(file, ["rank", "trial", *names, *outcome, "checkpoint"], rows)


@dataclass(frozen=True)
class Importance:
    """Permutation importance of each swept setting for the metric."""

    shares: dict[str, float]
    """Share of each setting in the total importance, largest first."""
    threshold: float = 0.0
    """95% quantile of the largest share of a shuffled setting, which has no effect."""
    r2: float = 0.0
    """Out-of-bag R² of the random forest."""
    trials: int = 0
    unavailable: str = ""
    """Why there is no estimate; empty if there is one."""

    @property
    def significant(self) -> list[str]:
        """Settings with a share above the threshold."""
        return [name for name, share in self.shares.items() if share > self.threshold]


def compute_importance(trials: Sequence[Trial]) -> Importance:
    """Estimate the importance of each swept setting for the metric, from trials with a metric that did not fail.

    Permutation importance (Breiman, 2001) in a random forest. Shuffled copies of the settings give the threshold (as
    in Boruta: Kursa and Rudnicki, 2010). Where a setting is inactive, it takes the median of its other values, so
    that its value counts but not its presence, which depends on another setting.
    """
    used = [t for t in trials if t.metric is not None and not t.failed]
    values = {name: _column(name, used) for name in swept_names(used) if name != SEED}
    values = {name: column for name, column in values.items() if len(set(column)) > 1}
    target = np.array([t.metric for t in used], float)
    why = ""
    if len(used) < MIN_TRIALS:
        why = f"At least {MIN_TRIALS} trials with a metric are needed; there are {len(used)}."
    elif not values:
        why = "No setting other than the seed has two values."
    elif np.ptp(target) == 0:
        why = "All trials have the same metric."
    if why:
        return Importance({}, trials=len(used), unavailable=why)
    own, shuffled, r2 = _forests(np.stack(list(values.values()), axis=1), target)
    total = own.sum()
    if r2 <= 0 or total <= 0:
        why = f"The settings do not predict the metric of other trials (R² = {r2:.2f})."
        return Importance({}, r2=r2, trials=len(used), unavailable=why)
    shares = dict(sorted(zip(values, (own / total).tolist(), strict=True), key=lambda pair: -pair[1]))
    return Importance(shares, float(shuffled / total), r2, len(used))


def _forests(settings: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Mean importance per column, 95% quantile over rounds of the best shuffled column, mean out-of-bag R²."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    draws, columns = np.random.default_rng(0), settings.shape[1]
    own, best_shuffled, r2 = [], [], []
    for seed in range(ROUNDS):
        table = np.hstack([settings, draws.permuted(settings, axis=0)])
        forest = RandomForestRegressor(TREES, oob_score=True, random_state=seed).fit(table, target)
        found = permutation_importance(forest, table, target, n_repeats=SHUFFLES, random_state=seed).importances_mean
        own.append(np.maximum(found[:columns], 0))
        best_shuffled.append(found[columns:].max())
        r2.append(forest.oob_score_)
    return np.mean(own, axis=0), max(0.0, float(np.quantile(best_shuffled, 0.95))), float(np.mean(r2))


def _column(name: str, trials: Sequence[Trial]) -> np.ndarray:
    """A setting as numbers: its values or, if they are not numbers, their indices; the median where it is inactive."""
    values = {t.trial_id: t.point[name] for t in trials if name in t.point}
    if not is_numeric(values.values()):
        texts = {trial: json.dumps(value, default=str) for trial, value in values.items()}
        order = sorted(set(texts.values()))
        values = {trial: order.index(text) for trial, text in texts.items()}
    middle = np.quantile(np.array(list(values.values()), float), 0.5, method="lower")
    return np.array([values.get(t.trial_id, middle) for t in trials], float)


def is_numeric(values: Collection[Any]) -> bool:
    """Whether all values are numbers, and none is a bool."""
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)

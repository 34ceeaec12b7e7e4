"""The trials of a sweep as they ended, their ranking, and which settings matter."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from umbrella.fileio import write_csv
from umbrella.paths import POINT, TRIALS, checkpoint_folder
from umbrella.storage import write_csv
from umbrella.training.history import read_history
from umbrella.training.progress import best_checkpoint, goodness
from umbrella.tuning.search_space import format_point
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import FAILED, UNFINISHED, TrialStatus, load_status, read_point, trial_id_of


@dataclass(frozen=True)
class Evaluation:
    """One point of a trial's curve. A number is None where it was not finite, or is not known."""

    step: int
    epoch: float | None
    metric: float | None
    loss: float | None
    """Validation loss, in nats per token."""
    train_loss: float | None
    checkpoint: str


@dataclass(frozen=True)
class Trial:
    """A trial as it ended. ``metric``, ``loss``, ``step`` and ``checkpoint`` are of its best kept checkpoint."""

    trial_id: str
    point: dict[str, Any]
    state: str
    metric: float | None = None
    loss: float | None = None
    step: int | None = None
    checkpoint: str | None = None
    reason: str = ""
    """Why it did not come to its end, in one line."""
    curve: tuple[Evaluation, ...] = ()
    started: float | None = None
    """Seconds since 1970."""
    seconds: float | None = None
    """From its start to its last evaluation, without the pauses between two attempts."""
    first_evaluation: float | None = None
    """Seconds to its first evaluation."""

    @property
    def name(self) -> str:
        """The trial in words."""
        return format_point(self.point)

    @property
    def failed(self) -> bool:
        """Whether something went wrong."""
        return self.state == FAILED


def read_trials(sweep: str | Path, tune: TuneSettings) -> list[Trial]:
    """The trials that a sweep's folder knows, by when they started.

    Args:
        tune: whose metric decides which checkpoint of a trial is its best.
    """
    trials = [_trial(file.parent, tune) for file in Path(sweep).glob(f"{TRIALS}/*/{POINT}")]
    return sorted(trials, key=lambda trial: (inf if trial.started is None else trial.started, trial.trial_id))


def chance_warning(trials: Sequence[Trial], tune: TuneSettings, chance: float | None, subjects: int) -> str:
    """A sentence for a sweep in which no trial is better than guessing; empty where one is, or where it is not known.

    Args:
        chance: what guessing gives, as a share.
        subjects: that the metric is measured on. Two standard errors above chance are taken for chance.
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


def sort_key(metric: float | None, loss: float | None, mode: str) -> tuple[float, float]:
    """A key that sorts the best first, see ``goodness``."""
    by_metric, by_loss = goodness(metric, loss, mode)
    return -by_metric, -by_loss


def _trial(folder: Path, tune: TuneSettings) -> Trial:
    rows = read_history(folder)
    curve = tuple(
        Evaluation(
            step=row["step"],
            epoch=_number(row.get("epoch")),
            metric=_number(row.get(tune.metric)),
            loss=_number(row.get("eval/loss")),
            train_loss=_number(row.get("train/loss")),
            checkpoint=str(checkpoint_folder(folder, row["step"])),
        )
        for row in rows
    )
    end = load_status(folder) or TrialStatus(UNFINISHED, "")
    started, seconds, first = _times(rows)
    kept = best_checkpoint(folder, tune.metric, tune.mode)
    best = next((e for e in curve if e.checkpoint == str(kept)), None)
    return Trial(
        trial_id=trial_id_of(folder),
        point=read_point(folder),
        state=end.state,
        metric=best.metric if best else None,
        loss=best.loss if best else None,
        step=best.step if best else None,
        checkpoint=best.checkpoint if best else None,
        reason=end.reason,
        curve=curve,
        started=started,
        seconds=seconds,
        first_evaluation=first,
    )


def _times(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None, float | None]:
    """When a trial started, its seconds, and its seconds to the first evaluation. A restart begins anew."""
    if not rows:
        return None, None, None
    ends = {row["begun"]: row["time"] for row in rows}  # of each attempt, its last evaluation
    return rows[0]["begun"], sum(end - begun for begun, end in ends.items()), rows[0]["time"] - rows[0]["begun"]


def _number(value: Any) -> float | None:
    return None if value is None or not isfinite(value) else float(value)


SEED = "seed"
"""The setting that is no choice: trials that differ in it alone are measurements of one thing."""


@dataclass(frozen=True)
class Configuration:
    """One choice of settings, and its trials: one per seed, best first."""

    point: dict[str, Any]
    """Without the seed."""
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        """The settings in words."""
        return format_point(self.point)

    @property
    def metrics(self) -> list[float]:
        """The metric of each trial that has one and did not fail; of one that was stopped, the best until then."""
        return [t.metric for t in self.trials if t.metric is not None and not t.failed]

    @property
    def mean(self) -> float | None:
        """Over ``metrics``."""
        return float(np.mean(self.metrics)) if self.metrics else None

    @property
    def loss(self) -> float | None:
        """Mean validation loss of the measured trials."""
        losses = [t.loss for t in self.trials if t.loss is not None and not t.failed]
        return float(np.mean(losses)) if losses else None

    @property
    def ci95(self) -> float | None:
        """Half of the 95% interval of the mean over seeds, by Student's t; None with fewer than two."""
        n = len(self.metrics)
        if n < 2:
            return None
        from scipy.special import stdtrit

        return float(stdtrit(n - 1, 0.975) * np.std(self.metrics, ddof=1) / sqrt(n))

    @property
    def failures(self) -> int:
        """Trials that failed."""
        return sum(t.failed for t in self.trials)

    @property
    def state_counts(self) -> str:
        """How its trials ended, counted: ``4 finished, 1 failed``."""
        return ", ".join(f"{n} {state}" for state, n in Counter(t.state for t in self.trials).most_common())


def rank_configurations(trials: Iterable[Trial], mode: str) -> list[Configuration]:
    """Contenders, best first: by mean metric, then by mean loss. Those of which more than half failed come last."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(_choice(trial), sort_keys=True, default=str), []).append(trial)
    configurations = [
        Configuration(
            _choice(group[0]), tuple(sorted(group, key=lambda t: (t.failed, sort_key(t.metric, t.loss, mode))))
        )
        for group in groups.values()
    ]
    return sorted(configurations, key=lambda c: (2 * c.failures > len(c.trials), sort_key(c.mean, c.loss, mode)))


def _choice(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.point.items() if name != SEED}


def ranked_trials(configurations: Iterable[Configuration]) -> list[Trial]:
    """Their trials, in the order of the ranking. The first is the best seed of the best contender."""
    return [trial for configuration in configurations for trial in configuration.trials]


def with_seeds(configurations: Sequence[Configuration]) -> bool:
    """Whether any has more than one trial."""
    return any(len(c.trials) > 1 for c in configurations)


def swept_names(trials: Iterable[Trial]) -> list[str]:
    """Every setting that any point names. A point may lack some: what acts only with another setting's value."""
    return list(dict.fromkeys(name for trial in trials for name in trial.point))


def format_interval(configuration: Configuration) -> str:
    """``0.8125 ± 0.04 (n = 5)``; without an interval where there is one seed."""
    if configuration.mean is None:
        return ""
    half = "" if configuration.ci95 is None else f" ± {configuration.ci95:.2g}"
    return f"{configuration.mean:.4g}{half} (n = {len(configuration.metrics)})"


def ranking_table(configurations: Sequence[Configuration], metric: str) -> Table:
    """The ranking for the terminal: of contenders where there are seeds, else of trials."""
    seeds = with_seeds(configurations)
    table = Table(title="settings, best first" if seeds else "trials, best first", title_justify="left")
    names = ("trials", "eval/loss", f"{metric}: mean ± 95%") if seeds else ("state", "step", "eval/loss", metric)
    for name in ("settings" if seeds else "trial", *names):
        table.add_column(name, justify="left" if name in ("settings", "trial", "trials", "state") else "right")
    for c in configurations:
        if seeds:
            table.add_row(c.name, c.state_counts, "" if c.loss is None else f"{c.loss:.4g}", format_interval(c))
            continue
        t = c.trials[0]
        numbers = ["" if value is None else f"{value:.4g}" for value in (t.step, t.loss, t.metric)]
        table.add_row(t.name, t.state, *numbers)
    return table


def write_ranking(configurations: Sequence[Configuration], metric: str, file: Path) -> None:
    """One row per trial, by rank. A swept setting has a column, empty where it does not act.

    ``mean`` is over seeds, ``ci95`` half of its interval.
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


MIN_TRIALS = 8
"""Trials below which nothing is said."""
ROUNDS, TREES, SHUFFLES = 10, 50, 5


@dataclass(frozen=True)
class Importance:
    """What a forest that predicts the metric from the settings makes of each. ``unavailable``: why there is no answer."""

    shares: dict[str, float]
    """Setting to its share of all importance, largest first."""
    threshold: float = 0.0
    """The share that a setting without any effect may reach: 95% of the best shuffled copies stay below."""
    r2: float = 0.0
    """R² of the forest on trials that it has not seen. At most 1."""
    trials: int = 0
    unavailable: str = ""

    @property
    def significant(self) -> list[str]:
        """Settings that matter more than chance would have it."""
        return [name for name, share in self.shares.items() if share > self.threshold and not self.unavailable]


def compute_importance(trials: Sequence[Trial]) -> Importance:
    """How much each swept setting matters for the metric, over trials that have one and did not fail.

    Permutation importance (Breiman, 2001) in a random forest, beside a shuffled copy of each setting that tells what
    chance gives (as in Boruta: Kursa and Rudnicki, 2010). A setting that a point lacks takes the median of the others
    there, so that only its value can matter and not its presence, which another setting decides.
    """
    used = [t for t in trials if t.metric is not None and not t.failed]
    values = {name: _column(name, used) for name in swept_names(used) if name != SEED}
    values = {name: column for name, column in values.items() if len(set(column)) > 1}
    target = np.array([t.metric for t in used], float)
    if len(used) < MIN_TRIALS:
        return Importance(
            {}, trials=len(used), unavailable=f"It takes {MIN_TRIALS} measured trials; here: {len(used)}."
        )
    if not values:
        return Importance({}, trials=len(used), unavailable="No setting other than the seed has two values.")
    if np.ptp(target) == 0:
        return Importance({}, trials=len(used), unavailable="All trials have the same metric.")
    own, chance, r2 = _forests(np.stack(list(values.values()), axis=1), target)
    total = own.sum()
    if r2 <= 0 or total <= 0:
        words = f"What the settings did here does not tell how another trial would end (R² = {r2:.2f})."
        return Importance({}, r2=r2, trials=len(used), unavailable=words)
    shares = dict(sorted(zip(values, (own / total).tolist(), strict=True), key=lambda pair: -pair[1]))
    return Importance(shares, float(chance / total), r2, len(used))


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
    """A setting as numbers: itself, or its place among its values; the median where a trial lacks it."""
    present = [t.point[name] for t in trials if name in t.point]
    if is_numeric(present):
        codes = {t.trial_id: float(t.point[name]) for t in trials if name in t.point}
    else:
        places = {text: place for place, text in enumerate(sorted({json.dumps(v, default=str) for v in present}))}
        codes = {t.trial_id: places[json.dumps(t.point[name], default=str)] for t in trials if name in t.point}
    middle = np.quantile(list(codes.values()), 0.5, method="lower")
    return np.array([codes.get(t.trial_id, middle) for t in trials], float)


def is_numeric(values: Sequence[Any]) -> bool:
    """Whether all values are numbers, and none says yes or no."""
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)

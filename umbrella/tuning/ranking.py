"""Which settings are best: trials that differ in nothing but the seed are one contender, known by its mean."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from umbrella.storage import write_csv
from umbrella.tuning.results import Trial, order
from umbrella.tuning.space import label

SEED = "seed"
"""The setting that is no choice: trials that differ in it alone are measurements of one thing."""


@dataclass(frozen=True)
class Contender:
    """One choice of settings, and its trials: one per seed, best first."""

    point: dict[str, Any]
    """Without the seed."""
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        """The settings in words."""
        return label(self.point)

    @property
    def measured(self) -> list[float]:
        """The metric of each trial that has one and did not fail; of one that was stopped, the best until then."""
        return [t.metric for t in self.trials if t.metric is not None and not t.failed]

    @property
    def mean(self) -> float | None:
        """Over ``measured``."""
        return float(np.mean(self.measured)) if self.measured else None

    @property
    def loss(self) -> float | None:
        """Mean validation loss of the measured trials."""
        losses = [t.loss for t in self.trials if t.loss is not None and not t.failed]
        return float(np.mean(losses)) if losses else None

    @property
    def half(self) -> float | None:
        """Half of the 95% interval of the mean over seeds, by Student's t; None with fewer than two."""
        n = len(self.measured)
        if n < 2:
            return None
        from scipy.special import stdtrit

        return float(stdtrit(n - 1, 0.975) * np.std(self.measured, ddof=1) / sqrt(n))

    @property
    def failures(self) -> int:
        """Trials that failed."""
        return sum(t.failed for t in self.trials)

    @property
    def ends(self) -> str:
        """How its trials ended, counted: ``4 finished, 1 failed``."""
        return ", ".join(f"{n} {state}" for state, n in Counter(t.state for t in self.trials).most_common())


def rank(trials: Iterable[Trial], mode: str) -> list[Contender]:
    """Contenders, best first: by mean metric, then by mean loss. Those of which more than half failed come last."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(_choice(trial), sort_keys=True, default=str), []).append(trial)
    contenders = [
        Contender(_choice(group[0]), tuple(sorted(group, key=lambda t: (t.failed, order(t.metric, t.loss, mode)))))
        for group in groups.values()
    ]
    return sorted(contenders, key=lambda c: (2 * c.failures > len(c.trials), order(c.mean, c.loss, mode)))


def _choice(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.point.items() if name != SEED}


def trials_of(contenders: Iterable[Contender]) -> list[Trial]:
    """Their trials, in the order of the ranking. The first is the best seed of the best contender."""
    return [trial for contender in contenders for trial in contender.trials]


def with_seeds(contenders: Sequence[Contender]) -> bool:
    """Whether any has more than one trial."""
    return any(len(c.trials) > 1 for c in contenders)


def swept_names(trials: Iterable[Trial]) -> list[str]:
    """Every setting that any point names. A point may lack some: what acts only with another setting's value."""
    return list(dict.fromkeys(name for trial in trials for name in trial.point))


def interval(contender: Contender) -> str:
    """``0.8125 ± 0.04 (n = 5)``; without an interval where there is one seed."""
    if contender.mean is None:
        return ""
    half = "" if contender.half is None else f" ± {contender.half:.2g}"
    return f"{contender.mean:.4g}{half} (n = {len(contender.measured)})"


def ranking_table(contenders: Sequence[Contender], metric: str) -> Table:
    """The ranking for the terminal: of contenders where there are seeds, else of trials."""
    seeds = with_seeds(contenders)
    table = Table(title="settings, best first" if seeds else "trials, best first", title_justify="left")
    names = ("trials", "eval/loss", f"{metric}: mean ± 95%") if seeds else ("state", "step", "eval/loss", metric)
    for name in ("settings" if seeds else "trial", *names):
        table.add_column(name, justify="left" if name in ("settings", "trial", "trials", "state") else "right")
    for c in contenders:
        if seeds:
            table.add_row(c.name, c.ends, "" if c.loss is None else f"{c.loss:.4g}", interval(c))
            continue
        t = c.trials[0]
        numbers = ["" if value is None else f"{value:.4g}" for value in (t.step, t.loss, t.metric)]
        table.add_row(t.name, t.state, *numbers)
    return table


def write_ranking(contenders: Sequence[Contender], metric: str, file: Path) -> None:
    """One row per trial, by rank. A swept setting has a column, empty where it does not act.

    ``mean`` is over seeds, ``ci95`` half of its interval.
    """
    names = swept_names(trials_of(contenders))
    outcome = ["state", "reason", "step", "evaluations", "eval/loss", metric, "mean", "ci95", "seeds", "seconds"]
    rows = []
    for place, c in enumerate(contenders, 1):
        for t in c.trials:
            row = [place, t.trial_id, *(t.point.get(name, "") for name in names), t.state, t.reason]
            row += [t.step, len(t.curve), t.loss, t.metric, c.mean, c.half, len(c.measured), t.seconds]
            rows.append([*row, t.checkpoint])
    write_csv(file, ["rank", "trial", *names, *outcome, "checkpoint"], rows)

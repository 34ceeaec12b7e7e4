"""The position of a training in its plan, its evaluations so far, and how evaluations compare."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isnan
from pathlib import Path
from typing import Any

from umbrella.fileio import write_atomic
from umbrella.paths import HISTORY, PROGRESS

LOSS = "eval/loss"
NOT_EVALUATED = (-inf, -inf)
"""The ``ranking_key`` of what was not evaluated."""


@dataclass(frozen=True)
class TrainingState:
    """Optimizer steps done, the position of the next sample, and by which steps samples are sorted: see ``Plan``.

    best: the best value so far of the metric that decides. since_best: evaluations that came after it, none better.
    epoch: the position in passes over the data.
    """

    step: int = 0
    position: int = 0
    sorted_by: int = 0
    best: float | None = None
    since_best: int = 0
    epoch: float = 0.0

    def evaluated(self, value: float, mode: str) -> "TrainingState":
        """After an evaluation that gave this value. NaN is never better."""
        sign = 1 if mode == "max" else -1
        if not isnan(value) and (self.best is None or sign * value > sign * self.best):
            return replace(self, best=value, since_best=0)
        return replace(self, since_best=self.since_best + 1)

    def out_of_patience(self, patience: int) -> bool:
        """Whether so many evaluations were no better than the best; never with a patience of 0."""
        return 0 < patience <= self.since_best


def read_training_state(folder: str | Path) -> TrainingState:
    """How far the training of a checkpoint is."""
    return TrainingState(**json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8")))


def ranking_key(metric: float | None, loss: float | None, mode: str) -> tuple[float, float]:
    """A key by which evaluations, trials and choices of settings compare, larger is better: the metric, then the loss.

    Args:
        metric, loss: None or NaN if they are not known; that is worse than any number.
        mode: "max" or "min", of the metric.
    """
    sign = 1 if mode == "max" else -1
    known = [-inf if value is None or isnan(value) else value for value in (metric and sign * metric, loss and -loss)]
    return known[0], known[1]


def append_evaluation(folder: str | Path, report: Mapping[str, Any]) -> None:
    """Add an evaluation: step, steps, epoch, out_of_patience, and what was measured."""
    with (Path(folder) / HISTORY).open("a", encoding="utf-8") as file:
        print(json.dumps(report), file=file, flush=True)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The evaluations by step; of a step that was done again, the last. A line that is half written is none yet."""
    file = Path(folder) / HISTORY
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n") and line.startswith("{")]
    return sorted({row["step"]: row for row in rows}.values(), key=lambda row: row["step"])


def truncate_history(folder: str | Path, step: int) -> None:
    """Forget evaluations after a step: the training goes on from there, and will do them again."""
    file = Path(folder) / HISTORY
    if file.exists():
        kept = [row for row in read_history(folder) if row["step"] <= step]
        write_atomic(file, "".join(f"{json.dumps(row)}\n" for row in kept))

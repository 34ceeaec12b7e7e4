"""The position of a training, its history of evaluations, and the order of evaluations."""

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
"""The ``ranking_key`` without metric and loss."""


@dataclass(frozen=True)
class TrainingState:
    """The position of a training, as its checkpoints hold it."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Of the next sample in the order of samples."""
    sorted_by: int = 0
    """See ``Plan``."""
    best: float | None = None
    """Best value so far of ``tune.metric``."""
    since_best: int = 0
    """Evaluations since the best one."""
    epoch: float = 0.0
    """Passes over the data done."""

    def evaluated(self, value: float, mode: str) -> "TrainingState":
        """Return the state after an evaluation with this value. NaN is never better."""
        sign = 1 if mode == "max" else -1
        if not isnan(value) and (self.best is None or sign * value > sign * self.best):
            return replace(self, best=value, since_best=0)
        return replace(self, since_best=self.since_best + 1)

    def out_of_patience(self, patience: int) -> bool:
        """Whether the last ``patience`` evaluations were not better than the best. Never with a patience of 0."""
        return 0 < patience <= self.since_best


def read_training_state(folder: str | Path) -> TrainingState:
    """Read the state from a checkpoint."""
    return TrainingState(**json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8")))


def ranking_key(metric: float | None, loss: float | None, mode: str) -> tuple[float, float]:
    """Return the key by which evaluations, trials and settings compare: the metric, then the loss. Larger is better.

    Args:
        metric, loss: None or NaN if unknown, which is worse than any number.
        mode: "max" or "min", of the metric.
    """
    sign = 1 if mode == "max" else -1
    known = [-inf if value is None or isnan(value) else value for value in (metric and sign * metric, loss and -loss)]
    return known[0], known[1]


def append_evaluation(folder: str | Path, report: Mapping[str, Any]) -> None:
    """Append an evaluation to the history of a training: step, steps, epoch, out_of_patience, and its metrics."""
    with (Path(folder) / HISTORY).open("a", encoding="utf-8") as file:
        print(json.dumps(report), file=file, flush=True)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """Read the evaluations of a training by step; of a repeated step the last. A partly written line is ignored."""
    file = Path(folder) / HISTORY
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n") and line.startswith("{")]
    return sorted({row["step"]: row for row in rows}.values(), key=lambda row: row["step"])


def truncate_history(folder: str | Path, step: int) -> None:
    """Delete the evaluations after a step, from which the training continues: it repeats them."""
    file = Path(folder) / HISTORY
    if file.exists():
        kept = [row for row in read_history(folder) if row["step"] <= step]
        write_atomic(file, "".join(f"{json.dumps(row)}\n" for row in kept))

"""The trials of a sweep as they ended, from what lies in its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any

from umbrella.paths import POINT, TRIALS, checkpoint_folder
from umbrella.training.history import read_history
from umbrella.training.progress import best_checkpoint, goodness
from umbrella.tuning.ending import FAILED, UNFINISHED, End, read_end
from umbrella.tuning.folder import name_of, read_point
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.space import label


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
    first: float | None = None
    """Seconds to its first evaluation."""

    @property
    def name(self) -> str:
        """The trial in words."""
        return label(self.point)

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


def at_chance(trials: Sequence[Trial], tune: TuneSettings, chance: float | None, subjects: int) -> str:
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


def order(metric: float | None, loss: float | None, mode: str) -> tuple[float, float]:
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
    end = read_end(folder) or End(UNFINISHED, "")
    started, seconds, first = _times(rows)
    kept = best_checkpoint(folder, tune.metric, tune.mode)
    best = next((e for e in curve if e.checkpoint == str(kept)), None)
    return Trial(
        trial_id=name_of(folder),
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
        first=first,
    )


def _times(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None, float | None]:
    """When a trial started, its seconds, and its seconds to the first evaluation. A restart begins anew."""
    if not rows:
        return None, None, None
    ends = {row["begun"]: row["time"] for row in rows}  # of each attempt, its last evaluation
    return rows[0]["begun"], sum(end - begun for begun, end in ends.items()), rows[0]["time"] - rows[0]["begun"]


def _number(value: Any) -> float | None:
    return None if value is None or not isfinite(value) else float(value)

"""The trials of a sweep as they ended: what Ray Tune has noted of each, and what lies in its checkpoints."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any

from umbrella.training.job import cause
from umbrella.training.live import EARLY
from umbrella.training.progress import METRICS, read_metrics, read_progress, what_is_wrong
from umbrella.tuning.monitor import FAILED, STOPPED, how_it_ended
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


def read_trials(
    results: Iterable[Any], tune: TuneSettings, told: Mapping[str, tuple[str, str]] = MappingProxyType({})
) -> list[Trial]:
    """Ray Tune's results, in their order.

    Args:
        results: a ``ResultGrid``.
        tune: whose metric decides which checkpoint of a trial is its best.
        told: trial_id to (state, reason), of trials whose end the driver knows better than their last report says.
    """
    return [_trial(result, tune, told) for result in results]


def order(metric: float | None, loss: float | None, mode: str) -> tuple[float, float]:
    """A key that sorts the best first: by the metric, then by validation loss; what is not a number comes last."""
    sign = 1 if mode == "max" else -1
    metric, loss = _number(metric), _number(loss)
    return inf if metric is None else -sign * metric, inf if loss is None else loss


def _trial(result: Any, tune: TuneSettings, told: Mapping[str, tuple[str, str]]) -> Trial:
    said = result.metrics or {}
    trial_id, point = said.get("trial_id", Path(result.path).name), result.config
    if point is None:  # its process died before it said anything
        point = json.loads((Path(result.path) / "params.json").read_text(encoding="utf-8"))
    history = result.metrics_dataframe
    rows = [] if history is None or "checkpoint" not in history else history.to_dict("records")
    rows = [row for row in rows if isinstance(row["checkpoint"], str)]  # Ray's own notes have none
    curve = _curve(rows, tune.metric)
    state, reason = told.get(trial_id) or _end(result, rows, curve)
    started, seconds, first = _times(rows)
    # A trial may be stopped while its last checkpoint is being written.
    kept = [e for e in curve if not what_is_wrong(e.checkpoint)]
    best = min(kept, key=lambda e: order(e.metric, e.loss, tune.mode), default=None)
    return Trial(
        trial_id=trial_id,
        point=dict(point),
        state=state,
        metric=best.metric if best else None,
        loss=best.loss if best else None,
        step=best.step if best else None,
        checkpoint=best.checkpoint if best else None,
        reason=reason,
        curve=curve,
        started=started,
        seconds=seconds,
        first=first,
    )


def _curve(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[Evaluation, ...]:
    """One evaluation per step. Of a step that was done again after a restart, the last counts.

    What Ray lost between a report and a crash is read from the checkpoint that was written then.
    """
    curve = {
        int(row["step"]): Evaluation(
            step=int(row["step"]),
            epoch=_number(row.get("epoch")),
            metric=_number(row.get(metric)),
            loss=_number(row.get("eval/loss")),
            train_loss=_number(row.get("train/loss")),
            checkpoint=row["checkpoint"],
        )
        for row in rows
    }
    for folder in {Path(row["checkpoint"]).parent for row in rows}:
        for file in folder.glob(f"step_*/{METRICS}"):
            checkpoint = file.parent
            if what_is_wrong(checkpoint) or metric not in (measured := read_metrics(checkpoint)):
                continue  # half written, or written on request without an evaluation
            progress = read_progress(checkpoint)
            value, loss = _number(measured[metric]), _number(measured.get("eval/loss"))
            lost = Evaluation(progress.step, progress.epoch, value, loss, None, str(checkpoint))
            curve.setdefault(progress.step, lost)
    return tuple(curve[step] for step in sorted(curve))


def _end(result: Any, rows: Sequence[Mapping[str, Any]], curve: Sequence[Evaluation]) -> tuple[str, str]:
    """The state of a trial, and why it did not come to its end."""
    if result.error:
        # Ray names the class with its module before what it says.
        return FAILED, cause(result.error).removeprefix("umbrella.base.UserError: ")
    if not rows:
        return FAILED, "it ended before its first evaluation"
    last = max(rows, key=lambda row: row["step"])
    state, where = how_it_ended(last), f"step {int(last['step'])} of {int(last['steps'])}"
    if state == STOPPED:
        return state, f"at evaluation {len(curve)}, {where}"
    return state, f"no better evaluation for as long as train.patience allows, {where}" if state == EARLY else ""


def _times(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None, float | None]:
    """When a trial started, its seconds, and its seconds to the first evaluation. Ray counts anew in each attempt."""
    timed = [row for row in rows if _number(row.get("time_total_s")) is not None]
    if not timed:
        return None, None, None
    totals = [float(row["time_total_s"]) for row in timed]
    ends = [now for now, after in zip(totals, [*totals[1:], 0.0], strict=True) if after < now]
    stamp = _number(timed[0].get("timestamp"))
    return None if stamp is None else stamp - totals[0], sum(ends), totals[0]


def _number(value: Any) -> float | None:
    return None if value is None or not isfinite(value) else float(value)

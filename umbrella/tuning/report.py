"""The answer of a sweep: trials ranked by the metric, a figure, the best settings and where the checkpoint lies."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from typing import Any

from rich.table import Table

from umbrella.training.live import FINISHED
from umbrella.training.progress import what_is_wrong
from umbrella.tuning.monitor import FAILED, how_it_ended
from umbrella.tuning.space import label


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

    @property
    def name(self) -> str:
        """The trial in words."""
        return label(self.point)


def rank(results: Any, metric: str, mode: str) -> list[Trial]:
    """Ray Tune's results, best first: by the metric, then by validation loss; failed trials last."""
    sign = 1 if mode == "max" else -1
    trials = [_trial(result, metric, sign) for result in results]
    return sorted(trials, key=lambda t: (t.state == FAILED, _order(t.metric, t.loss, sign)))


def _order(metric: float | None, loss: float | None, sign: int) -> tuple[float, float]:
    metric, loss = (None if value is None or isnan(value) else value for value in (metric, loss))
    return inf if metric is None else -sign * metric, inf if loss is None else loss


def _trial(result: Any, metric: str, sign: int) -> Trial:
    trial_id, point = result.metrics["trial_id"], result.config
    if point is None:  # its process died before it said anything
        point = json.loads((Path(result.path) / "params.json").read_text(encoding="utf-8"))
    history = result.metrics_dataframe
    reported = [] if history is None or "checkpoint" not in history else history.to_dict("records")
    if not reported:
        return Trial(trial_id, dict(point), FAILED)
    ended = how_it_ended(reported[-1])
    # A trial may be stopped while its last checkpoint is being written.
    kept = [row for row in reported if not what_is_wrong(row["checkpoint"])]
    if not kept:
        return Trial(trial_id, dict(point), FAILED if result.error else ended)
    best = min(kept, key=lambda row: _order(row[metric], row["eval/loss"], sign))
    return Trial(
        trial_id=trial_id,
        point=dict(point),
        state=FAILED if result.error else ended,
        metric=best[metric],
        loss=best["eval/loss"],
        step=int(best["step"]),
        checkpoint=best["checkpoint"],
    )


def ranking_table(trials: Sequence[Trial], metric: str) -> Table:
    """The trials as a table for the terminal."""
    table = Table(title="trials, best first", title_justify="left")
    for name in ("trial", "state", "step", "eval/loss", metric):
        table.add_column(name, justify="left" if name in ("trial", "state") else "right")
    for t in trials:
        numbers = ["" if value is None else f"{value:.4g}" for value in (t.step, t.loss, t.metric)]
        table.add_row(t.name, t.state, *numbers)
    return table


def write_csv(trials: Sequence[Trial], metric: str, file: Path) -> None:
    """The ranking as CSV: one column per swept setting."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        names = list(dict.fromkeys(name for t in trials for name in t.point))
        writer.writerow(["trial", *names, "state", "step", "eval/loss", metric, "checkpoint"])
        for t in trials:
            values = [t.point.get(name) for name in names]
            writer.writerow([t.trial_id, *values, t.state, t.step, t.loss, t.metric, t.checkpoint])


def draw(trials: Sequence[Trial], metric: str, file: Path) -> None:
    """Draw the metric against the first swept number (the learning rate); a line per combination of other settings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [t for t in trials if t.metric is not None]
    names = list(dict.fromkeys(name for t in trials for name in t.point))
    numeric = [n for n in names if all(isinstance(t.point.get(n), int | float) for t in shown)]
    x = (numeric or names or ["trial"])[0]
    groups: dict[str, list[Trial]] = {}
    for t in shown:
        groups.setdefault(label({n: v for n, v in t.point.items() if n != x}), []).append(t)

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, group), marker in zip(sorted(groups.items()), "os^Dv<>ph*" * len(groups), strict=False):
        if x in numeric:
            group.sort(key=lambda t: t.point[x])
        xs = [t.point[x] if x in numeric else str(t.point.get(x, "as set")) for t in group]
        ys = [float(t.metric) for t in group if t.metric is not None]
        (line,) = axes.plot(xs, ys, "-", alpha=0.6, label=name)
        for t, px, py in zip(group, xs, ys, strict=True):
            filled = line.get_color() if t.state == FINISHED else "white"
            axes.plot(px, py, marker, color=line.get_color(), markerfacecolor=filled, markersize=9)
    values = [t.point[x] for t in shown] if x in numeric else []
    if values and min(values) > 0 and max(values) / min(values) >= 10:
        axes.set_xscale("log")
    axes.set(xlabel=x, ylabel=metric, title="Each trial's best evaluation (hollow: stopped before its end)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)

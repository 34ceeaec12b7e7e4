"""Figures of a sweep."""

from collections import Counter
from collections.abc import Sequence
from math import isfinite, log10, nan
from typing import TYPE_CHECKING, Any

import numpy as np

from umbrella.plots import BLUE, GREEN, GREY, INK, LINES, ORANGE, SKY, VERMILION, WIDTH, new_figure, shorten
from umbrella.training.progress_log import FINISHED, STOPPED_EARLY
from umbrella.tuning.results import SEED, Configuration, Importance, Trial, is_numeric, ranked_trials, swept_names
from umbrella.tuning.search_space import format_point, format_value
from umbrella.tuning.sweep_files import FAILED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRIAL = "trial"
"""Label of the x axis if no setting was swept."""
MAX_COLOURED, MAX_RANKED, MAX_NAMED, MAX_PANELS = 5, 25, 60, 12
"""Maximum number of coloured and of ranked configurations, of trials with a name on the axis, and of panels."""


def draw_metric(configurations: Sequence[Configuration], metric: str) -> "Figure":
    """Plot the metric against each setting with at least two values, one panel per setting.

    Filled: finished trials; hollow: trials that were stopped; star: the best trial. If the other settings have few
    combinations, each has a colour and a line through its means.
    """
    shown = [t for t in ranked_trials(configurations) if t.metric is not None and not t.failed]
    names = [name for name in swept_names(shown) if name != SEED and len({_text(t, name) for t in shown}) > 1]
    panels = names[:MAX_PANELS] or [TRIAL]
    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(WIDTH if columns > 1 else 0.7 * WIDTH, 3.2 * rows)
    for i, name in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1, sharey=figure.axes[0] if i else None)
        having = [t for t in shown if name in t.point or name == TRIAL]
        _draw_panel(axes, having, name, [n for n in names if n != name], shown[0])
        lacking = len(shown) - len(having)
        axes.set_xlabel(f"{name}\n({lacking} trials without it)" if lacking else name)
        axes.set_ylabel(metric if i % columns == 0 else "")
    if more := len(names[MAX_PANELS:]):
        figure.supxlabel(f"{more} more swept setting{'s' * (more > 1)}: see ranking.csv", fontsize=9)
    return figure


def _draw_panel(axes: "Axes", trials: Sequence[Trial], name: str, others: Sequence[str], best: Trial) -> None:
    """Plot the metric against the numbers of a setting, or against the indices of other values."""
    numeric, labels = is_numeric([t.point.get(name) for t in trials]), sorted({_text(t, name) for t in trials})
    place = {t.trial_id: t.point[name] if numeric else labels.index(_text(t, name)) for t in trials}
    values = sorted(set(place.values()))
    log = numeric and values[0] > 0 and values[-1] / values[0] >= 10
    groups: dict[str, list[Trial]] = {}
    for t in trials:
        groups.setdefault(format_point({n: t.point[n] for n in others if n in t.point}), []).append(t)
    short = dict(zip(groups, shorten(list(groups), 40), strict=True))
    few = numeric and len(groups) <= len(LINES)
    few = few and any(len({place[t.trial_id] for t in group}) > 1 for group in groups.values())
    looks = zip(LINES, "os^Dv", sorted(groups.items()), strict=False) if few else [(BLUE, "o", ("", trials))]
    span = (log10(values[-1] / values[0]) if log else values[-1] - values[0]) or 1
    there: Counter[tuple[float, float | None]] = Counter()
    for colour, marker, (words, group) in looks:
        xs = sorted({place[t.trial_id] for t in group})
        means = [np.mean([t.metric for t in group if place[t.trial_id] == x]) for x in xs]
        if few:
            axes.plot(xs, means, "-", color=colour, alpha=0.6)
            axes.plot([], [], f"-{marker}", color=colour, label=short[words])
        elif not numeric:
            axes.plot(xs, means, "_", color=INK, markersize=30)
        for t in group:
            x = place[t.trial_id]
            # Trials at the same position are drawn side by side: 0, -1, 1, -2, 2 steps from it.
            step = 0.012 * span * ((there[x, t.metric] + 1) // 2) * (1 if there[x, t.metric] % 2 == 0 else -1)
            there[x, t.metric] += 1
            filled = colour if t.state in (FINISHED, STOPPED_EARLY) else "white"
            look: dict[str, Any] = {"marker": marker, "color": colour, "mfc": filled, "ms": 5.5, "alpha": 0.85}
            if t is best:
                look = {"marker": "*", "color": GREEN, "mec": "white", "ms": 14, "zorder": 5}
            axes.plot([x * 10**step if log else x + step], [t.metric or 0.0], **look)
    axes.margins(0.07)
    if few and len(groups) > 1:
        axes.legend()
    if log:
        axes.set_xscale("log")
    if numeric and len(values) <= 6:
        axes.set_xticks(values, [f"{value:.3g}" for value in values])
        axes.set_xticks([], minor=True)
    elif not numeric:
        long, many = sum(map(len, labels)) > 36, len(labels) > 20  # such as the trials of a sweep without settings
        ticks = [] if many else shorten(labels, 24)
        axes.set_xticks(range(len(ticks)), ticks, rotation=25 if long else 0, ha="right" if long else "center")
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.grid(axis="x", visible=False)


def draw_ranking(configurations: Sequence[Configuration], metric: str) -> "Figure":
    """Plot the best configurations: each trial, the mean over seeds, and its 95% confidence interval."""
    shown = [c for c in configurations if c.mean is not None][:MAX_RANKED]
    figure = new_figure(WIDTH, 0.9 + 0.27 * max(len(shown), 2))
    axes = figure.subplots()
    for place, c in enumerate(shown):
        look: dict[str, Any] = {"fmt": "D" if c.ci95 else "o", "color": BLUE if place else GREEN}
        axes.plot(c.metrics, [place] * len(c.metrics), "o", color=look["color"], markersize=3.5, alpha=0.4)
        axes.errorbar(c.mean or 0, place, xerr=c.ci95, markersize=5, capsize=3, **look)
    names = enumerate(shorten([c.name for c in shown], 46), start=1)
    axes.set_yticks(range(len(shown)), [f"{name}  {place}" for place, name in names])
    axes.set_ylim(max(len(shown), 2) - 0.4, -0.6)
    axes.set_xlabel(metric)
    return figure


def draw_curves(configurations: Sequence[Configuration], metric: str) -> "Figure":
    """Plot metric and validation loss by step. The best configurations have colours, the best trial a thick line."""
    measured = [c for c in configurations if c.mean is not None]
    coloured = dict(zip([c.name for c in measured], (GREEN, *LINES[: MAX_COLOURED - 1]), strict=False))
    best = measured[0].trials[0] if measured else None
    figure = new_figure(WIDTH, 3.4 + 0.16 * len(coloured))
    names = list(dict.fromkeys([metric, "eval/loss"]))
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for c in reversed(configurations):
            colour = coloured.get(c.name, GREY)
            usual = (0.7, 0.45) if colour == GREY else (1.2, 0.75)
            for t in c.trials:
                points = [(row["step"], row[name]) for row in t.curve if isfinite(row.get(name, nan))]
                marker = "o" if len(points) < 3 else ""
                width, alpha = (2.4, 1.0) if t is best else usual
                if points:
                    xs, ys = zip(*points, strict=True)
                    axes.plot(xs, ys, color=colour, lw=width, alpha=alpha, marker=marker, markersize=3)
        axes.set(xlabel="step", ylabel=name)
    for name, colour in zip(shorten(list(coloured), 110), coloured.values(), strict=True):
        panels[0].plot([], [], color=colour, lw=2.4 if colour == GREEN else 1.2, label=name)
    if others := len(configurations) - len(coloured):
        panels[0].plot([], [], color=GREY, lw=0.7, label=f"{others} others")
    figure.legend(loc="outside lower left")
    return figure


def draw_importance(found: Importance) -> "Figure":
    """Plot the share of each setting; shares below the threshold are grey."""
    figure = new_figure(WIDTH, 0.9 + 0.3 * max(len(found.shares), 2))
    axes = figure.subplots()
    colours = [BLUE if name in found.significant else GREY for name in found.shares]
    axes.barh(list(found.shares), list(found.shares.values()), color=colours, height=0.6)
    axes.axvline(found.threshold, color=GREY, linestyle="--", linewidth=1.2, label="threshold of chance")
    axes.set(xlabel="share of the importance", xlim=(0, max(1.0, found.threshold * 1.05)))
    axes.set_ylim(max(len(found.shares), 2) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")
    return figure


def draw_times(trials: Sequence[Trial]) -> "Figure":
    """Plot the time and the final state of each trial. Pale: before its first evaluation."""
    timed = sorted((t for t in trials if t.curve), key=lambda t: t.started or 0)
    starts = [(t.started or 0) - (timed[0].started or 0) for t in timed]
    seconds = [t.seconds or 0 for t in timed]
    longest = max(start + length for start, length in zip(starts, seconds, strict=True))
    unit, name = (3600, "hours") if longest >= 7200 else (60, "minutes") if longest >= 120 else (1, "seconds")
    colours = {FINISHED: BLUE, STOPPED_EARLY: SKY, FAILED: VERMILION}
    figure = new_figure(WIDTH, 1.3 + min(0.16 * len(timed), 6.0))
    axes = figure.subplots()
    for place, (t, start, length) in enumerate(zip(timed, starts, seconds, strict=True)):
        axes.barh(place, length / unit, left=start / unit, color=colours.get(t.state, ORANGE), height=0.8)
        first = (t.first_evaluation or 0) / unit
        axes.barh(place, first, left=start / unit, color="white", alpha=0.55, height=0.8)
    for state in dict.fromkeys(t.state for t in timed):
        axes.barh(0, 0, color=colours.get(state, ORANGE), label=state)
    named = timed if len(timed) <= MAX_NAMED else []
    axes.set_yticks(range(len(named)), shorten([t.name for t in named], 40), fontsize=6.5)
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.set_xlabel(f"{name} since the first trial began")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper right", ncols=4)
    return figure


def _text(trial: Trial, name: str) -> str:
    return trial.name if name == TRIAL else format_value(trial.point.get(name))

"""Figures of a sweep."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from umbrella.plots import BLUE, GREY, INK, LINES, ORANGE, SKY, VERMILION, WIDTH, new_figure, truncate
from umbrella.training.progress_log import FINISHED, STOPPED_EARLY
from umbrella.tuning.results import SEED, Configuration, Importance, Trial, is_numeric, ranked_trials, swept_names
from umbrella.tuning.search_space import format_point
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
    low, high = (edge([float(t.metric or 0) for t in shown]) for edge in (min, max))
    space = 0.07 * (high - low) or 0.05
    for i, name in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        having = [t for t in shown if name in t.point or name == TRIAL]
        if is_numeric([t.point.get(name) for t in having]):
            _scatter(axes, having, name, [n for n in names if n != name], shown[0])
        else:
            _strip(axes, having, name, shown[0])
        lacking = len(shown) - len(having)
        axes.set_xlabel(f"{name}\n({lacking} trials without it)" if lacking else name)
        axes.set_ylabel(metric if i % columns == 0 else "")
        axes.set_ylim(low - space, high + space)
    if more := len(names[MAX_PANELS:]):
        figure.supxlabel(f"{more} more swept setting{'s' * (more > 1)}: see ranking.csv", fontsize=9)
    return figure


def _scatter(axes: "Axes", trials: Sequence[Trial], name: str, others: Sequence[str], best: Trial) -> None:
    groups: dict[str, list[Trial]] = {}
    for t in trials:
        groups.setdefault(format_point({n: t.point[n] for n in others if n in t.point}), []).append(t)
    values = sorted({t.point[name] for t in trials})
    few = len(groups) <= len(LINES) and any(len({t.point[name] for t in group}) > 1 for group in groups.values())
    looks = zip(LINES, "os^Dv", sorted(groups.items()), strict=False) if few else [(BLUE, "o", ("", trials))]
    # Limits are set explicitly: automatic limits ignore the offsets of points.
    log = values[0] > 0 and values[-1] / values[0] >= 10
    if log:
        space = (values[-1] / values[0]) ** 0.07
        axes.set(xscale="log", xlim=(values[0] / space, values[-1] * space))
    else:
        space = 0.07 * (values[-1] - values[0]) or 0.5
        axes.set_xlim(values[0] - space, values[-1] + space)
    if len(values) <= (6 if log else 4):
        axes.set_xticks(values, [f"{value:.3g}" for value in values])
        axes.set_xticks([], minor=True)
    there: Counter[tuple[float, float | None]] = Counter()
    for colour, marker, (words, group) in looks:
        if few:
            xs = sorted({t.point[name] for t in group})
            means = [np.mean([t.metric for t in group if t.point[name] == x]) for x in xs]
            axes.plot(xs, means, "-", color=colour, alpha=0.6)
            axes.plot([], [], f"-{marker}", color=colour, label=truncate(words, 40))
        for t in group:
            place = (t.point[name], t.metric)
            # Points at the same position are drawn side by side, with offsets of 0, 4, -4, 8, -8 points.
            offset = (there[place] + 1) // 2 * (4 if there[place] % 2 else -4)
            there[place] += 1
            _point(axes, t, t.point[name], colour, marker, t is best, offset)
    if few and len(groups) > 1:
        axes.legend()


def _strip(axes: "Axes", trials: Sequence[Trial], name: str, best: Trial) -> None:
    """Draw a column of points per value, with a short line at their mean."""
    values = sorted({_text(t, name) for t in trials})
    for place, value in enumerate(values):
        group = [t for t in trials if _text(t, name) == value]
        spread = np.linspace(-0.18, 0.18, len(group)) if len(group) > 1 else [0.0]
        # Shuffled: in the order of the ranking, the points would form a slope.
        for t, offset in zip(group, np.random.default_rng(0).permutation(spread), strict=True):
            _point(axes, t, place + offset, BLUE, "o", t is best)
        if len(group) > 1:
            mean = np.mean([float(t.metric or 0) for t in group])
            axes.hlines(mean, place - 0.3, place + 0.3, color=INK, linewidth=1.2)
    if len(values) > 20:  # for example the trials of a sweep without swept settings
        axes.set_xticks([])
    else:
        long = sum(map(len, values)) > 36
        words = [truncate(value, 24) for value in values]
        axes.set_xticks(range(len(values)), words, rotation=25 if long else 0, ha="right" if long else "center")
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.grid(axis="x", visible=False)


def _point(
    axes: "Axes", trial: Trial, x: float, colour: str, marker: str, best: bool = False, offset: float = 0
) -> None:
    """Draw a trial.

    Args:
        offset: horizontal offset in points (1/72 inch).
    """
    from matplotlib.transforms import ScaledTranslation

    where = axes.transData + ScaledTranslation(offset / 72, 0, axes.figure.dpi_scale_trans)
    filled = colour if trial.state in (FINISHED, STOPPED_EARLY) else "white"
    look: dict[str, Any] = {"marker": marker, "color": colour, "mfc": filled, "ms": 5.5, "alpha": 0.85}
    if best:
        look = {"marker": "*", "color": VERMILION, "mec": "white", "ms": 14, "zorder": 5}
    axes.plot([x], [float(trial.metric or 0)], transform=where, **look)


def draw_ranking(configurations: Sequence[Configuration], metric: str) -> "Figure":
    """Plot the best configurations: each trial, the mean over seeds, and its 95% confidence interval."""
    shown = [c for c in configurations if c.mean is not None][:MAX_RANKED]
    figure = new_figure(WIDTH, 0.9 + 0.27 * max(len(shown), 2))
    axes = figure.subplots()
    for place, c in enumerate(shown):
        colour = VERMILION if place == 0 else BLUE
        if len(c.metrics) > 1:
            axes.plot(c.metrics, [place] * len(c.metrics), "o", color=colour, markersize=3.5, alpha=0.4)
        axes.errorbar(
            c.mean or 0, place, xerr=c.ci95, fmt="D" if c.ci95 else "o", color=colour, markersize=5, capsize=3
        )
    axes.set_yticks(range(len(shown)), [f"{truncate(c.name, 46)}  {place}" for place, c in enumerate(shown, 1)])
    axes.set_ylim(max(len(shown), 2) - 0.4, -0.6)
    axes.set_xlabel(metric)
    return figure


def draw_curves(configurations: Sequence[Configuration], metric: str) -> "Figure":
    """Plot metric and validation loss by step. The best configurations have colours, the best trial a thick line."""
    titles: dict[str, str] = {metric: "metric"} | ({} if metric == "eval/loss" else {"eval/loss": "loss"})
    measured = [c for c in configurations if c.mean is not None]
    coloured = measured[:MAX_COLOURED]
    figure = new_figure(WIDTH, 3.4 + 0.16 * len(coloured))
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, (title, attribute) in zip(panels, titles.items(), strict=True):
        for c in reversed(configurations):
            place = coloured.index(c) if c in coloured else None
            colour = GREY if place is None else (VERMILION, *LINES)[place]
            for t in c.trials:
                points = [(e.step, value) for e in t.curve if (value := getattr(e, attribute)) is not None]
                if not points:
                    continue
                best = bool(measured) and t is measured[0].trials[0]
                width = 2.4 if best else 1.2 if place is not None else 0.7
                alpha = 1.0 if best else 0.75 if place is not None else 0.45
                marker = "o" if len(points) < 3 else ""
                axes.plot(*zip(*points, strict=True), color=colour, lw=width, alpha=alpha, marker=marker, markersize=3)
        axes.set(xlabel="step", ylabel=title)
    for c, colour in zip(coloured, (VERMILION, *LINES), strict=False):
        panels[0].plot([], [], color=colour, lw=2.4 if c is measured[0] else 1.2, label=truncate(c.name, 110))
    if len(measured) > len(coloured) or len(configurations) > len(measured):
        panels[0].plot([], [], color=GREY, lw=0.7, label=f"{len(configurations) - len(coloured)} others")
    figure.legend(loc="outside lower left")
    return figure


def draw_importance(found: Importance) -> "Figure":
    """Plot the share of each setting; shares below the threshold are grey."""
    figure = new_figure(WIDTH, 0.9 + 0.3 * max(len(found.shares), 2))
    axes = figure.subplots()
    colours = [BLUE if name in found.significant else GREY for name in found.shares]
    axes.barh(list(found.shares), list(found.shares.values()), color=colours, height=0.6)
    axes.axvline(found.threshold, color=VERMILION, linestyle="--", linewidth=1.2, label="threshold of chance")
    axes.set(xlabel="share of the importance", xlim=(0, max(1.0, found.threshold * 1.05)))
    axes.set_ylim(max(len(found.shares), 2) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")
    return figure


def draw_times(trials: Sequence[Trial]) -> "Figure":
    """Plot the time and the final state of each trial. Pale: before its first evaluation."""
    timed = sorted((t for t in trials if t.started is not None), key=lambda t: t.started or 0)
    zero = min((t.started or 0 for t in timed), default=0)
    longest = max(((t.started or 0) - zero + (t.seconds or 0) for t in timed), default=0)
    unit, name = next(
        (u, n) for u, n in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if longest >= 2 * u or u == 1
    )
    colours = {FINISHED: BLUE, STOPPED_EARLY: SKY, FAILED: VERMILION}
    figure = new_figure(WIDTH, 1.0 + min(0.16 * len(timed), 6.0) + 0.3)
    axes = figure.subplots()
    for place, t in enumerate(timed):
        colour, start = colours.get(t.state, ORANGE), ((t.started or 0) - zero) / unit
        axes.barh(place, (t.seconds or 0) / unit, left=start, color=colour, height=0.8)
        axes.barh(place, (t.first_evaluation or 0) / unit, left=start, color="white", alpha=0.55, height=0.8)
    for state in dict.fromkeys(t.state for t in timed):
        axes.barh(0, 0, color=colours.get(state, ORANGE), label=state)
    few = len(timed) <= MAX_NAMED
    axes.set_yticks(range(len(timed)) if few else [], [t.trial_id for t in timed] if few else [], fontsize=6.5)
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.set_xlabel(f"{name} since the first trial began")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper right", ncols=4)
    return figure


def _text(trial: Trial, name: str) -> str:
    value = trial.point.get(name)
    return trial.trial_id if name == TRIAL else format_point({"": value}).removeprefix("=")

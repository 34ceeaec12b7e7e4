"""The pictures of a sweep."""

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
"""What stands on the axis where nothing was swept."""
HIGHLIGHTED, RANKED, TIMED, PANELS = 5, 25, 60, 12
"""Contenders with a colour of their own; with a row in the ranking; trials with a row over time; settings drawn."""


def draw_metric(configurations: Sequence[Configuration], metric: str) -> "Figure":
    """The metric against each setting that has two values: a panel for each.

    Filled: trials that came to their end; hollow: stopped before it. A star: the best trial. Where the other settings
    have few combinations, each has a colour and a line through its means.
    """
    shown = [t for t in ranked_trials(configurations) if t.metric is not None and not t.failed]
    names = [name for name in swept_names(shown) if name != SEED and len({_text(t, name) for t in shown}) > 1]
    panels = names[:PANELS] or [TRIAL]
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
    if more := len(names[PANELS:]):
        figure.supxlabel(f"{more} more swept setting{'s' * (more > 1)}: see ranking.csv", fontsize=9)
    return figure


def _scatter(axes: "Axes", trials: Sequence[Trial], name: str, others: Sequence[str], best: Trial) -> None:
    groups: dict[str, list[Trial]] = {}
    for t in trials:
        groups.setdefault(format_point({n: t.point[n] for n in others if n in t.point}), []).append(t)
    values = sorted({t.point[name] for t in trials})
    few = len(groups) <= len(LINES) and any(len({t.point[name] for t in group}) > 1 for group in groups.values())
    looks = zip(LINES, "os^Dv", sorted(groups.items()), strict=False) if few else [(BLUE, "o", ("", trials))]
    # Points that stand aside of their place do not count where matplotlib chooses the limits.
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
            # What lies at the same place lies side by side: 0, 4, -4, 8, -8 points.
            aside = (there[place] + 1) // 2 * (4 if there[place] % 2 else -4)
            there[place] += 1
            _point(axes, t, t.point[name], colour, marker, t is best, aside)
    if few and len(groups) > 1:
        axes.legend()


def _strip(axes: "Axes", trials: Sequence[Trial], name: str, best: Trial) -> None:
    """A column of points per value, a short line at their mean."""
    values = sorted({_text(t, name) for t in trials})
    for place, value in enumerate(values):
        group = [t for t in trials if _text(t, name) == value]
        spread = np.linspace(-0.18, 0.18, len(group)) if len(group) > 1 else [0.0]
        # In the order of the ranking they would form a slope.
        for t, aside in zip(group, np.random.default_rng(0).permutation(spread), strict=True):
            _point(axes, t, place + aside, BLUE, "o", t is best)
        if len(group) > 1:
            mean = np.mean([float(t.metric or 0) for t in group])
            axes.hlines(mean, place - 0.3, place + 0.3, color=INK, linewidth=1.2)
    if len(values) > 20:  # as a sweep without settings has them
        axes.set_xticks([])
    else:
        long = sum(map(len, values)) > 36
        words = [truncate(value, 24) for value in values]
        axes.set_xticks(range(len(values)), words, rotation=25 if long else 0, ha="right" if long else "center")
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.grid(axis="x", visible=False)


def _point(
    axes: "Axes", trial: Trial, x: float, colour: str, marker: str, best: bool = False, aside: float = 0
) -> None:
    """Draw a trial, so many points aside of its place."""
    from matplotlib.transforms import ScaledTranslation

    where = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    filled = colour if trial.state in (FINISHED, STOPPED_EARLY) else "white"
    look: dict[str, Any] = {"marker": marker, "color": colour, "mfc": filled, "ms": 5.5, "alpha": 0.85}
    if best:
        look = {"marker": "*", "color": VERMILION, "mec": "white", "ms": 14, "zorder": 5}
    axes.plot([x], [float(trial.metric or 0)], transform=where, **look)


def draw_ranking(configurations: Sequence[Configuration], metric: str) -> "Figure":
    """The best contenders where there are seeds: each trial a point, the mean, and its 95% interval."""
    shown = [c for c in configurations if c.mean is not None][:RANKED]
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
    """Metric and validation loss by step, of every trial. The best contenders have colours, the winner a thick line."""
    what: dict[str, str] = {metric: "metric"} | ({} if metric == "eval/loss" else {"eval/loss": "loss"})
    metrics = [c for c in configurations if c.mean is not None]
    coloured = metrics[:HIGHLIGHTED]
    figure = new_figure(WIDTH, 3.4 + 0.16 * len(coloured))
    panels = figure.subplots(1, len(what), squeeze=False)[0]
    for axes, (title, attribute) in zip(panels, what.items(), strict=True):
        for c in reversed(configurations):
            place = coloured.index(c) if c in coloured else None
            colour = GREY if place is None else (VERMILION, *LINES)[place]
            for t in c.trials:
                points = [(e.step, value) for e in t.curve if (value := getattr(e, attribute)) is not None]
                if not points:
                    continue
                best = bool(metrics) and t is metrics[0].trials[0]
                width = 2.4 if best else 1.2 if place is not None else 0.7
                alpha = 1.0 if best else 0.75 if place is not None else 0.45
                marker = "o" if len(points) < 3 else ""
                axes.plot(*zip(*points, strict=True), color=colour, lw=width, alpha=alpha, marker=marker, markersize=3)
        axes.set(xlabel="step", ylabel=title)
    for c, colour in zip(coloured, (VERMILION, *LINES), strict=False):
        panels[0].plot([], [], color=colour, lw=2.4 if c is metrics[0] else 1.2, label=truncate(c.name, 110))
    if len(metrics) > len(coloured) or len(configurations) > len(metrics):
        panels[0].plot([], [], color=GREY, lw=0.7, label=f"{len(configurations) - len(coloured)} others")
    figure.legend(loc="outside lower left")
    return figure


def draw_importance(found: Importance) -> "Figure":
    """Each setting's share; grey where chance gives as much."""
    figure = new_figure(WIDTH, 0.9 + 0.3 * max(len(found.shares), 2))
    axes = figure.subplots()
    colours = [BLUE if name in found.significant else GREY for name in found.shares]
    axes.barh(list(found.shares), list(found.shares.values()), color=colours, height=0.6)
    axes.axvline(found.threshold, color=VERMILION, linestyle="--", linewidth=1.2, label="what chance may give")
    axes.set(xlabel="share of the importance", xlim=(0, max(1.0, found.threshold * 1.05)))
    axes.set_ylim(max(len(found.shares), 2) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")
    return figure


def draw_times(trials: Sequence[Trial]) -> "Figure":
    """When each trial ran, and how it ended. Pale: before its first evaluation."""
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
    few = len(timed) <= TIMED
    axes.set_yticks(range(len(timed)) if few else [], [t.trial_id for t in timed] if few else [], fontsize=6.5)
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.set_xlabel(f"{name} since the first trial began")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper right", ncols=4)
    return figure


def _text(trial: Trial, name: str) -> str:
    value = trial.point.get(name)
    return trial.trial_id if name == TRIAL else format_point({"": value}).removeprefix("=")

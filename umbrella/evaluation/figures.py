"""Figures of an evaluation: controls, confusion matrices, ROC curves, calibration, scatter plots."""

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from umbrella.evaluation.group_metrics import Estimate
from umbrella.evaluation.metrics import BINS, calibration_bins
from umbrella.evaluation.predictions import Prediction, mean_over_subjects, most_likely
from umbrella.plots import BLUE, GREY, INK, LINES, SKY, SOFT, WIDTH, new_figure, truncate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT_BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
"""Background of text that lines may cross."""
MAX_CURVES = len(LINES)
"""Largest number of ROC curves."""


def draw_controls(
    rows: Sequence[tuple[str, Estimate, str]], name: str, lines: Sequence[tuple[str, float]], own: int = 1
) -> "Figure":
    """Draw a metric under all conditions, with intervals, and its references as lines.

    Args:
        rows: (condition, estimate, formatted value).
        name: of the metric.
        lines: (name, value) of references.
        own: number of the first rows that are no controls.
    """
    figure = new_figure(0.56 * WIDTH, 0.75 + 0.34 * len(rows) + 0.2 * bool(lines))
    axes = figure.subplots()
    for row, (_, (value, low, high), text) in enumerate(rows):
        colour = BLUE if row < own else SOFT
        if isfinite(low) and isfinite(high):
            axes.plot([low, high], [row, row], "-|", color=colour, linewidth=1.6, markersize=7)
        axes.plot([value], [row], "o", color=colour, markersize=7)
        if isfinite(value):
            options: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes.annotate(text, (value, row), (0, 7), bbox=TEXT_BACKGROUND, **options)
    for style, (label, at) in zip(("--", ":", "-."), lines, strict=False):
        axes.axvline(at, color=SOFT, linestyle=style, linewidth=1.2, label=label)
    axes.set_yticks(range(len(rows)), [condition for condition, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    if name.startswith("MAE"):
        axes.set_xlim(left=0)
    else:
        axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel(name)
    axes.grid(axis="y", visible=False)
    if lines:
        figure.legend(loc="outside lower center", ncols=len(lines))
    return figure


def draw_confusion(matrices: Sequence[tuple[str, list[list[int]]]], classes: Sequence[str]) -> "Figure":
    """Draw a confusion matrix for each (title, counts): rows are true, columns predicted classes, the last one none.

    Colours show shares of the true class, so that rare classes are visible.
    """
    words = [truncate(name, 14) for name in classes]
    columns = min(len(matrices), 4 if len(classes) < 3 and max(map(len, words)) < 10 else 2)
    rows = -(-len(matrices) // columns)
    figure = new_figure(WIDTH if columns > 1 else 0.56 * WIDTH, rows * (1.1 + 0.4 * len(classes)))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, (axes, (title, counts)) in enumerate(zip(panels, matrices, strict=False)):
        array = np.array(counts, float)
        share = array / np.maximum(array.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), count in np.ndenumerate(array):
            dark = share[row, column] > 0.55
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color="white" if dark else INK, fontsize=9)
        axes.set_xticks(range(len(words) + 1), [*words, "none"])
        if max(map(len, words)) * len(words) > 30:
            for word in axes.get_xticklabels():
                word.set(rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(words)), words)
        axes.axvline(len(words) - 0.5, color="white", linewidth=3)
        axes.set(xlabel="predicted", ylabel="" if i % columns else "true")
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(visible=False)
        axes.tick_params(length=0)
    for axes in panels[len(matrices) :]:
        axes.set_axis_off()
    return figure


def draw_likelihood(predictions: Sequence[Prediction], classes: Sequence[str]) -> "Figure":
    """Draw ROC curves and a reliability diagram of class probabilities, over subjects; over conversations pale.

    With two classes, the one that sorts last is positive; with more, each one is compared with the rest. The
    reliability diagram shows the accuracy of the most likely class against its probability, in ten bins of equal width
    (C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
    """
    figure = new_figure(WIDTH, 4.0)
    roc, reliability = figure.subplots(1, 2)
    conversations = [p for p in predictions if p.probabilities]
    subjects = mean_over_subjects(conversations)
    _draw_roc(roc, conversations, subjects, classes)
    for rows, colour, level in ((conversations, SKY, "conversations"), (subjects, BLUE, "subjects")):
        _draw_reliability(reliability, rows, colour, level)
    reliability.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
    reliability.set(xlim=(1 / max(len(classes), 2) - 0.04, 1.04), ylim=(-0.08, 1.08))
    reliability.set(xlabel="probability of the most likely class", ylabel="accuracy")
    reliability.set_title("Calibration; numbers: subjects in the bin", loc="left")
    reliability.legend(loc="lower right")
    return figure


def _draw_roc(
    axes: "Axes", conversations: Sequence[Prediction], subjects: Sequence[Prediction], classes: Sequence[str]
) -> None:
    from sklearn.metrics import auc, roc_curve

    shown = [classes[-1]] if len(classes) == 2 else list(classes)[:MAX_CURVES]
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
    for label, colour in zip(shown, LINES, strict=False):
        for rows, alpha in ((conversations, 0.3), (subjects, 1.0)):
            truth = [p.label == label for p in rows]
            if len(set(truth)) < 2:
                continue  # undefined
            # All thresholds: without those on a straight line, the steps of small samples would be lost.
            wrong, right, _ = roc_curve(truth, [p.probabilities.get(label, 0.0) for p in rows], drop_intermediate=False)
            words = f"{truncate(label, 24)}: area {auc(wrong, right):.3g}" if rows is subjects else None
            axes.plot(wrong, right, color=colour, alpha=alpha, linewidth=1.8, label=words)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set(xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)")
    axes.set_title("ROC" if len(classes) <= MAX_CURVES else f"ROC of the first {MAX_CURVES} classes", loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")


def _draw_reliability(axes: "Axes", predictions: Sequence[Prediction], colour: str, level: str) -> None:
    best = np.array([max(p.probabilities.values()) for p in predictions])
    correct = np.array([most_likely(p.probabilities) == p.label for p in predictions])  # a tie is no answer
    bins = [members for members in calibration_bins(best) == np.arange(BINS)[:, None] if members.any()]
    xs, ys, counts = zip(*((best[b].mean(), correct[b].mean(), b.sum()) for b in bins), strict=True)
    axes.plot(xs, ys, "-", color=colour, linewidth=1.2, label=level)
    axes.scatter(xs, ys, s=20 + 220 * np.array(counts) / len(best), color=colour, alpha=0.85)
    for x, y, count in zip(xs, ys, counts, strict=True) if level == "subjects" else ():
        offset, align = (-8, "top") if y > 0.5 else (8, "bottom")
        axes.annotate(f"{count}", (x, y), (0, offset), textcoords="offset points", ha="center", va=align, fontsize=8)


def draw_coverage(coverage: Sequence[float], accuracy: Sequence[float]) -> "Figure":
    """Draw the accuracy of the most certain answers against their share; see ``calibration.Calibration``."""
    figure = new_figure(0.56 * WIDTH, 3.0)
    axes = figure.subplots()
    axes.axhline(accuracy[-1], color=GREY, linestyle="--", linewidth=1)
    axes.plot(coverage, accuracy, "-o", color=BLUE, linewidth=1.6, markersize=3.5, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(min(0.5, *accuracy) - 0.03, 1.03))
    axes.set(xlabel="coverage: share that is answered", ylabel="accuracy")
    return figure


def draw_scatter(predictions: Sequence[Prediction], target: str) -> "Figure":
    """Draw predicted against true numbers; pale: conversations, dark: subjects. The dashed line shows no error.

    The prediction is the median of the distribution, with its 90% interval, or else the generated number.
    """
    figure = new_figure(0.56 * WIDTH, 4.4)
    axes = figure.subplots()
    conversations = [p for p in predictions if p.answer is not None]
    for rows, colour, alpha, size, level in (
        (conversations, SKY, 0.6, 14, "conversations"),
        (mean_over_subjects(conversations), BLUE, 0.9, 26, "subjects"),
    ):
        true, predicted = np.array([(p.label, p.answer) for p in rows], float).T
        axes.scatter(true, predicted, s=size, color=colour, alpha=alpha, label=level)
        for p in rows if level == "subjects" else ():
            if p.numbers:
                axes.plot([float(p.label or 0)] * 2, p.number_interval, color=colour, alpha=0.25, linewidth=1)
    ends = [p.number_interval if p.numbers else (p.answer, p.answer) for p in conversations]
    values = np.array([(p.label, *of_one) for p, of_one in zip(conversations, ends, strict=True)], float)
    low, high = float(values.min()), float(values.max())
    space = 0.05 * (high - low) or 1
    axes.plot([low - space, high + space], [low - space, high + space], "--", color=GREY, linewidth=1)
    axes.set(xlim=(low - space, high + space), ylim=(low - space, high + space))
    axes.set(xlabel=f"true {truncate(target, 40)}", ylabel="predicted", aspect="equal")
    axes.legend(loc="upper left")
    return figure

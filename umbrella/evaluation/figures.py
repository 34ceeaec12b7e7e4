"""The pictures of an evaluation: controls, confusion, ROC, calibration, scatter."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from umbrella.evaluation.metrics import BINS
from umbrella.evaluation.predictions import Answer, Prediction, mean_number, mean_probability, most_likely
from umbrella.evaluation.subgroups import Estimate
from umbrella.plots import BLUE, GREY, INK, LINES, SKY, SOFT, VERMILION, WIDTH, new_figure, truncate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
"""Behind words that lines may cross."""
CURVES = len(LINES)
"""Classes with a ROC curve of their own."""


def of_subjects(predictions: Sequence[Prediction]) -> list[Prediction]:
    """One for each subject and label, put together as in tables (``evaluation.subjects``); else as its first one."""
    known = [(p, (p.subject_id, p.label)) for p in predictions if p.label is not None]
    likely = mean_probability(Answer(*who, None, p.probabilities) for p, who in known if p.probabilities)
    numbers = mean_number(Answer(*who, p.said) for p, who in known if isinstance(p.said, int | float))
    mean = {(answer.subject, answer.truth): answer.probabilities for answer in likely}
    said = {(answer.subject, answer.truth): answer.said for answer in numbers}
    first = {who: p for p, who in reversed(known)}
    return [
        replace(first[who], probabilities=mean.get(who, {}), said=said.get(who))
        for who in dict.fromkeys(who for _, who in known)
    ]


def draw_controls(rows: Sequence[tuple[str, Estimate, str]], name: str, lines: Sequence[tuple[str, float]]) -> "Figure":
    """A metric as asked and under its controls, with intervals, and lines where one comes without looking.

    Args:
        rows: (condition, estimate, the same in words), the questions as asked first.
        name: of the metric.
        lines: (what it is, where).
    """
    figure = new_figure(0.56 * WIDTH, 0.75 + 0.34 * len(rows) + 0.2 * bool(lines))
    axes = figure.subplots()
    for place, (_, (value, low, high), words) in enumerate(rows):
        colour = VERMILION if place == 0 else BLUE
        if isfinite(low) and isfinite(high):
            axes.plot([low, high], [place, place], "-|", color=colour, linewidth=1.6, markersize=7)
        axes.plot([value], [place], "o", color=colour, markersize=7)
        if isfinite(value):
            aside: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "bbox": PLAIN}
            axes.annotate(words, (value, place), (0, 7), **aside)
    for style, (what, where) in zip(("--", ":", "-."), lines, strict=False):
        axes.axvline(where, color=SOFT, linestyle=style, linewidth=1.2, label=what)
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
    """A matrix for each (title, counts): true classes downwards, said ones to the right, the last for none of them.

    Colours are shares of the true class, so that a frequent class does not outshine a rare one.
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
        axes.set(xlabel="said", ylabel="" if i % columns else "true")
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(visible=False)
        axes.tick_params(length=0)
    for axes in panels[len(matrices) :]:
        axes.set_axis_off()
    return figure


def draw_likelihood(predictions: Sequence[Prediction], classes: Sequence[str]) -> "Figure":
    """ROC curves and a reliability diagram of the probabilities of classes, over subjects; over conversations pale.

    With two classes the one that sorts last is the positive one; with more each stands against the others. Reliability:
    how often the likeliest class is right, against its probability, in ten bins of equal width (C. Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017).
    """
    figure = new_figure(WIDTH, 4.0)
    roc, calibration = figure.subplots(1, 2)
    likely = [p for p in predictions if p.probabilities]
    _draw_roc(roc, likely, classes)
    _draw_reliability(calibration, likely, classes)
    return figure


def _draw_roc(axes: "Axes", predictions: Sequence[Prediction], classes: Sequence[str]) -> None:
    from sklearn.metrics import auc, roc_curve

    subjects = of_subjects(predictions)
    shown = [classes[-1]] if len(classes) == 2 else list(classes)[:CURVES]
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
    for label, colour in zip(shown, LINES, strict=False):
        for rows, alpha in ((predictions, 0.3), (subjects, 1.0)):
            truth = [p.label == label for p in rows]
            if len(set(truth)) < 2:
                continue  # nothing to tell apart
            # Every threshold: those on a straight line are where small samples have their steps.
            wrong, right, _ = roc_curve(truth, [p.probabilities.get(label, 0.0) for p in rows], drop_intermediate=False)
            words = f"{truncate(label, 24)}: area {auc(wrong, right):.3g}" if rows is subjects else None
            axes.plot(wrong, right, color=colour, alpha=alpha, linewidth=1.8, label=words)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set(xlabel="others taken for it (1 - specificity)", ylabel="found (sensitivity)")
    axes.set_title("ROC" if len(classes) <= CURVES else f"ROC of the first {CURVES} classes", loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")


def _draw_reliability(axes: "Axes", predictions: Sequence[Prediction], classes: Sequence[str]) -> None:
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
    for rows, colour, words in ((predictions, SKY, "conversations"), (of_subjects(predictions), BLUE, "subjects")):
        sure = np.array([max(p.probabilities.values()) for p in rows])
        right = np.array([most_likely(p.probabilities) == p.label for p in rows])  # a tie is no answer
        place = np.minimum((sure * BINS).astype(int), BINS - 1)
        bins = [place == i for i in range(BINS) if (place == i).any()]
        xs, ys = [sure[b].mean() for b in bins], [right[b].mean() for b in bins]
        counts = [int(b.sum()) for b in bins]
        axes.plot(xs, ys, "-", color=colour, linewidth=1.2, label=words)
        axes.scatter(xs, ys, s=[20 + 220 * n / len(rows) for n in counts], color=colour, alpha=0.85)
        for x, y, n in zip(xs, ys, counts, strict=True) if words == "subjects" else ():
            place_of, align = (-8, "top") if y > 0.5 else (8, "bottom")
            axes.annotate(f"{n}", (x, y), (0, place_of), textcoords="offset points", ha="center", va=align, fontsize=8)
    axes.set(xlim=(1 / max(len(classes), 2) - 0.04, 1.04), ylim=(-0.08, 1.08))
    axes.set(xlabel="probability of the likeliest class", ylabel="how often it is right")
    axes.set_title("Calibration; numbers: subjects in the bin", loc="left")
    axes.legend(loc="lower right")


def draw_scatter(predictions: Sequence[Prediction], target: str) -> "Figure":
    """What was said against the truth; pale: conversations, dark: means of subjects. The line is that of no error."""
    figure = new_figure(0.56 * WIDTH, 4.4)
    axes = figure.subplots()
    values: list[float] = []
    for rows, colour, alpha, size, words in (
        (predictions, SKY, 0.6, 14, "conversations"),
        (of_subjects(predictions), BLUE, 0.9, 26, "subjects"),
    ):
        pairs = [(float(p.label), float(p.said)) for p in rows if p.said is not None and p.label is not None]
        truth, said = zip(*pairs, strict=True) if pairs else ((), ())
        axes.scatter(truth, said, s=size, color=colour, alpha=alpha, label=words)
        values += [x for pair in pairs for x in pair]
    if values:
        low, high = min(values), max(values)
        space = 0.05 * (high - low) or 1
        axes.plot([low - space, high + space], [low - space, high + space], "--", color=GREY, linewidth=1)
        axes.set(xlim=(low - space, high + space), ylim=(low - space, high + space))
    axes.set(xlabel=f"true {truncate(target, 40)}", ylabel="said", aspect="equal")
    axes.legend(loc="upper left")
    return figure

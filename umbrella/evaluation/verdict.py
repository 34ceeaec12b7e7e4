"""The result of a target in words: names and values of metrics, and a sentence about what it shows."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, isnan
from typing import Any

import numpy as np

from umbrella.evaluation.controls import CONDITION_NAMES
from umbrella.evaluation.group_metrics import MAIN_REFERENCE, Estimate, Group, main_metrics
from umbrella.evaluation.image_use import ImageUse
from umbrella.evaluation.predictions import Prediction

METRIC_NAMES = {"mae": "MAE", "rmse": "RMSE", "r2": "R²", "auc": "ROC area", "brier": "Brier score", "f1": "F1 (macro)"}
METRIC_NAMES |= {"mae_of_mean": "MAE of the mean", "nll": "negative log likelihood"}
METRIC_NAMES |= {"interval_coverage": "coverage of 90% intervals", "interval_width": "width of 90% intervals"}
METRIC_NAMES |= {"token_f1": "token F1", "rouge_l": "ROUGE-L", "exact": "exact match", "pearson": "Pearson r"}
SMALLER_IS_BETTER = ("mae", "rmse", "brier", "calibration_error")
CONSTANT = 0.1
"""Numbers that differ by no more than this share of the standard deviation of the labels are one answer."""


def format_value(number: float | None) -> str:
    """Format a metric: three decimals up to 1, else three significant digits; – where it is undefined."""
    if number is None or not isfinite(number):
        return "–"
    return f"{number:.3f}" if abs(number) <= 1 else f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def format_interval(estimate: Estimate) -> str:
    """Format an interval: ``0.71 to 0.92``; empty where it is undefined."""
    known = isfinite(estimate.low) and isfinite(estimate.high)
    return f"{format_value(estimate.low)} to {format_value(estimate.high)}" if known else ""


def format_estimate(estimate: Estimate) -> str:
    """Format a metric with its interval: ``0.812 (0.71 to 0.92)``; without it where that is undefined."""
    interval = format_interval(estimate)
    return format_value(estimate.value) + (f" ({interval})" if interval else "")


def metric_name(metric: str) -> str:
    """The name of a metric for people: ``recall of male``."""
    name, _, label = metric.partition("/")
    return METRIC_NAMES.get(name, name.replace("_", " ")) + (f" of {label}" if label else "")


def is_better_than_chance(group: Group, estimate: Estimate | None = None) -> bool | None:
    """Whether the interval of a main metric excludes chance or, for numbers, the error of always saying the mean.

    Args:
        estimate: None: that of the group.

    Returns:
        None if the kind of target has no such reference.
    """
    reference, names = group.references.get(MAIN_REFERENCE[group.kind]), main_metrics(group)
    if reference is None:
        return None
    if estimate is None:
        if not names:
            return False
        estimate = group.metrics[names[0]]
    return bool(estimate.high < reference if group.kind == "numbers" else estimate.low > reference)


def constant_answer(predictions: Iterable[Prediction]) -> str | None:
    """The only answer that is ever given, if there are several labels."""
    answers, labels = zip(*((p.answer, p.label) for p in predictions), strict=True)
    if len(set(labels)) > 1 and len(set(answers)) == 1:
        return None if answers[0] is None else f"{answers[0]:.3g}" if isinstance(answers[0], float) else str(answers[0])
    numbers = [answer for answer in answers if isinstance(answer, int | float)]
    if (
        numbers
        and all(isinstance(label, int | float) for label in labels)
        and np.ptp(numbers) <= CONSTANT * np.std(labels)
    ):
        return f"about {np.mean(numbers):.3g}"
    return None


def make_verdict(
    group: Group,
    controls: Mapping[str, Group],
    predictions: Sequence[Prediction],
    image_use: ImageUse | None,
    confounds: Any,
    comparisons: Iterable[Any],
    confidence: float,
) -> str:
    """Say in one sentence whether a target is predicted, and from what.

    Args:
        group: all predictions of the target, under the condition "as_asked"; ``controls``: condition to that group.
        predictions: those of the group.
        confounds: its ``ConfoundAnalysis``, or None.
        comparisons: its ``ModelComparison``s; one is significant if its adjusted p value is at most 1 - confidence.
    """
    better = is_better_than_chance(group)
    level = "always saying the mean" if group.kind == "numbers" else "chance"
    first = "there is no chance level for texts" if better is None else f"{'' if better else 'not '}better than {level}"
    if (constant := constant_answer(predictions)) is not None:
        first += f", as the model always answers {constant}"
    clauses = [first, *_compare(comparisons, 1 - confidence)]
    if better:
        clauses += [*_use_of_images(controls, image_use, level), _effect_of_confounds(group, confounds, level)]
    return "; ".join(clauses) + "."


def _compare(comparisons: Iterable[Any], significance: float) -> list[str]:
    clauses, baseline = [], False
    for one in comparisons:
        gain = one.difference.value * (-1 if one.metric.split("/")[-1] in SMALLER_IS_BETTER else 1)
        word = "not different from" if one.p_adjusted > significance else f"{'better' if gain > 0 else 'worse'} than"
        clauses.append(f"{'cannot be compared with' if isnan(one.p_adjusted) else word} {one.other}")
        baseline |= "baseline" in one.other
    return clauses if baseline else [*clauses, "not compared with the baseline"]


def _use_of_images(controls: Mapping[str, Group], use: ImageUse | None, level: str) -> list[str]:
    clauses = []
    if use and isfinite(use.without_image.value):
        value, low, high = (f"{100 * share:.0f}%" for share in use.without_image)
        clauses.append(f"{value} of the right answers do not need the image ({low} to {high})")
    kept = [CONDITION_NAMES[name] for name, group in controls.items() if is_better_than_chance(group)]
    if kept:
        clauses.append(f"it is better than {level} also with {' and with '.join(kept)}")
    elif controls:
        clauses.append(f"without the subject's own volumes it is not better than {level}")
    return clauses or ["no control shows whether it needs the image"]


def _effect_of_confounds(group: Group, confounds: Any, level: str) -> str:
    if confounds is None:
        return "confounds were not tested"
    names = ", ".join(confounds.names)
    if isnan(confounds.partial.value) and confounds.subjects < 2 * confounds.coefficients:
        return f"too few subjects to test whether {names} explain it"
    if not confounds.partial.low > 0:
        return f"{names} may explain it: given these, answer and label are not associated"
    clauses = []
    for name, (subjects, found) in confounds.matched.items():
        if isnan(found.low):
            number = "too few" if subjects else "no"
            clauses.append(f"{number} subjects of different classes have an equal {name}")
        elif not is_better_than_chance(group, found):
            values = f"{format_value(found.value)}, {format_interval(found)}"
            clauses.append(f"on the {subjects} subjects matched for {name} it is not better than {level} ({values})")
    return "; ".join([f"{names} do not explain all of it", *clauses])

"""The parts of an evaluation's predictions that are counted on their own: by task, by comparison, by site or age."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import inf, isfinite
from typing import Any

from umbrella.evaluation.prediction import Prediction
from umbrella.evaluation.settings import EvaluateSettings


def parts(predictions: Sequence[Prediction], settings: EvaluateSettings) -> Iterator[tuple[str, str, list[Prediction]]]:
    """(by, value, predictions) as ``tables.Group`` has them, for predictions of one target; no part is empty.

    First all; then each task type, and each ``metadata.task``, where there are several; comparisons with a reference
    of the same label and of a different one; and ``settings.breakdown``, but for the target itself.
    """
    target = predictions[0].target
    yield "all", "", list(predictions)
    several: tuple[tuple[str, Callable[[Prediction], Any]], ...] = (
        ("task_type", lambda p: p.task_type),
        ("task", lambda p: p.metadata.get("task") and str(p.metadata["task"])),
    )
    for by, value_of in several:
        found = list(_split(predictions, value_of, settings))
        if len(found) > 1:
            yield from ((by, value, part) for value, part in found)
    for value, part in reversed(list(_split(predictions, compared_with, settings))):
        yield "comparison_type", value, part
    for key in settings.breakdown:
        if key not in (target, "task", "comparison_type"):
            for value, part in _split(predictions, lambda p, key=key: p.metadata.get(key), settings):  # type: ignore[misc]
                yield key, value, part


def compared_with(prediction: Prediction) -> str | None:
    """ "same" or "different": the label of the reference that the conversation compares with; None: there is none.

    What ``metadata.comparison_type`` says counts before what the two labels say: it may mean another label than the
    target's, as in ages that are compared within one sex.
    """
    written = str(prediction.metadata.get("comparison_type") or "").removesuffix("_sex")
    if written in ("same", "different"):
        return written
    reference = prediction.metadata.get("reference_label")
    if reference is None or not isinstance(prediction.label, str):
        return None
    return "same" if str(reference) == prediction.label else "different"


def _split(
    predictions: Sequence[Prediction], value_of: Callable[[Prediction], Any], settings: EvaluateSettings
) -> Iterator[tuple[str, list[Prediction]]]:
    """Predictions by value: bands of numbers from low to high, then texts in alphabetical order."""
    found: dict[tuple[int, str], list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        value = value_of(prediction)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if isfinite(value):
                found[_band(value, sorted(settings.bands))].append(prediction)
        elif value is not None and value != "":
            found[len(settings.bands) + 1, str(value)].append(prediction)
    return ((name, part) for (_, name), part in sorted(found.items(), key=lambda item: item[0]))


def band_names(bands: Sequence[float]) -> set[str]:
    """What the parts are called that numbers are cut into."""
    return {_band(number, sorted(bands))[1] for number in (-inf, *bands)}


def _band(number: float, bands: Sequence[float]) -> tuple[int, str]:
    """(position, name) of the band that a number is in; a number on a border is in the upper one."""
    position = sum(border <= number for border in bands)
    if not bands:
        return 0, "all numbers"
    if position == 0:
        return 0, f"below {bands[0]:g}"
    if position == len(bands):
        return position, f"{bands[-1]:g} and above"
    return position, f"{bands[position - 1]:g} to {bands[position]:g}"

"""Split the predictions of one target into subgroups."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any

from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.settings import EvaluateSettings


def split_subgroups(
    predictions: Sequence[Prediction], settings: EvaluateSettings
) -> Iterator[tuple[str, str, list[Prediction]]]:
    """Split the predictions of one target; yields (by, value, predictions), see ``Group``. No subgroup is empty.

    First all predictions; then each task type and each ``metadata.task``, if there are several; comparisons with a
    reference of the same label and of another label; and the keys of ``settings.breakdown`` except the target itself.
    """
    keys: dict[str, Callable[[Prediction], Any]] = {
        "task_type": lambda p: p.task_type,
        "task": lambda p: str(p.metadata.get("task") or ""),
        "comparison_type": _comparison_type,
    }
    for key in settings.breakdown:
        if key != predictions[0].target:
            keys.setdefault(key, lambda p, key=key: p.metadata.get(key))  # type: ignore[misc]
    yield "all", "", list(predictions)
    for by, value_of in keys.items():
        found: dict[tuple[int, str], list[Prediction]] = defaultdict(list)
        for prediction in predictions:
            position, value = _position(value_of(prediction), settings.bands)
            if value:
                found[position, value].append(prediction)
        subgroups = [(by, value, members) for (_, value), members in sorted(found.items(), key=lambda item: item[0])]
        if by == "comparison_type":
            subgroups.reverse()
        if len(subgroups) > 1 or by not in ("task_type", "task"):
            yield from subgroups


def band_names(bands: Sequence[float]) -> list[str]:
    """The names of the bands of numbers, from low to high."""
    edges = sorted(bands)
    if not edges:
        return ["all numbers"]
    between = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return [f"below {edges[0]:g}", *between, f"{edges[-1]:g} and above"]


def _position(value: Any, bands: Sequence[float]) -> tuple[int, str]:
    """The position among subgroups and the name: bands of numbers from low to high, then texts; empty for none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        band = sum(edge <= value for edge in bands)  # an edge belongs to the upper band
        return band, band_names(bands)[band] if isfinite(value) else ""
    return len(bands) + 1, "" if value is None else str(value)


def _comparison_type(prediction: Prediction) -> str | None:
    """Whether the reference of a comparison has the "same" or a "different" label; None without a reference.

    ``metadata.comparison_type`` takes precedence over the labels, because it may refer to another label than that of
    the target, for example when ages are compared within one sex.
    """
    written = str(prediction.metadata.get("comparison_type") or "").removesuffix("_sex")
    if written in ("same", "different"):
        return written
    reference = prediction.metadata.get("reference_label")
    if reference is None or not isinstance(prediction.label, str):
        return None
    return "same" if str(reference) == prediction.label else "different"

"""The groups of an evaluation: the metrics of one target, over all of its predictions and over subgroups."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, Literal

from umbrella.evaluation.bootstrap import Estimate, estimate
from umbrella.evaluation.group_metrics import (
    distinct_labels,
    group_class_metrics,
    group_number_metrics,
    group_text_metrics,
)
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.settings import EvaluateSettings

Kind = Literal["classes", "numbers", "texts"]


@dataclass(frozen=True)
class Group:
    """The metrics of a group of predictions of one target.

    ``metrics`` are named ``<way>/<level>/<metric>``.

    - Way: likelihood (of the candidates) or generated (found in the generated text).
    - Level: conversations; subjects (by the mean probability, number or score over the conversations of a subject);
      votes (the majority of the valid answers of a subject; a tie is no answer, and so wrong). A subject whose label
      differs between conversations counts once per label.
    - Metrics of classes: accuracy, balanced_accuracy, f1 (macro), recall/<class>, precision/<class>; with two classes
      also sensitivity and specificity, where the class that sorts last is positive; by likelihood (no votes) also auc,
      brier and calibration_error; of conversations with a reference also copies_reference: the share of answers that
      are the label of the reference, right or wrong.
    - Metrics of numbers (generated only, no votes): mae, rmse, r2, pearson.
    - Metrics of texts (generated only, no votes): token_f1, rouge_l, exact.
    """

    target: str
    kind: Kind
    by: str
    """The key of the breakdown: "all"; "task_type"; "task"; "comparison_type"; or a key of metadata."""
    value: str
    """The value of that key, such as "T3"; empty for "all"."""
    conversations: int
    subjects: int
    classes: tuple[str, ...]
    """Labels in order; empty for numbers and texts."""
    invalid: int | None
    """Generated answers without a label or number; None: nothing was generated. Invalid classes count as wrong; invalid
    numbers are left out of all metrics."""
    ties: Mapping[str, int]
    """Way to the number of subjects whose vote is a tie."""
    metrics: Mapping[str, Estimate]
    references: Mapping[str, float]
    """Values that need no images. Classes: ``chance`` (balanced accuracy) and ``majority`` (accuracy, over subjects, of
    the most frequent training label). Numbers: ``mean/mae`` and ``mean/rmse`` (over subjects, of the mean training
    label). ``copies_reference``: the value of that metric for a model that is always right."""
    confusion: Mapping[str, list[list[int]]] = field(default_factory=dict)
    """``<way>/<level>`` to counts: a row per true class, a column per predicted class and a last one for none."""


def tabulate(
    predictions: Iterable[Prediction],
    settings: EvaluateSettings,
    seed: int = 0,
    training: Mapping[str, Sequence[str | float]] | None = None,
) -> list[Group]:
    """Compute the groups of all targets, in the order of their names and of ``split_subgroups``.

    Args:
        seed: of the bootstrap.
        training: target to the labels of the training data, for ``Group.references``. Without them, the labels of the
            predictions are used.
    """
    targets: dict[tuple[str, Kind], list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        targets[prediction.target, _kind(prediction)].append(prediction)
    groups = []
    for (target, kind), of_target in sorted(targets.items()):
        given = [label for label in (training or {}).get(target, ()) if isinstance(label, str) == (kind == "classes")]
        labels = given or distinct_labels(of_target)
        classes = _classes(of_target, labels) if kind == "classes" else ()
        for by, value, members in split_subgroups(of_target, settings):
            index = {subject: i for i, subject in enumerate(dict.fromkeys(p.subject_id for p in members))}
            if kind == "classes":
                metrics = group_class_metrics(members, classes, labels, index)
            elif kind == "numbers":
                metrics = group_number_metrics(members, labels, index)
            else:
                metrics = group_text_metrics(members, index)
            group = Group(
                target=target,
                kind=kind,
                by=by,
                value=value,
                conversations=len(members),
                subjects=len(index),
                classes=classes,
                invalid=metrics.invalid,
                ties=metrics.ties,
                metrics=estimate(metrics.compute, len(index), settings, seed),
                references=metrics.references,
                confusion=metrics.confusion,
            )
            groups.append(group)
    return groups


def split_subgroups(
    predictions: Sequence[Prediction], settings: EvaluateSettings
) -> Iterator[tuple[str, str, list[Prediction]]]:
    """Split the predictions of one target; yields (by, value, predictions), see ``Group``. No subgroup is empty.

    First all predictions; then each task type and each ``metadata.task``, if there are several; comparisons with a
    reference of the same label and of another label; and the keys of ``settings.breakdown`` except the target itself.
    """
    target = predictions[0].target
    yield "all", "", list(predictions)
    tasks: tuple[tuple[str, Callable[[Prediction], Any]], ...] = (
        ("task_type", lambda p: p.task_type),
        ("task", lambda p: p.metadata.get("task") and str(p.metadata["task"])),
    )
    for by, value_of in tasks:
        found = list(_split(predictions, value_of, settings))
        if len(found) > 1:
            yield from ((by, value, members) for value, members in found)
    for value, members in reversed(list(_split(predictions, _comparison_type, settings))):
        yield "comparison_type", value, members
    for key in settings.breakdown:
        if key not in (target, "task", "comparison_type"):
            for value, members in _split(predictions, lambda p, key=key: p.metadata.get(key), settings):  # type: ignore[misc]
                yield key, value, members


def band_names(bands: Sequence[float]) -> set[str]:
    """The values of subgroups of numbers."""
    return {_band(number, sorted(bands))[1] for number in (-inf, *bands)}


def _kind(prediction: Prediction) -> Kind:
    if prediction.label is None:
        return "texts"
    return "classes" if isinstance(prediction.label, str) else "numbers"


def _classes(predictions: Sequence[Prediction], training: Sequence[str | float]) -> tuple[str, ...]:
    labels = {str(prediction.label) for prediction in predictions} | set(map(str, training))
    return tuple(sorted(labels.union(*(prediction.probabilities for prediction in predictions))))


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
    return ((name, members) for (_, name), members in sorted(found.items(), key=lambda item: item[0]))


def _band(number: float, bands: Sequence[float]) -> tuple[int, str]:
    """(position, name) of the band of a number; a border belongs to the upper band."""
    position = sum(border <= number for border in bands)
    if not bands:
        return 0, "all numbers"
    if position == 0:
        return 0, f"below {bands[0]:g}"
    if position == len(bands):
        return position, f"{bands[-1]:g} and above"
    return position, f"{bands[position - 1]:g} to {bands[position]:g}"

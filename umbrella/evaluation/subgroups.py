"""The groups that an evaluation reports: the metrics of one target, over all of its predictions or a part of them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, isnan, nan
from statistics import fmean
from typing import Any, Literal

from umbrella.evaluation.bootstrap import Estimate, estimate
from umbrella.evaluation.group_metrics import count_classes, count_numbers, count_texts, labels_of
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.settings import EvaluateSettings

Kind = Literal["classes", "numbers", "texts"]


@dataclass(frozen=True)
class Group:
    """Predictions of one target that are counted together.

    ``metrics`` are named ``<way>/<level>/<metric>``. way: likelihood (of the candidates) or generated (found in the
    model's words). level: conversations; subjects (the mean probability over a subject's conversations, or the mean
    number or score); votes (the majority of a subject's valid answers; a tie is no answer, and so wrong). A subject
    whose label differs between conversations counts once for each. metric:

    - classes: accuracy, balanced_accuracy, f1 (macro), recall/<class>, precision/<class>; with two classes also
      sensitivity and specificity, of the class that sorts last as the positive one; by likelihood (no votes) also auc,
      brier and calibration_error; of conversations that compare with a reference, copies_reference: the share of
      answers that are the reference's label, right or wrong.
    - numbers (generated only, no votes): mae, rmse, r2, pearson.
    - texts (generated only, no votes): token_f1, rouge_l, exact.
    """

    target: str
    kind: Kind
    by: str
    """What makes the part: "all"; "task_type"; "task"; "comparison_type"; or a key of metadata."""
    value: str
    """Which part it is: "T3"; empty for "all"."""
    conversations: int
    subjects: int
    classes: tuple[str, ...]
    """Labels in order; empty for numbers and texts."""
    invalid: int | None
    """Generated answers that fit no label or hold no number. For classes they count as wrong; of numbers they are left
    out of all metrics, which are as good as the answers that are left. None: nothing was generated."""
    ties: Mapping[str, int]
    """Way to the number of subjects whose vote was a tie."""
    metrics: Mapping[str, Estimate]
    references: Mapping[str, float]
    """What is reached without looking. Classes: ``chance`` (balanced accuracy) and ``majority`` (accuracy of always
    saying the most frequent training label, of subjects). Numbers: ``mean/mae`` and ``mean/rmse`` (always saying the
    mean training label, of subjects). Beside the metric copies_reference: what it is for a model that is always right.
    """
    confusion: Mapping[str, list[list[int]]] = field(default_factory=dict)
    """``<way>/<level>`` to counts: a row per true class, a column per class said and a last one for none."""


def tabulate(
    predictions: Iterable[Prediction],
    settings: EvaluateSettings,
    seed: int = 0,
    training: Mapping[str, Sequence[str | float]] | None = None,
) -> list[Group]:
    """The groups of each target, in the order of their names; which, and in which order, see ``parts.parts``.

    Args:
        seed: of the resampling that intervals are read from.
        training: target to the labels of its training data, for ``references``; without them, those of the
            predictions of the target, whose mean and most frequent label are then looked at after all.
    """
    targets: dict[tuple[str, Kind], list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        targets[prediction.target, kind_of(prediction)].append(prediction)
    groups = []
    for (target, kind), of_target in sorted(targets.items()):
        given = [label for label in (training or {}).get(target, ()) if isinstance(label, str) == (kind == "classes")]
        known = given or labels_of(of_target)
        classes = _classes(of_target, known) if kind == "classes" else ()
        for by, value, part in parts(of_target, settings):
            people = {subject: i for i, subject in enumerate(dict.fromkeys(p.subject_id for p in part))}
            if kind == "classes":
                counted = count_classes(part, classes, known, people)
            else:
                counted = count_numbers(part, known, people) if kind == "numbers" else count_texts(part, people)
            group = Group(
                target=target,
                kind=kind,
                by=by,
                value=value,
                conversations=len(part),
                subjects=len(people),
                classes=classes,
                invalid=counted.invalid,
                ties=counted.ties,
                metrics=estimate(counted.measure, len(people), settings, seed),
                references=counted.references,
                confusion=counted.confusion,
            )
            groups.append(group)
    return groups


def kind_of(prediction: Prediction) -> Kind:
    """What the label is: a class, a number, or none, which is free text."""
    if prediction.label is None:
        return "texts"
    return "classes" if isinstance(prediction.label, str) else "numbers"


def overall(groups: Iterable[Group], metric: str = "likelihood/subjects/balanced_accuracy") -> float:
    """The mean of a metric over the targets for which it is defined, each as a whole; NaN where there is none.

    By default the same number as ``eval/balanced_accuracy`` of trainings, for the same predictions.
    """
    values = [group.metrics[metric].value for group in groups if group.by == "all" and metric in group.metrics]
    defined = [value for value in values if not isnan(value)]
    return fmean(defined) if defined else nan


def _classes(predictions: Sequence[Prediction], training: Sequence[str | float]) -> tuple[str, ...]:
    labels = {str(prediction.label) for prediction in predictions} | set(map(str, training))
    return tuple(sorted(labels.union(*(prediction.probabilities for prediction in predictions))))


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

"""The numbers of an evaluation as groups: what is said of one target, over all of its predictions or a part of them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from statistics import fmean
from typing import Literal

from umbrella.evaluation.class_counting import count_classes
from umbrella.evaluation.counting import count_numbers, count_texts, labels_of
from umbrella.evaluation.intervals import Estimate, estimate
from umbrella.evaluation.parts import parts
from umbrella.evaluation.prediction import Prediction
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

"""The metrics of groups of predictions, with bootstrap intervals over subjects."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.metrics import (
    class_metrics,
    confusion_matrices,
    nan_mean,
    number_metrics,
    probability_metrics,
    ratio,
    text_metrics,
)
from umbrella.evaluation.predictions import (
    Prediction,
    conversations_with_labels,
    majority_vote,
    mean_over_subjects,
    most_likely,
)
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.evaluation.subgroups import split_subgroups

CHUNK = 100
"""Resamples whose weights are in memory together."""
MAX_CHOICES = 50
"""With more labels, the balanced accuracy of choices is undefined: they are the texts of single questions."""

Kind = Literal["classes", "choices", "numbers", "texts", "joint"]
ALL_TARGETS = "all_targets"
"""The target of the group of conversations with several class labels."""
MetricFunction = Callable[[NDArray], Mapping[str, NDArray]]
"""Weights (resamples, n), how often each of n subjects or predictions counts, to metrics (resamples,) by name."""
Levels = dict[str, tuple[Sequence[str], MetricFunction]]
"""``<way>/<level>`` to the subjects of its n predictions and their metrics."""


MAIN_METRIC = {"classes": "balanced_accuracy", "numbers": "mae", "texts": "token_f1", "joint": "subset_accuracy"}
MAIN_METRIC |= {"choices": "accuracy"}
"""The metric that stands for a target: over subjects, and by likelihood where there are candidates."""
MAIN_REFERENCE = {"classes": "chance", "choices": "chance", "numbers": "mean/mae", "texts": "", "joint": ""}
"""The reference, one of ``Group.references``, that the main metric is compared with."""


class Estimate(NamedTuple):
    """A metric with its bootstrap interval; NaN where undefined."""

    value: float
    low: float
    high: float


@dataclass
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
    - Metrics of choices, whose questions have candidates of their own (no votes): accuracy, of a subject the mean over
      its questions; of conversations also balanced_accuracy, over the labels that are true, at most ``MAX_CHOICES``.
    - Metrics of numbers (no votes): mae, rmse, r2, pearson; by likelihood, where the answer is the median of the
      distribution, also mae_of_mean, nll, and the coverage and width of the 90% interval.
    - Metrics of texts (generated only, no votes): token_f1, rouge_l, exact.
    - Metric of the kind joint, whose target is ``ALL_TARGETS`` (conversations only): subset_accuracy, the share of the
      conversations with several class labels in which the answers to all of these are right.
    """

    target: str
    kind: Kind
    by: str
    """The key of the breakdown: "all"; "task_type"; "task"; "comparison_type"; or a key of metadata."""
    value: str
    """The value of that key, such as "T3"; empty for "all"."""
    conversations: int
    subjects: int
    classes: tuple[str, ...] = ()
    """Labels in order; empty for numbers and texts."""
    invalid: int | None = None
    """Generated answers without a label or number; None: nothing was generated. Invalid classes count as wrong; invalid
    numbers are left out of all metrics."""
    ties: dict[str, int] = field(default_factory=dict)
    """Way to the number of subjects whose vote is a tie."""
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    references: dict[str, float] = field(default_factory=dict)
    """Values that need no images. Classes: ``chance`` (balanced accuracy) and ``majority`` (accuracy, over subjects, of
    the most frequent training label). Choices: ``chance`` and ``majority`` (accuracies, over subjects, of a subject the
    mean over its questions). Numbers: ``mean/mae`` and ``mean/rmse`` (over subjects, of the mean training label).
    ``copies_reference``: the value of that metric for a model that is always right."""
    frequencies: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of choices: "true" and each way of answering, to how often each label is the truth, or the answer."""
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    """``<way>/<level>`` to counts: a row per true class, a column per predicted class and a last one for none."""


def main_metrics(group: Group) -> list[str]:
    """The full name of the main metric for each way of answering, over subjects where it is defined there."""
    found = []
    for way in ("likelihood", "generated"):
        names = [f"{way}/{level}/{MAIN_METRIC[group.kind]}" for level in ("subjects", "votes", "conversations")]
        found += [name for name in names if name in group.metrics][:1]
    return found


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

    Returns:
        The groups. The last one is of the kind joint if there are conversations with several class labels.
    """
    predictions = list(predictions)
    targets: dict[tuple[str, Kind], list[Prediction]] = defaultdict(list)
    choices = {p.target for p in predictions if p.candidates}
    for p in predictions:
        kind: Kind = "texts" if p.label is None else "classes" if isinstance(p.label, str) else "numbers"
        kind = "choices" if kind == "classes" and p.target in choices else kind
        targets[p.target, kind].append(p)
    groups = []
    for (target, kind), of_target in sorted(targets.items()):
        given = [label for label in (training or {}).get(target, ()) if isinstance(label, str) == (kind != "numbers")]
        labels = given or _distinct_labels(of_target)
        classes: set[str] = set()
        if kind == "classes":
            classes.update(map(str, labels), *(p.probabilities for p in of_target), [str(p.label) for p in of_target])
        for by, value, members in split_subgroups(of_target, settings):
            subjects = list(dict.fromkeys(p.subject_id for p in members))
            group = Group(target, kind, by, value, len(members), len(subjects), tuple(sorted(classes)))
            _add_metrics(group, LEVELS[kind](group, members, labels), subjects, settings, seed)
            groups.append(group)
    return groups + _joint_group(predictions, settings, seed)


def _joint_group(predictions: Sequence[Prediction], settings: EvaluateSettings, seed: int) -> list[Group]:
    """The group of the kind joint in a list, which is empty if no conversation has several class labels."""
    conversations = conversations_with_labels(predictions)
    flat = [p for of_one in conversations for p in of_one]
    if not flat:
        return []
    right = {}
    if all(p.probabilities for p in flat):
        right["likelihood"] = [all(most_likely(p.probabilities) == p.label for p in of) for of in conversations]
    if all(p.text is not None for p in flat):
        right["generated"] = [all(p.predicted == p.label for p in of) for of in conversations]
    subjects = [of_one[0].subject_id for of_one in conversations]
    levels: Levels = {
        f"{way}/conversations": (subjects, partial(_weighted_means, {"subset_accuracy": np.array(values, float)}))
        for way, values in right.items()
    }
    distinct = list(dict.fromkeys(subjects))
    group = Group(ALL_TARGETS, "joint", "all", "", len(conversations), len(distinct))
    _add_metrics(group, levels, distinct, settings, seed)
    return [group]


def _add_metrics(group: Group, levels: Levels, subjects: Sequence[str], settings: EvaluateSettings, seed: int) -> None:
    index = {subject: i for i, subject in enumerate(subjects)}
    columns = {name: [index[subject] for subject in of_level] for name, (of_level, _) in levels.items()}
    group.metrics = estimate(partial(_all_metrics, levels, columns), len(index), settings, seed)


def estimate(metrics: MetricFunction, subjects: int, settings: EvaluateSettings, seed: int = 0) -> dict[str, Estimate]:
    """Compute metrics with percentile bootstrap intervals (Efron 1979).

    Subjects are independent; conversations of one subject are not. Subjects are drawn with replacement, with all of
    their conversations, ``settings.bootstrap`` times. The interval holds the middle ``settings.confidence`` of the
    resampled values. Resamples in which a metric is undefined, such as one without a class, are left out for it. All
    metrics share the same resamples, which depend on the seed and the number of subjects only. With fewer than two
    subjects the interval is undefined.
    """
    values = {name: float(value[0]) for name, value in metrics(np.ones((1, subjects))).items()}
    resampled: dict[str, list[NDArray]] = {name: [] for name in values}
    random = np.random.default_rng(seed)
    for start in range(0, settings.bootstrap if subjects > 1 else 0, CHUNK):
        size = min(CHUNK, settings.bootstrap - start)
        drawn = random.integers(0, subjects, (size, subjects)) + subjects * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * subjects).reshape(size, subjects).astype(float)
        for name, drawn_values in metrics(weights).items():
            resampled[name].append(drawn_values[~np.isnan(drawn_values)])
    tail = (1 - settings.confidence) / 2
    estimates = {}
    for name, value in values.items():
        defined = np.concatenate([*resampled[name], []])
        interval = np.quantile(defined, [tail, 1 - tail]).tolist() if len(defined) else [np.nan, np.nan]
        estimates[name] = Estimate(value, *interval)
    return estimates


def _all_metrics(levels: Levels, columns: Mapping[str, list[int]], weights: NDArray) -> dict[str, NDArray]:
    """The metrics of all levels. ``columns``: the columns of the weights (of subjects) for the level's predictions."""
    return {
        f"{level}/{name}": value
        for level, (_, metrics) in levels.items()
        for name, value in metrics(weights[:, columns[level]]).items()
    }


def _class_levels(group: Group, predictions: Sequence[Prediction], training: Sequence[str | float]) -> Levels:
    classes = group.classes
    likely = [replace(p, predicted=most_likely(p.probabilities)) for p in predictions if p.probabilities]
    generated = [
        replace(p, predicted=p.predicted if p.predicted in classes else None, probabilities={})
        for p in _generated(predictions)
    ]
    if generated:
        group.invalid = sum(p.predicted is None for p in generated)
    levels: Levels = {}
    for way, conversations in (("likelihood", likely), ("generated", generated)):
        if not conversations:
            continue
        votes, group.ties[way] = majority_vote(conversations)
        subjects = {"subjects": mean_over_subjects(conversations)} if way == "likelihood" else {}
        for level, members in {"conversations": conversations, **subjects, "votes": votes}.items():
            matrices = confusion_matrices(members, classes)
            group.confusion[f"{way}/{level}"] = matrices.sum(0).astype(int).tolist()
            metrics = _class_function(members, classes, matrices, members is conversations)
            levels[f"{way}/{level}"] = [p.subject_id for p in members], metrics

    labels = _distinct_labels(predictions)
    most_frequent = Counter(sorted(map(str, training))).most_common(1)[0][0]
    # One answer to all questions has a recall of 1 for one of the classes that occur.
    group.references = {"chance": 1 / len(set(labels)), "majority": labels.count(most_frequent) / len(labels)}
    compared = [p for p in predictions if _reference_label(p) in classes]
    if compared:
        group.references["copies_reference"] = fmean(p.label == _reference_label(p) for p in compared)
    return levels


def _class_function(
    predictions: Sequence[Prediction], classes: Sequence[str], matrices: NDArray, conversations: bool
) -> Callable[[NDArray], dict[str, NDArray]]:
    """Return a function from weights to metrics. What does not depend on the weights is computed once."""
    truth = matrices.any(2).argmax(1)
    probabilities = np.array([[p.probabilities.get(label, 0.0) for label in classes] for p in predictions])
    compared = np.array([conversations and _reference_label(p) in classes for p in predictions])
    copied = compared & [p.predicted == _reference_label(p) for p in predictions]

    def metrics(weights: NDArray) -> dict[str, NDArray]:
        values = class_metrics(np.tensordot(weights, matrices, 1), classes)
        if len(set(truth.tolist())) < 2:  # a constant answer would reach 1
            values["balanced_accuracy"] = np.full(len(weights), np.nan)
        if predictions[0].probabilities:
            values |= probability_metrics(truth, probabilities, weights)
        if compared.any():
            values["copies_reference"] = ratio(weights @ copied, weights @ compared)
        return values

    return metrics


def _choice_levels(group: Group, predictions: Sequence[Prediction], training: Sequence[str | float]) -> Levels:
    answers: dict[str, list[tuple[Prediction, str | float | None]]] = {
        "likelihood": [(p, most_likely(p.probabilities)) for p in predictions if p.probabilities],
        "generated": [(p, p.predicted) for p in _generated(predictions)],
    }
    if answers["generated"]:
        group.invalid = sum(answer is None for _, answer in answers["generated"])
    most_frequent = Counter(sorted(map(str, training))).most_common(1)[0][0]
    references: dict[str, list[float]] = {
        "chance": [1 / len(p.candidates or p.probabilities or [p.label]) for p in predictions],
        "majority": [p.label == most_frequent for p in predictions],
    }
    for name, values in references.items():
        group.references[name] = fmean(_means_by_subject(predictions, values).values())
    group.frequencies["true"] = dict(sorted(Counter(str(p.label) for p in predictions).items()))
    levels: Levels = {}
    for way, rows in answers.items():
        if rows:
            right = np.array([p.label == answer for p, answer in rows], float)
            names, index = np.unique([str(p.label) for p, _ in rows], return_inverse=True)
            classes = np.eye(len(names))[index] if 1 < len(names) <= MAX_CHOICES else np.empty((len(rows), 0))
            by_subject = _means_by_subject([p for p, _ in rows], right.tolist())
            of_subjects = {"accuracy": np.array([*by_subject.values()])}
            levels[f"{way}/conversations"] = [p.subject_id for p, _ in rows], partial(_choice_metrics, classes, right)
            levels[f"{way}/subjects"] = list(by_subject), partial(_weighted_means, of_subjects)
            group.frequencies[way] = dict(Counter(str(answer) for _, answer in rows if answer is not None))
    return levels


def _means_by_subject(predictions: Sequence[Prediction], values: Sequence[float]) -> dict[str, float]:
    by_subject: dict[str, list[float]] = defaultdict(list)
    for p, value in zip(predictions, values, strict=True):
        by_subject[p.subject_id].append(value)
    return {subject: fmean(of_one) for subject, of_one in by_subject.items()}


def _choice_metrics(classes: NDArray, right: NDArray, weights: NDArray) -> dict[str, NDArray]:
    """``classes``: (n, labels), 1 at the true label; without labels, the balanced accuracy is undefined."""
    recalls = ratio(weights @ (classes * right[:, None]), weights @ classes)
    return {"accuracy": ratio(weights @ right, weights.sum(1)), "balanced_accuracy": nan_mean(recalls)}


def _number_levels(group: Group, predictions: Sequence[Prediction], training: Sequence[str | float]) -> Levels:
    generated = _generated(predictions)
    if generated:
        group.invalid = sum(p.predicted is None for p in generated)
    levels: Levels = {}
    likely = [p for p in predictions if p.numbers]
    for way, conversations in (("likelihood", likely), ("generated", generated)):
        for level, members in (("conversations", conversations), ("subjects", mean_over_subjects(conversations))):
            answers = [(p, p.answer if way == "likelihood" else p.predicted) for p in members]
            valid = [(p, answer) for p, answer in answers if answer is not None]
            if valid:
                truth, predicted = np.array([(p.label, answer) for p, answer in valid], float).T
                spread = [p for p, _ in valid] if way == "likelihood" else []
                metrics = partial(_number_metrics, truth, predicted, _spread_metrics(spread))
                levels[f"{way}/{level}"] = [p.subject_id for p, _ in valid], metrics
    error = np.array(_distinct_labels(predictions), float) - fmean(map(float, training))
    group.references = {"mean/mae": float(np.abs(error).mean()), "mean/rmse": float(np.sqrt((error**2).mean()))}
    return levels


def _spread_metrics(predictions: Sequence[Prediction]) -> dict[str, NDArray]:
    """The metrics of the distributions of numbers, (n,) each."""
    if not predictions:
        return {}
    low, high = np.array([p.number_interval for p in predictions]).T
    truth = np.array([p.label for p in predictions], float)
    mean = np.array([p.number_mean for p in predictions])
    return {
        "mae_of_mean": np.abs(mean - truth),
        "nll": np.array([p.number_nll for p in predictions]),
        "interval_coverage": ((low <= truth) & (truth <= high)).astype(float),
        "interval_width": high - low,
    }


def _number_metrics(
    truth: NDArray, predicted: NDArray, spread: Mapping[str, NDArray], weights: NDArray
) -> dict[str, NDArray]:
    return number_metrics(truth, predicted, weights) | _weighted_means(spread, weights)


def _text_levels(group: Group, predictions: Sequence[Prediction], training: Sequence[str | float]) -> Levels:
    by_subject: dict[str, list[dict[str, float]]] = defaultdict(list)
    for p in predictions:
        if p.text is not None:
            by_subject[p.subject_id].append(text_metrics(p.truth, p.text))
    if not by_subject:
        return {}
    group.invalid = 0
    each = [(subject, metrics) for subject, of_one in by_subject.items() for metrics in of_one]
    means = [(s, {name: fmean(one[name] for one in of_one) for name in of_one[0]}) for s, of_one in by_subject.items()]
    levels: Levels = {}
    for level, rows in (("conversations", each), ("subjects", means)):
        values = {name: np.array([metrics[name] for _, metrics in rows]) for name in rows[0][1]}
        levels[f"generated/{level}"] = [subject for subject, _ in rows], partial(_weighted_means, values)
    return levels


LEVELS: dict[Kind, Callable[[Group, Sequence[Prediction], Sequence[str | float]], Levels]] = {
    "classes": _class_levels,
    "choices": _choice_levels,
    "numbers": _number_levels,
    "texts": _text_levels,
}
"""For each kind, the function that makes the levels of a group and fills in the fields other than its metrics."""


def _weighted_means(values: Mapping[str, NDArray], weights: NDArray) -> dict[str, NDArray]:
    return {name: ratio(weights @ of_name, weights.sum(1)) for name, of_name in values.items()}


def _reference_label(prediction: Prediction) -> str:
    return str(prediction.metadata.get("reference_label"))


def _generated(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Predictions with a generated answer. A regression model gives a number without text."""
    return [p for p in predictions if p.text is not None or p.predicted is not None]


def _distinct_labels(predictions: Sequence[Prediction]) -> list[str | float]:
    """The label of each subject; several for a subject whose label differs between conversations."""
    return [label for _, label in dict.fromkeys((p.subject_id, p.label) for p in predictions) if label is not None]

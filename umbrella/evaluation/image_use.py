"""Compare each answer with those to a blank volume, to another subject's volume, and to another wording."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.controls import AS_ASKED, OTHER_LABEL, PARAPHRASED, SAME_LABEL, SHOWN_LABEL, WITHOUT
from umbrella.evaluation.group_metrics import Estimate, estimate
from umbrella.evaluation.metrics import nan_mean, ratio
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.settings import EvaluateSettings

QUADRANTS = {
    (True, False): "only_with_image",
    (True, True): "with_and_without",
    (False, False): "neither",
    (False, True): "only_without",
}
"""(whether the answer is right, whether that to blank volumes is right) to the name."""
MAX_EXAMPLES = 10
SURE, UNUSUAL = 0.8, 0.1
"""A right answer to blank volumes is an example from this probability on, if that exceeds the mean probability of the
same answer to blank volumes in all questions by this: else it is the model's usual guess."""
Sample = Mapping[str, Prediction]
"""Condition to the prediction for one question."""


@dataclass(frozen=True)
class ImageUse:
    """How the answers to the questions of one target depend on the image.

    Without the image means with blank volumes: unlike a prompt without volumes, such a prompt has the form of the
    training data.
    """

    target: str
    tolerance: float
    """Numbers: the largest error of a right answer, half the mean absolute deviation of the training labels."""
    quadrants: Mapping[str, int]
    """Names of ``QUADRANTS`` to numbers of questions."""
    without_image: Estimate
    """Share of the right answers that do not need the image, corrected for guessing."""
    same_label: Estimate
    """Share of the answers to the volumes of a subject with the same label that are the label of that subject."""
    other_label: Estimate
    """Share of the answers to the volumes of a subject with another label that are the label of that subject."""
    paraphrased: Estimate
    """Share of the answers that change with the wording of the question."""
    examples: Sequence[tuple[str, str]] = ()
    """(reason, task_id) of questions to look at."""
    table: Sequence[Mapping[str, Any]] = ()
    """The row of ``image_use.csv`` for each question: answers, and their probabilities as ``p(<condition>)``."""


def measure_image_use(
    predictions: Mapping[str, Sequence[Prediction]],
    settings: EvaluateSettings,
    seed: int = 0,
    training: Mapping[str, Sequence[str | float]] | None = None,
) -> dict[str, ImageUse]:
    """Measure how answers depend on the image, for each target with labels and answers to blank volumes.

    Questions without volumes are left out.

    With blank volumes, a model can guess. Of the right answers, s stay right, and (s - g) / (1 - g), at least 0, do not
    need the image, if g of the guesses are right (correction for guessing; Diamond and Evans, Review of Educational
    Research 43, 1973). For classes, s is the mean over the true classes and g is 1 / classes, so that one answer to all
    blank volumes gives 0. For questions with candidates of their own, s and g are means over the right answers, g of
    1 / candidates. For numbers, g is the share of right answers of a model that always says the mean.

    Args:
        predictions: condition to predictions.
        settings, seed, training: see ``group_metrics.tabulate``.
    """
    by_task = {condition: {p.task_id: p for p in rows} for condition, rows in predictions.items()}
    targets: dict[str, list[Sample]] = defaultdict(list)
    for p in predictions[AS_ASKED]:
        if p.label is not None and p.volumes and p.task_id in by_task.get(WITHOUT, {}):
            targets[p.target].append({name: of[p.task_id] for name, of in by_task.items() if p.task_id in of})
    return {
        target: _measure(samples, (training or {}).get(target, ()), settings, seed)
        for target, samples in sorted(targets.items())
    }


def _measure(
    samples: Sequence[Sample], training: Sequence[str | float], settings: EvaluateSettings, seed: int
) -> ImageUse:
    asked = [sample[AS_ASKED] for sample in samples]
    labels = [p.label for p in asked]
    classes = sorted({name for p in asked for name in (p.label, *p.probabilities) if isinstance(name, str)})
    own = any(p.candidates for p in asked)
    strata_of = [] if own else classes  # own candidates: the labels of different questions are not the same classes
    known = np.array([0.0] if classes else training or labels, float)
    mean = float(known.mean())
    tolerance = float(np.abs(known - mean).mean() / 2)
    right, without = (
        np.array([_agree(sample[name].answer, sample[AS_ASKED].label, tolerance) for sample in samples])
        for name in (AS_ASKED, WITHOUT)
    )
    sizes = [len((own and (p.candidates or p.probabilities)) or classes) for p in asked]
    guessed = np.array([1 / n if n else _agree(x, mean, tolerance) for x, n in zip(labels, sizes, strict=True)], float)
    counted = right if own else np.full(len(asked), True)
    strata = np.array([[not strata_of or label == name for label in labels] for name in strata_of or [""]])
    shown = {}  # condition to (questions that have it, those of them in which the answer follows what is shown)
    for name in (SAME_LABEL, OTHER_LABEL, PARAPHRASED):
        has = np.array([name in s for s in samples])
        compared = [s[name].metadata.get(SHOWN_LABEL, s[AS_ASKED].answer) if name in s else None for s in samples]
        answers = [s[name].answer if name in s else None for s in samples]
        shown[name] = has, has & [_agree(a, b, tolerance) for a, b in zip(answers, compared, strict=True)]
    subjects = {subject: i for i, subject in enumerate(dict.fromkeys(p.subject_id for p in asked))}
    columns = [subjects[p.subject_id] for p in asked]

    def metrics(weights: NDArray) -> dict[str, NDArray]:
        weights = weights[:, columns]
        stay = np.stack([ratio(weights @ (right & without & of), weights @ (right & of)) for of in strata])
        share = nan_mean(stay.T)
        guess = ratio(weights @ (guessed * counted), weights @ counted)
        values = {name: ratio(weights @ follows, weights @ has) for name, (has, follows) in shown.items()}
        values[PARAPHRASED] = 1 - values[PARAPHRASED]
        return {WITHOUT: np.clip(ratio(share - guess, 1 - guess), 0, 1), **values}

    found = estimate(metrics, len(subjects), settings, seed)
    quadrants = [QUADRANTS[bool(a), bool(b)] for a, b in zip(right, without, strict=True)]
    counts = Counter(quadrants)
    return ImageUse(
        asked[0].target,
        tolerance,
        {name: counts[name] for name in QUADRANTS.values()},
        found[WITHOUT],
        found[SAME_LABEL],
        found[OTHER_LABEL],
        found[PARAPHRASED],
        _examples(samples, right & without, shown[PARAPHRASED][0] & ~shown[PARAPHRASED][1], tolerance),
        [_row(sample, quadrant, tolerance) for sample, quadrant in zip(samples, quadrants, strict=True)],
    )


def _examples(samples: Sequence[Sample], stay: NDArray, changed: NDArray, tolerance: float) -> list[tuple[str, str]]:
    """Right answers that do not need the image, the most probable first; then answers that another wording changes."""

    @cache
    def usual(answer: str | float) -> float:
        return fmean(_probability(sample[WITHOUT], answer, tolerance) or 0.0 for sample in samples)

    answers = [(i, samples[i][WITHOUT].answer) for i in np.flatnonzero(stay).tolist()]
    shares = [(_probability(samples[i][WITHOUT], answer, tolerance) or 0.0, i, answer) for i, answer in answers]
    sure = sorted((row for row in shares if row[0] >= SURE), key=lambda row: (-row[0], row[1]))
    unusual = (i for share, i, answer in sure if share - usual(answer) >= UNUSUAL)
    rows = [("right without the image", i) for i in islice(unusual, MAX_EXAMPLES // 2)]
    rows += [("changed by another wording", i) for i in np.flatnonzero(changed).tolist()]
    return [(reason, samples[i][AS_ASKED].task_id) for reason, i in rows[:MAX_EXAMPLES]]


def _row(sample: Sample, quadrant: str, tolerance: float) -> dict[str, Any]:
    p = sample[AS_ASKED]
    row: dict[str, Any] = {"target": p.target, "task_id": p.task_id, "subject_id": p.subject_id}
    row |= {"label": p.label, "quadrant": quadrant}
    for name, answered in sample.items():
        row |= {name: answered.answer, f"p({name})": _probability(answered, answered.answer, tolerance)}
        if name == OTHER_LABEL:
            row["label shown in other_label"] = answered.metadata[SHOWN_LABEL]
    return row


def _agree(a: str | float | None, b: str | float | None, tolerance: float) -> bool:
    """Whether two classes are equal, or two numbers differ by at most the tolerance."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        return bool(abs(a - b) <= tolerance)
    return a == b


def _probability(prediction: Prediction, answer: str | float | None, tolerance: float) -> float | None:
    """The probability of a class, or of the numbers that agree with a number; None if none was computed."""
    if prediction.numbers:
        pairs = zip(prediction.numbers, prediction.number_probabilities, strict=True)
        return sum(share for number, share in pairs if _agree(number, answer, tolerance))
    return prediction.probabilities.get(str(answer)) if prediction.probabilities else None

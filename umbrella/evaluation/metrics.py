"""Metrics: of classes, of probabilities, of numbers and of texts; and those that trainings report."""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from umbrella.evaluation.predictions import Answer, Prediction, cut_note, mean_probability, most_likely

BINS = 10
"""Bins of equal width that calibration is measured and drawn in."""


def codes(answers: Sequence[Answer], classes: Sequence[str]) -> tuple[NDArray, NDArray]:
    """Positions in ``classes`` of what is true and of what is said, (n,) each; what is no class is len(classes)."""
    position = {label: i for i, label in enumerate(classes)}
    truth = np.array([position[str(a.truth)] for a in answers], int)
    return truth, np.array([position.get(str(a.said), len(classes)) for a in answers], int)


def confusion(truth: NDArray, said: NDArray, classes: int, weights: NDArray) -> NDArray:
    """Counts (resamples, classes, classes + 1) of (true, said); the last column counts what is no class.

    Args:
        truth, said: (n,), see ``codes``.
        weights: (resamples, n), how often each answer counts.
    """
    cells = np.zeros((len(truth), classes * (classes + 1)))
    cells[np.arange(len(truth)), truth * (classes + 1) + said] = 1
    return (weights @ cells).reshape(len(weights), classes, classes + 1)


def balanced_accuracy(counts: NDArray) -> NDArray:
    """The mean over the true classes of the share of that class that is said right; chance is 1 / classes.

    A class that is never true does not count. NaN where nothing is true.
    """
    return _mean_of_defined(_recall(counts))


def class_metrics(counts: NDArray, classes: Sequence[str]) -> dict[str, NDArray]:
    """What follows from ``confusion``, (resamples,) each.

    ``f1`` is the mean over classes that are true or said; ``precision/<class>`` is NaN where the class is never said,
    ``recall/<class>`` where it is never true. Of two classes, the last is the positive one.
    """
    right = np.diagonal(counts, axis1=1, axis2=2)
    true, said = counts.sum(2), counts[:, :, :-1].sum(1)
    recall, precision = _recall(counts), ratio(right, said)
    metrics = {
        "accuracy": ratio(right.sum(1), true.sum(1)),
        "balanced_accuracy": balanced_accuracy(counts),
        "f1": _mean_of_defined(ratio(2 * right, true + said)),
    }
    if len(classes) == 2:
        metrics |= {"sensitivity": recall[:, 1], "specificity": recall[:, 0]}
    for i, label in enumerate(classes):
        metrics |= {f"recall/{label}": recall[:, i], f"precision/{label}": precision[:, i]}
    return metrics


def probability_metrics(truth: NDArray, probabilities: NDArray, weights: NDArray) -> dict[str, NDArray]:
    """``auc``, ``brier`` and ``calibration_error``, (resamples,) each.

    Brier score (1950): the squared distance of the probabilities from the truth, summed over classes; halved where
    there are two, which makes it that of the positive class. Calibration error (Guo et al. 2017): the mean distance
    between probability and share of right answers of the most likely label, in 10 bins of equal width.

    Args:
        truth: (n,), positions of the true classes.
        probabilities: (n, classes).
        weights: (resamples, n), how often each answer counts.
    """
    total = weights.sum(1)
    distance = ((probabilities - np.eye(probabilities.shape[1])[truth]) ** 2).sum(1)
    best = probabilities.max(1)
    right = (probabilities[np.arange(len(truth)), truth] == best) & ((probabilities == best[:, None]).sum(1) == 1)
    bins = np.clip(np.ceil(best * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.abs(weights @ (np.eye(BINS)[bins] * (right - best)[:, None])).sum(1)
    return {
        "auc": auc(truth, probabilities, weights),
        "brier": ratio(weights @ distance, total) / (2 if probabilities.shape[1] == 2 else 1),
        "calibration_error": ratio(gaps, total),
    }


def auc(truth: NDArray, probabilities: NDArray, weights: NDArray) -> NDArray:
    """Area under the ROC curve, (resamples,): of the last of two classes, else the mean of one class against the rest.

    Classes that all or no answers have do not count; NaN where none is left. Arguments as ``probability_metrics``.
    """
    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    return _mean_of_defined(np.stack([_one_auc(truth == i, probabilities[:, i], weights) for i in classes], 1))


def ratio(part: NDArray, whole: NDArray) -> NDArray:
    """part / whole, of one shape; NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _one_auc(positive: NDArray, score: NDArray, weights: NDArray) -> NDArray:
    order = np.argsort(score, kind="stable")
    steps = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # where equal scores begin: those count half
    drawn = weights[:, order]
    positives = np.add.reduceat(drawn * positive[order], steps, axis=1)
    negatives = np.add.reduceat(drawn * ~positive[order], steps, axis=1)
    below = np.cumsum(negatives, 1) - negatives / 2
    return ratio((positives * below).sum(1), positives.sum(1) * negatives.sum(1))


def _recall(counts: NDArray) -> NDArray:
    return ratio(np.diagonal(counts, axis1=1, axis2=2), counts.sum(2))


def _mean_of_defined(values: NDArray) -> NDArray:
    """The mean over the last axis of what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(-1), defined.sum(-1))


def number_metrics(truth: NDArray, said: NDArray, weights: NDArray) -> dict[str, NDArray]:
    """``mae``, ``rmse``, ``r2`` and ``pearson``; NaN where they are not defined (nothing drawn, all drawn the same).

    Args:
        truth, said: (n,), not empty.
        weights: (resamples, n), how often each answer counts.

    Returns:
        (resamples,) each.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        total = weights.sum(1)
        error = said - truth
        squared = weights @ error**2
        y, spread_y = _spread(truth, weights)
        p, spread_p = _spread(said, weights)
        together = weights @ (y * p) - (weights @ y) * (weights @ p) / total
        return {
            "mae": weights @ np.abs(error) / total,
            "rmse": np.sqrt(squared / total),
            "r2": 1 - squared / spread_y,
            "pearson": np.clip(together / np.sqrt(spread_y * spread_p), -1, 1),
        }


def _spread(values: NDArray, weights: NDArray) -> tuple[NDArray, NDArray]:
    """(values less their mean, for each resample their summed squares about its own mean). NaN where all are the same.

    All the same is what differs by no more than rounding does.
    """
    centred = values - values.mean()
    total, squares = weights.sum(1), weights @ centred**2
    about_mean = squares - (weights @ centred) ** 2 / total
    rounding = np.maximum(1e-12 * squares, total * (1e-12 * np.abs(values).max()) ** 2)
    return centred, np.where(about_mean > rounding, about_mean, np.nan)


ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def text_scores(truth: str, text: str) -> dict[str, float]:
    """Scores of one text, each from 0 to 1.

    ``exact`` and ``token_f1`` as in SQuAD (Rajpurkar et al. 2016): case, punctuation and English articles do not
    count; token_f1 is the F1 of the words in common. ``rouge_l`` (Lin 2004): the F1 of the longest common subsequence
    of lower-case words, articles included. Two texts without words are the same.
    """
    a, b = _normalised(truth), _normalised(text)
    all_a, all_b = _words(truth), _words(text)
    return {
        "token_f1": _f1((Counter(a) & Counter(b)).total(), a, b),
        "rouge_l": _f1(_common_subsequence(all_a, all_b), all_a, all_b),
        "exact": float(a == b),
    }


def _normalised(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _f1(common: int, a: Sequence[str], b: Sequence[str]) -> float:
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    before = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
        before = row
    return before[-1]


DISAGREEING = 0.1
"""Share of a target's conversations in which scored and generated answers may differ before it is reported."""


def metric_names(classes: Mapping[str, int]) -> list[str]:
    """What ``summarise`` gives in a training.

    Args:
        classes: target to the number of its classes among the labels that are scored.
    """
    several = {target for target, number in classes.items() if number > 1}
    names = ["eval/loss", *(["eval/balanced_accuracy"] if several else [])]
    for target in sorted(classes):
        names += [f"eval/{target}/balanced_accuracy"] if target in several else []
        names += [f"eval/{target}/accuracy"]
    return names


def chance(metric: str, classes: Mapping[str, int]) -> float | None:
    """What guessing gives for a balanced accuracy, as a share; None for another metric.

    Args:
        classes: target to the number of its candidates, for the targets that have a balanced accuracy.
    """
    shares = {f"eval/{target}/balanced_accuracy": 1 / number for target, number in classes.items()}
    if metric == "eval/balanced_accuracy" and shares:
        return sum(shares.values()) / len(shares)
    return shares.get(metric)


def summarise(scored: Iterable[Prediction], prefix: str = "eval") -> dict[str, float]:
    """Metrics of an evaluation.

    ``<prefix>/loss``: mean nats per token of the true last answers.
    ``<prefix>/<target>/balanced_accuracy``: over subjects. A subject's prediction is the label of the highest mean
    probability over the subject's conversations; equal means predict nothing. A subject whose label differs between
    conversations counts once for each label. Absent where all labels are of one class.
    ``<prefix>/<target>/accuracy``: over conversations.
    ``<prefix>/balanced_accuracy``: the mean of the balanced accuracies; absent where there is none.
    """
    scored = list(scored)
    metrics = {f"{prefix}/loss": sum(s.answer_nll or 0.0 for s in scored) / sum(s.answer_tokens for s in scored)}
    by_target: dict[str, list[Answer]] = defaultdict(list)
    for s in scored:
        if s.probabilities:
            answer = Answer(s.subject_id, str(s.label), most_likely(s.probabilities), s.probabilities)
            by_target[s.target].append(answer)
    over_subjects = []
    for target, answers in sorted(by_target.items()):
        true = {str(a.truth) for a in answers}
        if len(true) > 1:
            classes = sorted(true.union(*(a.probabilities for a in answers)))
            subjects = mean_probability(answers)
            counts = confusion(*codes(subjects, classes), len(classes), np.ones((1, len(subjects))))
            over_subjects.append(float(balanced_accuracy(counts)[0]))
            metrics[f"{prefix}/{target}/balanced_accuracy"] = over_subjects[-1]
        metrics[f"{prefix}/{target}/accuracy"] = sum(a.said == a.truth for a in answers) / len(answers)
    if over_subjects:
        metrics[f"{prefix}/balanced_accuracy"] = sum(over_subjects) / len(over_subjects)
    return metrics


def notes_on(predictions: Iterable[Prediction]) -> list[str]:
    """Sentences on generated answers that were cut, and on targets where they disagree with the scored ones."""
    generated = [p for p in predictions if p.text is not None]
    notes = [cut_note(sum(p.cut for p in generated), len(generated))]
    by_target: dict[str, list[bool]] = defaultdict(list)
    for p in generated:
        if p.probabilities:
            by_target[p.target].append(p.said != most_likely(p.probabilities))
    for target, differs in sorted(by_target.items()):
        if sum(differs) > DISAGREEING * len(differs):
            notes.append(
                f"{target}: in {sum(differs)} of {len(differs)} conversations the generated answer is not the candidate"
                " with the highest probability; train longer, or compare both in the predictions"
            )
    return [note for note in notes if note]

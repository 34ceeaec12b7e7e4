"""Metrics of scored conversations, over subjects."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from umbrella.evaluation.prediction import Prediction


def balanced_accuracy(truth: Sequence[str], predicted: Sequence[str | None]) -> float:
    """The mean over the true classes of the share of that class predicted right; chance is 1 / classes.

    ``None`` predicts nothing and is wrong.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for label, guess in zip(truth, predicted, strict=True):
        right[label].append(label == guess)
    return sum(sum(hits) / len(hits) for hits in right.values()) / len(right)


def metric_names(targets: Iterable[str], prefix: str = "eval") -> list[str]:
    """What ``summarise`` gives where these targets have classes."""
    targets = sorted(targets)
    names = [f"{prefix}/loss", *([f"{prefix}/balanced_accuracy"] if targets else [])]
    return names + [f"{prefix}/{target}/{name}" for target in targets for name in ("balanced_accuracy", "accuracy")]


def summarise(scored: Iterable[Prediction], prefix: str = "eval") -> dict[str, float]:
    """Metrics of an evaluation.

    ``<prefix>/loss``: mean nats per token of the true last answers.
    ``<prefix>/<target>/balanced_accuracy``: over subjects. A subject's prediction is the label of the highest mean
    probability over the subject's conversations; equal means predict nothing.
    ``<prefix>/<target>/accuracy``: over conversations.
    ``<prefix>/balanced_accuracy``: the mean of the above over targets; absent where no target has classes.
    """
    scored = list(scored)
    metrics = {f"{prefix}/loss": sum(s.answer_nll or 0.0 for s in scored) / sum(s.answer_tokens for s in scored)}
    classes = [s for s in scored if s.probabilities]
    by_target: dict[str, list[Prediction]] = defaultdict(list)
    for one in classes:
        by_target[one.target].append(one)
    over_subjects = []
    for target, group in sorted(by_target.items()):
        subjects: dict[str, list[Prediction]] = defaultdict(list)
        for one in group:
            subjects[one.subject_id].append(one)
        truth = [str(answers[0].label) for answers in subjects.values()]
        guesses = [most_likely(_mean([a.probabilities for a in answers])) for answers in subjects.values()]
        over_subjects.append(balanced_accuracy(truth, guesses))
        metrics[f"{prefix}/{target}/balanced_accuracy"] = over_subjects[-1]
        metrics[f"{prefix}/{target}/accuracy"] = sum(most_likely(s.probabilities) == s.label for s in group) / len(
            group
        )
    if over_subjects:
        metrics[f"{prefix}/balanced_accuracy"] = sum(over_subjects) / len(over_subjects)
    return metrics


def _mean(probabilities: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {label: sum(p[label] for p in probabilities) / len(probabilities) for label in probabilities[0]}


def most_likely(probabilities: Mapping[str, float]) -> str | None:
    """The label of the highest probability; nothing where two are equally high, or there is none."""
    best = max(probabilities.values(), default=0)
    winners = [label for label, probability in probabilities.items() if probability == best]
    return winners[0] if len(winners) == 1 else None

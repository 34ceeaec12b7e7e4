"""Metrics that trainings report as they go; ``tables.py`` has the same ones and more, with intervals."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from umbrella.evaluation.classes import balanced_accuracy, codes, confusion
from umbrella.evaluation.prediction import Prediction, cut_note
from umbrella.evaluation.subjects import Answer, mean_probability, most_likely

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

"""What a model says of a subject, from all conversations about it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from math import fsum
from typing import NamedTuple


class Answer(NamedTuple):
    """The answer to one conversation, or of one subject's together."""

    subject: str
    truth: str | float
    said: str | float | None
    """None: no answer, which is wrong for classes."""
    probabilities: Mapping[str, float] = {}


def most_likely(probabilities: Mapping[str, float]) -> str | None:
    """The label of the highest probability; nothing where two are equally high, or there is none."""
    best = max(probabilities.values(), default=0)
    winners = [label for label, probability in probabilities.items() if probability == best]
    return winners[0] if len(winners) == 1 else None


def mean_probability(answers: Iterable[Answer]) -> list[Answer]:
    """A subject says the label of the highest mean probability over its conversations."""
    together = []
    for (subject, truth), group in _by_subject(answers).items():
        labels = dict.fromkeys(label for answer in group for label in answer.probabilities)
        sums = {label: fsum(a.probabilities.get(label, 0.0) for a in group) for label in labels}
        # Rounded, so that what is equal but for the arithmetic is a tie: of two labels, and of two subjects in an AUC.
        mean = {label: round(total / len(group), 12) for label, total in sums.items()}
        together.append(Answer(subject, truth, most_likely(mean), mean))
    return together


def majority_vote(answers: Iterable[Answer]) -> tuple[list[Answer], int]:
    """A subject says what most of its conversations say; invalid answers do not vote, and a tie says nothing.

    Returns:
        (answers of subjects, number of ties).
    """
    together, ties = [], 0
    for (subject, truth), group in _by_subject(answers).items():
        votes = Counter(answer.said for answer in group if answer.said is not None).most_common(2)
        tie = len(votes) == 2 and votes[0][1] == votes[1][1]
        ties += tie
        together.append(Answer(subject, truth, votes[0][0] if votes and not tie else None))
    return together, ties


def mean_number(answers: Iterable[Answer]) -> list[Answer]:
    """A subject says the mean of the numbers of its conversations; invalid answers are left out."""
    together = []
    for (subject, truth), group in _by_subject(answers).items():
        numbers = [float(answer.said) for answer in group if answer.said is not None]
        together.append(Answer(subject, truth, fsum(numbers) / len(numbers) if numbers else None))
    return together


def _by_subject(answers: Iterable[Answer]) -> dict[tuple[str, str | float], list[Answer]]:
    """A subject whose truth differs between conversations (visits, comparisons) has one entry for each truth."""
    groups: dict[tuple[str, str | float], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.subject, answer.truth].append(answer)
    return groups

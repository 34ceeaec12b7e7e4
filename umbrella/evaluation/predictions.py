"""One prediction per conversation, and what they give together for a subject."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import fsum
from pathlib import Path
from typing import Any, NamedTuple

from umbrella.conversations.schema import Conversation
from umbrella.fileio import write_atomic


@dataclass(frozen=True)
class Prediction:
    """One conversation, its truth, and what a model says. Models of any kind make these; metrics know nothing else.

    Two ways of answering stand side by side: ``probabilities`` of candidate answers, and ``said``, what was found in
    the model's own words. Either may be missing.
    """

    task_id: str
    task_type: str
    subject_id: str
    target: str
    """What the label is a value of, such as "sex"."""
    label: str | float | None
    """The truth: a class, a number, or None where the answer is free text."""
    truth: str
    """The text of the true answer."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The conversation's, such as site, sex, age, comparison_type, reference_label."""
    volumes: tuple[tuple[str, str], ...] = ()
    """(modality, path) of each volume that was shown, in reading order."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Label to probability over the target's candidates; empty where it has none."""
    answer_nll: float | None = None
    """Negative log likelihood of the true answer, in nats, summed over its ``answer_tokens``; None: not measured."""
    answer_tokens: int = 0
    text: str | None = None
    """The answer in the model's own words; None: none was asked for."""
    cut: bool = False
    """Whether ``text`` reached the limit of tokens before the model ended it."""
    said: str | float | None = None
    """The label or number found in ``text``; None: it fits none (invalid), or the answer is free text."""
    subjects: tuple[str, ...] = ()
    """Everybody who is shown, the reference too."""

    @classmethod
    def of(cls, conversation: Conversation, truth: bool = True) -> "Prediction":
        """The row of a conversation before anything is answered. ``truth=False``: what its answer says is left out."""
        return cls(
            task_id=conversation.task_id,
            task_type=conversation.task_type,
            subject_id=conversation.subject_id,
            target=conversation.target,
            label=conversation.label,
            truth=conversation.answer if truth else "",
            metadata=conversation.metadata,
            volumes=tuple((volume.modality, volume.image_path) for volume in conversation.volumes),
            subjects=tuple(sorted(conversation.subjects)),
        )

    @property
    def nll_per_token(self) -> float | None:
        """Nats per token of the true answer; None: not measured."""
        return None if self.answer_nll is None else self.answer_nll / self.answer_tokens

    def to_json(self) -> str:
        """One line of JSON, fields as above."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Prediction":
        """What ``to_json`` wrote, to the same."""
        raw = json.loads(line)
        tuples = {"volumes": tuple(map(tuple, raw["volumes"])), "subjects": tuple(raw.get("subjects", ()))}
        return cls(**raw | tuples)


def cut_note(cut: int, answers: int) -> str:
    """Say how many generated answers were cut; empty if none was."""
    if not cut:
        return ""
    return f"{cut} of {answers} generated answers were cut before they ended; raise evaluate.max_new_tokens"


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """JSON Lines, one object per prediction; the file is there whole, or as it was before."""
    write_atomic(file, "".join(f"{prediction.to_json()}\n" for prediction in predictions))


def read_predictions(file: Path) -> list[Prediction]:
    """What ``write_predictions`` wrote, to the same."""
    with file.open(encoding="utf-8") as lines:
        return [Prediction.from_json(line) for line in lines]


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

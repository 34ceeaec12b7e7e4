"""Predictions for conversations, their files, and their aggregation over the conversations of a subject."""

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
    """The prediction of a model for one conversation, with its truth. All metrics are computed from these.

    A model answers in two ways: by ``probabilities`` of candidate answers, and by generated ``text``, in which ``said``
    is found. Either may be missing.
    """

    task_id: str
    task_type: str
    subject_id: str
    target: str
    """What the label is a value of, such as "sex"."""
    label: str | float | None
    """The true class or number; None for free text."""
    truth: str
    """The text of the true answer."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Metadata of the conversation, such as site, sex, age, comparison_type, reference_label."""
    volumes: tuple[tuple[str, str], ...] = ()
    """(modality, path) of each volume, in reading order."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Label to probability over the candidates of the target; empty if it has none."""
    answer_nll: float | None = None
    """Negative log likelihood of the true answer in nats, summed over ``answer_tokens``; None: not measured."""
    answer_tokens: int = 0
    text: str | None = None
    """The generated answer; None: none was generated."""
    cut: bool = False
    """Whether ``text`` reached the limit of tokens before it ended."""
    said: str | float | None = None
    """The label or number found in ``text``; None: there is none (invalid), or the answer is free text."""
    subjects: tuple[str, ...] = ()
    """All subjects of the conversation, including the reference."""

    @classmethod
    def from_conversation(cls, conversation: Conversation, truth: bool = True) -> "Prediction":
        """A prediction without an answer. ``truth=False``: the true answer is left out."""
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
        """One line of JSON with the fields above."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Prediction":
        """The inverse of ``to_json``."""
        raw = json.loads(line)
        tuples = {"volumes": tuple(map(tuple, raw["volumes"])), "subjects": tuple(raw.get("subjects", ()))}
        return cls(**raw | tuples)


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """Write predictions as JSON Lines, atomically."""
    write_atomic(file, "".join(f"{prediction.to_json()}\n" for prediction in predictions))


def read_predictions(file: Path) -> list[Prediction]:
    """Read the file of ``write_predictions``."""
    with file.open(encoding="utf-8") as lines:
        return [Prediction.from_json(line) for line in lines]


def cut_note(cut: int, answers: int) -> str:
    """A note on the number of generated answers that were cut; empty if none was."""
    if not cut:
        return ""
    return f"{cut} of {answers} generated answers were cut before they ended; raise evaluate.max_new_tokens"


class Answer(NamedTuple):
    """The answer for one conversation, or for one subject over all conversations."""

    subject: str
    truth: str | float
    said: str | float | None
    """None: no valid answer. For classes that is wrong."""
    probabilities: Mapping[str, float] = {}


def most_likely(probabilities: Mapping[str, float]) -> str | None:
    """The label of the highest probability; None for a tie or without labels."""
    best = max(probabilities.values(), default=0)
    labels = [label for label, probability in probabilities.items() if probability == best]
    return labels[0] if len(labels) == 1 else None


def mean_probability(answers: Iterable[Answer]) -> list[Answer]:
    """Aggregate over subjects: the label of the highest mean probability over the conversations of a subject."""
    subjects = []
    for (subject, truth), group in _by_subject(answers).items():
        labels = dict.fromkeys(label for answer in group for label in answer.probabilities)
        sums = {label: fsum(a.probabilities.get(label, 0.0) for a in group) for label in labels}
        # Rounded: values that differ only by rounding errors are ties, between labels and between subjects in an AUC.
        mean = {label: round(total / len(group), 12) for label, total in sums.items()}
        subjects.append(Answer(subject, truth, most_likely(mean), mean))
    return subjects


def majority_vote(answers: Iterable[Answer]) -> tuple[list[Answer], int]:
    """Aggregate over subjects: the most frequent label of the valid answers of a subject; a tie is no answer.

    Returns:
        (answers of subjects, number of ties).
    """
    subjects, ties = [], 0
    for (subject, truth), group in _by_subject(answers).items():
        votes = Counter(answer.said for answer in group if answer.said is not None).most_common(2)
        tie = len(votes) == 2 and votes[0][1] == votes[1][1]
        ties += tie
        subjects.append(Answer(subject, truth, votes[0][0] if votes and not tie else None))
    return subjects, ties


def mean_number(answers: Iterable[Answer]) -> list[Answer]:
    """Aggregate over subjects: the mean of the valid numbers of a subject."""
    subjects = []
    for (subject, truth), group in _by_subject(answers).items():
        numbers = [float(answer.said) for answer in group if answer.said is not None]
        subjects.append(Answer(subject, truth, fsum(numbers) / len(numbers) if numbers else None))
    return subjects


def _by_subject(answers: Iterable[Answer]) -> dict[tuple[str, str | float], list[Answer]]:
    """(subject, truth) to answers: a subject with several truths (visits, comparisons) has an entry for each."""
    groups: dict[tuple[str, str | float], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.subject, answer.truth].append(answer)
    return groups

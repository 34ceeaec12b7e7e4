"""Predictions for conversations, their files, and their aggregation over the conversations of a subject."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from math import fsum
from pathlib import Path
from typing import Any

from umbrella.conversations.schema import Conversation
from umbrella.fileio import write_atomic


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for one conversation, with its truth. All metrics are computed from these.

    A model answers in two ways: by ``probabilities`` of candidate answers, and by generated ``text``, in which
    ``predicted`` is found. Either may be missing.
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
    predicted: str | float | None = None
    """The label or number found in ``text``; None: there is none (invalid), or the answer is free text. Files call it
    "said"."""
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
        """One line of JSON."""
        fields = {("said" if name == "predicted" else name): value for name, value in asdict(self).items()}
        return json.dumps(fields, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Prediction":
        """The inverse of ``to_json``."""
        raw = json.loads(line)
        raw |= {"volumes": tuple(map(tuple, raw["volumes"])), "subjects": tuple(raw.get("subjects", ()))}
        raw["predicted"] = raw.pop("said")
        return cls(**raw)


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


def most_likely(probabilities: Mapping[str, float]) -> str | None:
    """The label of the highest probability; None for a tie or without labels."""
    best = max(probabilities.values(), default=0)
    labels = [label for label, probability in probabilities.items() if probability == best]
    return labels[0] if len(labels) == 1 else None


def mean_over_subjects(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Aggregate over subjects: one prediction per subject and label, whose other fields are those of its first one.

    ``probabilities`` are means, and ``predicted`` is the mean of the numbers, otherwise the most likely label.
    """
    subjects = []
    for group in _by_subject(predictions):
        scored = [p.probabilities for p in group if p.probabilities]
        sums = {name: fsum(one.get(name, 0.0) for one in scored) for name in dict.fromkeys(chain(*scored))}
        # Rounded: values that differ only by rounding errors are ties, between labels and between subjects in an AUC.
        mean = {label: round(total / len(scored), 12) for label, total in sums.items()}
        numbers = [p.predicted for p in group if isinstance(p.predicted, int | float)]
        predicted = fsum(numbers) / len(numbers) if numbers else most_likely(mean)
        subjects.append(replace(group[0], probabilities=mean, predicted=predicted))
    return subjects


def majority_vote(predictions: Iterable[Prediction]) -> tuple[list[Prediction], int]:
    """Aggregate over subjects: the most frequent label that is predicted for a subject; a tie is no answer.

    Returns:
        (one prediction per subject and label, without probabilities; number of ties).
    """
    subjects, ties = [], 0
    for group in _by_subject(predictions):
        votes = Counter(p.predicted for p in group if p.predicted is not None).most_common(2)
        tie = len(votes) == 2 and votes[0][1] == votes[1][1]
        ties += tie
        subjects.append(replace(group[0], probabilities={}, predicted=votes[0][0] if votes and not tie else None))
    return subjects, ties


def _by_subject(predictions: Iterable[Prediction]) -> Iterable[Sequence[Prediction]]:
    """The predictions of each subject; a subject with several labels (visits, comparisons) has a group for each."""
    groups: dict[Any, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction.subject_id, prediction.label].append(prediction)
    return groups.values()

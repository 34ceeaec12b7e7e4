"""What was answered to one conversation: the row that every number of an evaluation is made of."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from umbrella.conversations.schema import Conversation
from umbrella.storage import put_text


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
    put_text(file, "".join(f"{prediction.to_json()}\n" for prediction in predictions))


def read_predictions(file: Path) -> list[Prediction]:
    """What ``write_predictions`` wrote, to the same."""
    with file.open(encoding="utf-8") as lines:
        return [Prediction.from_json(line) for line in lines]

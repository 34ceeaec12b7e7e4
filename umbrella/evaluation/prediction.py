"""What was answered to one conversation: the row that every number of an evaluation is made of."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


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
    said: str | float | None = None
    """The label or number found in ``text``; None: it fits none (invalid), or the answer is free text."""


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """JSON Lines, one object per prediction, fields as above."""
    lines = [json.dumps(asdict(prediction), ensure_ascii=False) for prediction in predictions]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_predictions(file: Path) -> list[Prediction]:
    """What ``write_predictions`` wrote, to the same."""
    with file.open(encoding="utf-8") as lines:
        raw = [json.loads(line) for line in lines]
    return [Prediction(**r | {"volumes": tuple(map(tuple, r["volumes"]))}) for r in raw]

"""What an evaluation found: all that its report, its files and MLflow are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from umbrella.config import Settings
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.subgroups import Group

AS_ASKED = "as_asked"
CONDITIONS = (AS_ASKED, "shuffled", "text_only")
"""The questions as they are; with other subjects' volumes; without volumes. The last two are controls."""


@dataclass(frozen=True)
class Assessment:
    """One evaluation of one model on one split."""

    settings: Settings
    model: str
    """What was evaluated: the path of a checkpoint."""
    split: str
    predictions: Mapping[str, Sequence[Prediction]]
    """Condition to predictions, in the order of the data; those that ``settings.evaluate.controls`` asks for."""
    groups: Mapping[str, Sequence[Group]]
    """Condition to its numbers, the first ones of all of each target."""
    facts: Mapping[str, str | int | float]
    """What a person wants to know beside the numbers: data fingerprint, quarantined samples, seconds, device."""
    notes: Sequence[str] = ()
    """What was let pass and must be known, such as subjects that are also in the training split."""

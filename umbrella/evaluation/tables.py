"""The numbers of an evaluation as groups: what is said of one target, over all of its predictions or a part of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Estimate(NamedTuple):
    """A number with the interval that resampling the subjects gives. NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Predictions of one target that are counted together.

    ``metrics`` are named ``<way>/<level>/<metric>``. way: likelihood (of the candidates) or generated (found in the
    model's words). level: conversations; subjects (the mean probability over a subject's conversations, or the mean
    number); votes (the majority of a subject's answers; a tie is no answer, and so wrong). metric:

    - classes: accuracy, balanced_accuracy, f1 (macro), recall/<class>, precision/<class>; with two classes also
      sensitivity and specificity, of the class that sorts last as the positive one; by likelihood also auc, brier and
      calibration_error.
    - numbers (generated only): mae, rmse, r2, pearson.
    - texts (generated only, no votes): token_f1, rouge_l, exact.
    """

    target: str
    kind: Literal["classes", "numbers", "texts"]
    by: str
    """What makes the part: "all"; "task_type"; "task"; "comparison_type"; or a key of metadata."""
    value: str
    """Which part it is: "T3"; empty for "all"."""
    conversations: int
    subjects: int
    classes: tuple[str, ...]
    """Labels in order; empty for numbers and texts."""
    invalid: int | None
    """Generated answers that fit no label or hold no number, and count as wrong. None: nothing was generated."""
    ties: Mapping[str, int]
    """Way to the number of subjects whose vote was a tie."""
    metrics: Mapping[str, Estimate]
    references: Mapping[str, float]
    """What is reached without looking. Classes: ``chance`` (balanced accuracy) and ``majority`` (accuracy of always
    saying the most frequent one). Numbers: ``mean/mae`` and ``mean/rmse`` (always saying the mean training label)."""
    confusion: Mapping[str, list[list[int]]] = field(default_factory=dict)
    """``<way>/<level>`` to counts: a row per true class, a column per class said and a last one for none."""

"""Settings of evaluations."""

from typing import Literal, get_args

from pydantic import Field, field_validator

from umbrella.base import Section

Control = Literal["shuffled", "blank", "text_only", "same_label", "other_label", "paraphrased"]


MAX_NUMBERS = 1000
"""Largest number of steps of a given grid of numbers."""


class EvaluateSettings(Section):
    """Evaluation of a trained model."""

    at_end: bool = True
    """Evaluate the best checkpoint on the test split at the end of a training, and of a sweep."""
    split: Literal["train", "validation", "test"] = "test"
    """Split to evaluate."""
    batch_size: int = Field(16, ge=1)
    """Conversations per forward pass. It changes results by rounding only."""
    workers: int = Field(1, ge=1)
    """Processes that each hold the model and answer batches; resources.cpus_per_worker and .gpus_per_worker apply to each."""  # noqa: E501
    generate: bool = True
    """Generate free-text answers, too. false: only the likelihood of candidate answers is computed."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Largest number of tokens of a generated answer. null: that of the longest answer in the training data, at most 1024."""  # noqa: E501
    candidates: dict[str, dict[str, str]] = Field({})
    """Candidate answers of a target, label to text, as in {sex: {female: female., male: male.}}. Empty: the most frequent text of each label in the training data; for umbrella predict: none."""  # noqa: E501
    number_grids: dict[str, tuple[float, float, float]] = Field({})
    """Numbers whose likelihood is computed, by target: lowest, highest and step, as in {age: [20, 80, 1]}. Empty: the range and decimals of the training labels."""  # noqa: E501
    calibrated: bool = False
    """Apply the temperatures that the training fitted on the validation split to the probabilities of classes."""
    controls: list[Control] = Field(list(get_args(Control)))
    """Conditions that show how much of the answers depends on the images: volumes of other subjects (shuffled), blank ones, none (text_only); and for comparisons of single answers, those of one other subject with the same or another label, and a paraphrased question."""  # noqa: E501
    breakdown: list[str] = Field(["site", "sex", "age"])
    """Metadata keys for subgroup scores; numeric values are divided into bands."""
    bands: list[float] = Field([20, 40, 60])
    """Boundaries of the bands of numeric values: below 20, 20 to 40, 40 to 60, 60 and above."""
    confounds: list[str] = Field(["age", "sex", "site", "brain_volume"])
    """Metadata keys whose effect on the scores is estimated; numbers are not divided into bands. brain_volume is computed from the foreground of a subject's volume if no metadata have it."""  # noqa: E501
    bootstrap: int = Field(1000, ge=100)
    """Bootstrap samples of subjects for confidence intervals."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Coverage of the confidence intervals."""
    allow_shared_subjects: bool = False
    """Print a note instead of an error if subjects of the evaluated split are in the training split, too."""
    pictures: int = Field(3, ge=0)
    """Number of best answers, and of worst answers, that the report shows with their volumes. 0: none."""
    attention_maps: bool = True
    """Show in these pictures how much the answer depends on each patch, by masking one patch at a time."""

    @field_validator("number_grids")
    @classmethod
    def _check_grids(cls, grids: dict[str, tuple[float, float, float]]) -> dict[str, tuple[float, float, float]]:
        for target, (low, high, step) in grids.items():
            if not (low < high and step > 0 and (high - low) / step <= MAX_NUMBERS):
                raise ValueError(
                    f"{target}: [{low:g}, {high:g}, {step:g}] is not lowest, highest and step of 2 to {MAX_NUMBERS}"
                    " numbers, as in [20, 80, 1]"
                )
        return grids

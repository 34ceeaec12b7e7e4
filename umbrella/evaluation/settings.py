"""Settings of evaluations."""

from typing import Literal

from pydantic import Field

from umbrella.base import Section


class EvaluateSettings(Section):
    """What a trained model is asked, and what is made of its answers."""

    at_end: bool = True
    """A training, and the winner of a sweep, ends with an evaluation of its best checkpoint on the test split."""
    split: Literal["train", "validation", "test"] = "test"
    """The conversations that are asked."""
    batch_size: int = Field(16, ge=1)
    """Conversations that are asked side by side. Numbers do not depend on it but for rounding."""
    workers: int = Field(1, ge=1)
    """Processes that each hold the model and answer batches; resources.cpus_per_worker and .gpus_per_worker are of one."""  # noqa: E501
    generate: bool = True
    """Also let the model answer in its own words; without it, only the likelihood of candidate answers is measured."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Tokens after which a generated answer is cut. None: those of the longest answer in the training data, at most 1024."""  # noqa: E501
    candidates: dict[str, dict[str, str]] = Field({})
    """Candidate answers of a target, label to text, as in {sex: {female: female., male: male.}}. Empty: each label's most frequent text in the training data; for predict.py: none."""  # noqa: E501
    controls: list[Literal["shuffled", "text_only"]] = Field(["shuffled", "text_only"])
    """The same questions with other subjects' volumes (shuffled) and without volumes (text_only): what a score owes to the images."""  # noqa: E501
    breakdown: list[str] = Field(["site", "sex", "age"])
    """Keys of metadata by whose values scores are told apart, where conversations have them; numbers are cut into bands."""  # noqa: E501
    bands: list[float] = Field([20, 40, 60])
    """Where numbers of ``breakdown`` are cut: below 20, 20 to 40, 40 to 60, and from 60 on."""
    bootstrap: int = Field(1000, ge=100)
    """Resamplings of the subjects that intervals are read from."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Coverage of the intervals."""
    allow_shared_subjects: bool = False
    """Go on, with a note, where subjects of the evaluated split are also in the training split."""
    pictures: int = Field(3, ge=0)
    """Best answers, and as many of the worst, that the report shows with their volumes. 0: none."""
    attention_maps: bool = True
    """Those pictures also show which patches the answer depends on, by hiding each of them in turn."""

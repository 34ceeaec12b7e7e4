"""Settings of the data and of the mask policy."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from umbrella.base import PathOrAddress, Section


def _several(value: Any) -> Any:
    return ([value] if value else []) if isinstance(value, str) else value


Paths = Annotated[tuple[PathOrAddress, ...], BeforeValidator(_several)]
"""One path or several, each a file, a folder or a pattern."""


class DataSettings(Section):
    """Where conversations and volumes are, and what is done with those that cannot be used."""

    train: Paths = ()
    """Conversations to train on: JSON or JSON Lines files (also .gz), folders, patterns, or a list of such. Empty: the phantom cohort is made."""  # noqa: E501
    validation: Paths = ()
    """Conversations that choose the best trial. Required with data.train."""
    test: Paths = ()
    """Conversations that are kept for the end: the evaluation of the best checkpoint."""
    input: Paths = ()
    """Conversations that predict.py answers; what stands in their last assistant turn is not looked at."""
    format: Literal["auto", "v2", "v1", "llava", "chat"] = "auto"
    """Format of the conversations; auto tells it from each sample's keys."""
    root: PathOrAddress = ""
    """Folder that relative volume paths start from. Empty: the folder of each conversation file."""
    path_map: dict[str, PathOrAddress] = Field({})
    """Beginnings of volume paths to what stands there on this machine, as in {/old/scans: /scans}."""
    modality: str = ""
    """Keep only conversations whose volumes are all of this modality. Empty: keep all."""
    task_filter: str = ""
    """Keep only this task_type (T1), or the task_ids in which this regular expression is found. Empty: keep all."""
    on_bad: Literal["fail", "quarantine"] = "fail"
    """What samples that cannot be used do: end the run, or go to a quarantine file with the reason."""
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """With on_bad=quarantine: a larger part of bad samples than this ends the run all the same."""
    max_tokens: int = Field(4096, ge=16)
    """A conversation that becomes more tokens than this cannot be used."""
    max_voxels: int = Field(2**31, ge=1)
    """A volume whose header claims more voxels than this is refused before it is decoded."""
    processes: int = Field(0, ge=0)
    """Processes that decode volumes which are not in the store yet. 0: one per CPU."""
    bucket_batches: int = Field(3, ge=1)
    """Steps whose conversations are sorted by length among themselves. More: less padding, and steps less mixed."""
    pack: int = Field(0, ge=0)
    """Tokens in a row that conversations share without padding, each attending to itself only. 0: a row each."""
    prefetch: int = Field(2, ge=0)
    """Batches made ahead of the training step."""
    log_samples: bool = False
    """Write which conversations each step sees, <training>/samples_<rank>.jsonl."""

    @field_validator("task_filter")
    @classmethod
    def _is_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


PRESETS: dict[str, dict[str, Any]] = {
    "upstream": {
        "supervise": "assistant",
        "end_of_turn": True,
        "turn_header": True,
        "task_weights": {},
        "normalize": "token",
    },
}
"""What each preset of the mask policy means."""


class MaskPolicy(Section):
    """Which tokens the loss sees, and how much each of them counts."""

    model_config = ConfigDict(validate_default=True)  # so that a preset also fills in what nobody has set

    preset: Literal["", "upstream"] = ""
    """upstream: what the original program did; sets all of mask, to whole assistant turns with their header and end."""
    supervise: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Turns whose content is a target: every assistant turn, only the last one, or every turn."""
    end_of_turn: bool = True
    """The end of a supervised turn is a target too, so that the model learns to stop."""
    turn_header: bool = False
    """The header of a supervised turn (its role) is a target too."""
    task_weights: dict[str, float] = Field({})
    """What the targets of a task_type count, as in {T1: 1, T3: 2}. One that is not named counts 1."""
    normalize: Literal["token", "turn", "sample"] = "token"
    """What counts 1 in the loss: every target token, every turn with targets, or every conversation."""

    @field_validator("task_weights")
    @classmethod
    def _above_zero(cls, weights: dict[str, float]) -> dict[str, float]:
        for task_type, weight in weights.items():
            if weight <= 0:
                raise ValueError(f"{task_type}: {weight:g} is not above 0; leave a task out with data.task_filter")
        return weights

    @field_validator("supervise", "end_of_turn", "turn_header", "task_weights", "normalize")
    @classmethod
    def _as_preset(cls, value: Any, info: ValidationInfo) -> Any:
        name, preset = str(info.field_name), info.data.get("preset")
        if not preset:
            return value
        meant = PRESETS[preset][name]
        if value not in (meant, cls.model_fields[name].default):
            raise ValueError(f"mask.preset={preset} means {name}={meant}; leave one of them out")
        return meant

    @property
    def description(self) -> str:
        """The policy as it acts, in the settings' own names: "supervise=assistant, end_of_turn=True, ..."."""
        weights = ", ".join(f"{task_type}: {weight:g}" for task_type, weight in self.task_weights.items())
        shown = dict(self) | {"task_weights": f"{{{weights}}}"}
        return ", ".join(f"{name}={shown[name]}" for name, value in self if value not in ("", {}))

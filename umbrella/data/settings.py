"""Settings of data and mask policy."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from umbrella.base import PathOrAddress, Section


def _as_list(value: Any) -> Any:
    return ([value] if value else []) if isinstance(value, str) else value


Paths = Annotated[tuple[PathOrAddress, ...], BeforeValidator(_as_list)]
"""One path or a list of paths, each a file, a folder or a glob pattern."""


class DataSettings(Section):
    """Location of conversations and volumes, filters, and the handling of bad samples."""

    train: Paths = ()
    """Training conversations: JSON or JSON Lines files (also .gz), folders, glob patterns, or a list of these. Empty: the phantom cohort."""  # noqa: E501
    validation: Paths = ()
    """Validation conversations, which select the best checkpoint and trial. Required with data.train."""
    test: Paths = ()
    """Test conversations, for the evaluation of the best checkpoint."""
    input: Paths = ()
    """Conversations for umbrella predict to answer. The text of their last assistant turn is ignored."""
    format: Literal["auto", "v2", "v1", "llava", "chat"] = "auto"
    """Format of the conversations. auto: detected from the keys of each sample."""
    root: PathOrAddress = ""
    """Base folder of relative volume paths. Empty: the folder of each conversation file."""
    path_map: dict[str, PathOrAddress] = Field({})
    """Path prefixes of volumes and their replacements on this machine, as in {/old/scans: /scans}."""
    suffixes: dict[str, str] = Field({})
    """Modalities of BIDS suffixes that are not known or mean another modality here, as in {pet: PET}; for files without a stated modality."""  # noqa: E501
    modality: str = ""
    """Use only conversations in which all volumes have this modality. Empty: all conversations."""
    task_filter: str = ""
    """Use only samples with this task_type (T1), or with a task_id that this regular expression matches. Empty: all."""
    group: str = ""
    """Key of metadata whose values group subjects that must be in one split, such as household. Empty: family_id, if present."""  # noqa: E501
    on_bad: Literal["fail", "quarantine"] = "fail"
    """Effect of bad samples: fail ends the run; quarantine writes them to a file with the reason and leaves them out."""  # noqa: E501
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """Largest fraction of bad samples with on_bad=quarantine; above it the run ends."""
    max_tokens: int = Field(4096, ge=16)
    """Largest number of tokens of a conversation. A longer one is a bad sample."""
    max_voxels: int = Field(2**31, ge=1)
    """Largest number of voxels of a volume according to its header. A larger one is rejected before decoding."""
    processes: int = Field(0, ge=0)
    """Processes that decode volumes that are not in the volume store. 0: one per CPU."""
    bucket_batches: int = Field(4, ge=1)
    """Number of steps whose conversations are sorted by length together. More: less padding, but less random batches."""  # noqa: E501
    group_batches_by: Literal["none", "reference", "subject"] = "none"
    """Bring conversations with the same reference (their first volume) or subject into the same batch, which computes each volume once. It replaces bucket_batches. Series, whose windows differ, and volumes with train.augment are not shared."""  # noqa: E501
    pack: int = Field(0, ge=0)
    """Tokens per row when several conversations are packed into a row; each attends only to itself. 0: one conversation per row."""  # noqa: E501
    pack_prefixes: bool = False
    """Conversations of a batch that begin with the same turns, such as a reference and its answer, share these turns: they are computed once. A row has up to data.pack tokens (0: 8 times the longest conversation). Use it with data.group_batches_by=reference; not with train.augment."""  # noqa: E501
    loader: Literal["auto", "processes", "threads"] = "auto"
    """Where conversations are rendered and put into batches: in other processes, or in threads of the training. auto: in processes for a training on GPUs with 8 CPUs or more per GPU."""  # noqa: E501
    prefetch: int = Field(2, ge=0)
    """Batches prepared ahead of the training step."""
    log_samples: bool = False
    """Log the conversations of each step to <training>/samples_<rank>.jsonl."""

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
"""Values of each preset of the mask policy."""


class MaskPolicy(Section):
    """Which tokens are supervised, and their weights in the loss."""

    model_config = ConfigDict(validate_default=True)  # a preset also replaces defaults

    preset: Literal["", "upstream"] = ""
    """upstream: sets all of mask to whole assistant turns with header and end."""
    supervise: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Turns whose content is supervised: every assistant turn, only the last one, or every turn."""
    end_of_turn: bool = True
    """Supervise the end of supervised turns, too, so that the model learns to stop."""
    turn_header: bool = False
    """Supervise the header (role) of supervised turns, too."""
    task_weights: dict[str, float] = Field({})
    """Weight of the supervised tokens by task_type, as in {T1: 1, T3: 2}. Default: 1."""
    normalize: Literal["token", "turn", "sample"] = "token"
    """Unit with weight 1 in the loss: each supervised token, each turn with supervised tokens, or each conversation."""

    @field_validator("task_weights")
    @classmethod
    def _above_zero(cls, weights: dict[str, float]) -> dict[str, float]:
        for task_type, weight in weights.items():
            if weight <= 0:
                raise ValueError(f"{task_type}: {weight:g} is not above 0; leave a task out with data.task_filter")
        return weights

    @field_validator("supervise", "end_of_turn", "turn_header", "task_weights", "normalize")
    @classmethod
    def _apply_preset(cls, value: Any, info: ValidationInfo) -> Any:
        name, preset = str(info.field_name), info.data.get("preset")
        if not preset:
            return value
        preset_value = PRESETS[preset][name]
        if value not in (preset_value, cls.model_fields[name].default):
            raise ValueError(f"mask.preset={preset} means {name}={preset_value}; leave one of them out")
        return preset_value

    @property
    def description(self) -> str:
        """The policy in one line: "supervise=assistant, end_of_turn=True, ..."."""
        weights = ", ".join(f"{task_type}: {weight:g}" for task_type, weight in self.task_weights.items())
        shown = dict(self) | {"task_weights": f"{{{weights}}}"}
        return ", ".join(f"{name}={shown[name]}" for name, value in self if value not in ("", {}))

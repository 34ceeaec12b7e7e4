"""Settings of the data and of the mask policy."""

from typing import Literal

from pydantic import Field

from umbrella.base import Section


class DataSettings(Section):
    """Where conversations and volumes are."""

    train: str = ""
    """Conversations to train on: a .json or .jsonl file, or a folder of them. Empty: the phantom cohort is made."""
    validation: str = ""
    """Conversations that choose the best trial. Required with data.train."""
    root: str = ""
    """Folder that relative volume paths start from. Empty: the folder of each conversation file."""
    modality: str = ""
    """Keep only conversations whose volumes are all of this modality. Empty: keep all."""
    task_filter: str = ""
    """Keep only this task_type (T1), or task_ids that contain this text. Empty: keep all."""
    max_tokens: int = Field(4096, ge=16)
    """A conversation that becomes more tokens than this is an error."""
    max_voxels: int = Field(2**31, ge=1)
    """A volume whose header claims more voxels than this is refused before it is decoded."""
    prefetch: int = Field(2, ge=0)
    """Batches made ahead of the training step."""


class MaskPolicy(Section):
    """Which tokens the loss sees."""

    supervise: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Turns whose content is a target: every assistant turn, only the last one, or every turn."""
    end_of_turn: bool = True
    """The end of a supervised turn is a target too, so that the model learns to stop."""
    turn_header: bool = False
    """The header of a supervised turn (its role) is a target too."""

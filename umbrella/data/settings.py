"""Settings of the data and of the mask policy."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from umbrella.base import Section


def _several(value: Any) -> Any:
    return ([value] if value else []) if isinstance(value, str) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_several)]
"""One path or several, each a file, a folder or a pattern."""


class DataSettings(Section):
    """Where conversations and volumes are, and what is done with those that cannot be used."""

    train: Paths = ()
    """Conversations to train on: JSON or JSON Lines files (also .gz), folders, patterns, or a list of such. Empty: the phantom cohort is made."""  # noqa: E501
    validation: Paths = ()
    """Conversations that choose the best trial. Required with data.train."""
    test: Paths = ()
    """Conversations that are kept for the end; prepare.py checks them with the others."""
    format: Literal["auto", "v2", "v1", "llava", "chat"] = "auto"
    """Format of the conversations; auto tells it from each sample's keys."""
    root: str = ""
    """Folder that relative volume paths start from. Empty: the folder of each conversation file."""
    path_map: dict[str, str] = Field({})
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
    prefetch: int = Field(2, ge=0)
    """Batches made ahead of the training step."""

    @field_validator("task_filter")
    @classmethod
    def _is_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


class MaskPolicy(Section):
    """Which tokens the loss sees."""

    supervise: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Turns whose content is a target: every assistant turn, only the last one, or every turn."""
    end_of_turn: bool = True
    """The end of a supervised turn is a target too, so that the model learns to stop."""
    turn_header: bool = False
    """The header of a supervised turn (its role) is a target too."""

"""Which checkpoint a person means, and where there are some."""

from pathlib import Path

from umbrella.base import UserError
from umbrella.config import Settings

TRAININGS = ("trainings/*", "sweeps/*/trials/*")
"""Folders below the storage that checkpoints lie in."""


def named_checkpoint(settings: Settings) -> Path:
    """The folder that the setting ``checkpoint`` names. Whether a model lies in it, ``Umbrella.from_checkpoint`` says.

    Raises:
        UserError: none is named, or it is not there; names the newest of the storage.
    """
    named = settings.checkpoint
    folder = Path(named)
    if named and folder.is_dir():
        return folder.absolute()
    wrong = f"checkpoint={named}: there is no such folder" if named else "checkpoint is not set"
    storage = Path(settings.resources.storage)
    there = [step for training in TRAININGS for step in storage.glob(f"{training}/step_*")]
    if not there:
        places = " and ".join(str(storage / training) for training in TRAININGS)
        raise UserError(f"{wrong}; name a training's step_... folder, of which {places} have none yet")
    newest = max(there, key=lambda step: step.stat().st_mtime)
    raise UserError(f"{wrong}; name a training's step_... folder, as in checkpoint={newest}, the newest in {storage}")

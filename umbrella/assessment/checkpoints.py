"""Which checkpoint a person means, and where there are some."""

from pathlib import Path

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.paths import all_checkpoints


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
    there = all_checkpoints(storage)
    if not there:
        raise UserError(f"{wrong}; name a training's step_... folder, of which {storage} has none yet")
    newest = max(there, key=lambda step: step.stat().st_mtime)
    raise UserError(f"{wrong}; name a training's step_... folder, as in checkpoint={newest}, the newest in {storage}")

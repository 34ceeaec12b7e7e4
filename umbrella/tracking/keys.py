"""Which run in MLflow is a training's: one that has its key. Names are for people, who may give one twice."""

from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from umbrella.storage import put_text
from umbrella.tracking.outbox import FOLDER

KEY = "umbrella.run"
"""The tag of a run that holds its key."""


def run_key(folder: str | Path) -> str:
    """The key of the training or sweep that has this folder, and stays in it; made where there is none."""
    file = Path(folder, FOLDER, "key")
    if not (file.exists() and file.read_text(encoding="utf-8")):  # empty: the power went
        file.parent.mkdir(parents=True, exist_ok=True)
        put_text(file, uuid4().hex)
    return file.read_text(encoding="utf-8")


def trial_key(parent: str, trial: str) -> str:
    """The key of a sweep's trial. Another machine has it too, although the trial began after the last look of a mirror.

    Args:
        parent: id of the sweep's run.
        trial: its name in the sweep.
    """
    return sha256(f"{parent}/{trial}".encode()).hexdigest()[:32]

"""Folders of trainings, and files in them and in those of sweeps, that more than one part of the code knows.

Imports little.
"""

from pathlib import Path

from umbrella.config import SETTINGS, Settings

BEGUN = {"trainings": "begun_with.json", "sweeps": SETTINGS}
"""The file without which a folder below these is no training, or no sweep."""
END = "end.json"
"""Of a trial: how it ended."""


def training_folder(settings: Settings) -> Path:
    """Where the training lies that these settings name."""
    return Path(settings.resources.storage).absolute() / "trainings" / settings.name

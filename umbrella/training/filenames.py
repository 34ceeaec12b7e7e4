"""Files in the folders of trainings and sweeps that more than one part of the code knows. Imports little."""

from umbrella.config import SETTINGS

BEGUN = {"trainings": "begun_with.json", "sweeps": SETTINGS}
"""The file without which a folder below these is no training, or no sweep."""
LIVE = "live.json"
"""Of a training: what it does at this moment, see ``live``."""
END, ADOPTED = "end.json", "adopted.jsonl"
"""Of a trial: how it ended, and at which steps it took another one's checkpoint."""
LOCK = "lock"
"""Of a sweep: held by the script that runs it."""

"""The run of a training that is over, for what comes after it."""

import os
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from umbrella.base import UserError
from umbrella.tracking.outbox import FOLDER
from umbrella.tracking.runs import Tracker
from umbrella.tracking.store import can_wait, store_key


def run_of(training: Path, uri: str) -> Tracker | None:
    """The run of the training that has this folder; None where the store has none, or the folder cannot be written to.

    Where the store does not answer, it is taken to be there: what it is told waits in the training's outbox.
    """
    if not os.access(training / FOLDER / store_key(uri), os.W_OK):
        return None
    tracker = Tracker(uri, training)
    try:
        run = MlflowClient(uri).get_run(tracker.run_id)
    except UserError:  # it has no id yet
        return tracker if tracker.outbox.waiting() else None
    except MlflowException as error:
        return tracker if can_wait(error, uri) else None
    return tracker if run.info.lifecycle_stage == "active" else None

"""Runs whose end nobody wrote down: of workers that were stopped, and of scripts that were killed."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from mlflow import MlflowClient
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from umbrella.base import UserError, masked
from umbrella.tracking.delivery import DRIVER, OUTCOME
from umbrella.tracking.drivers import announce, gone
from umbrella.tracking.outbox import FOLDER, OUTBOX
from umbrella.tracking.runs import Tracker
from umbrella.tracking.store import can_wait, short, store_key

TRAININGS = ("trainings/*", "sweeps/*", "sweeps/*/trials/*", "evaluations/*")
"""Folders below the storage that have an outbox."""
LEFT = "its script was killed"


def close_trial(
    uri: str, folder: str | Path, status: str, outcome: str, tags: Mapping[str, str] = MappingProxyType({})
) -> None:
    """End the run of a training from its driver: the worker may have been stopped before it could.

    Args:
        folder: of the training. What waits there is sent first. A run that was ended stays as it is.
        status, outcome: as in ``Tracker.end``.
        tags: that its worker may not have set.
    """
    if not Path(folder, FOLDER, store_key(uri)).is_dir():  # no worker came so far
        return
    try:
        tracker = Tracker(uri, folder)
        if tags:
            tracker.tags(tags)
        if not tracker.ended:
            tracker.end(status, outcome, wait=0)
        else:
            tracker.flush()
    except (MlflowException, SQLAlchemyError, OSError, UserError) as error:
        # A full disk, say, was told already and weighs more.
        note = f"MLflow at {masked(uri)} does not know that {Path(folder).name} has ended: {short(error)}"
        print(f"note: {note}", file=sys.stderr)


def mend(uri: str, experiment: str, storage: str | Path) -> None:
    """Put right what scripts of this host left behind that were killed, and let others see that this one lives.

    What waits in their outboxes is sent; their runs that are still RUNNING become KILLED. Those of scripts that live,
    or are of another host or storage, are left alone. Does nothing where the store does not answer.
    """
    what = f"{store_key(uri)}-{experiment}"
    announce(storage, what)
    client = MlflowClient(uri)
    try:
        for driver in gone(storage, what):
            for folder in _folders_with_mail(uri, storage):
                tracker = Tracker(uri, folder)
                if tracker.driver == driver:
                    tracker.flush()
            running = f"attributes.status = 'RUNNING' and tags.`{DRIVER}` = '{driver}'"
            for run in client.search_runs([experiment], running, max_results=1000):
                _close(client, run.info.run_id, "KILLED", LEFT)
    except Exception as error:
        if not can_wait(error, uri):
            raise


def _folders_with_mail(uri: str, storage: str | Path) -> Iterator[Path]:
    for pattern in TRAININGS:
        for file in Path(storage).absolute().glob(f"{pattern}/{FOLDER}/{store_key(uri)}/{OUTBOX}"):
            yield file.parents[2]


def _close(client: MlflowClient, run_id: str, status: str, outcome: str) -> None:
    client.log_batch(run_id, tags=[RunTag(OUTCOME, outcome)])
    client.set_terminated(run_id, status)

"""The MLflow runs of trainings whose process is gone: find them, and set their final status."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from umbrella.base import mask_secrets, note
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.store import can_wait, short


def find_run(uri: str, folder: Path) -> MlflowLogger | None:
    """The logger of a training that is over; None if the store has no run of it or the folder cannot be written to.

    If the server does not answer, the run is taken to exist.
    """
    logger = MlflowLogger(uri, folder)
    if not os.access(logger.file, os.W_OK) or not logger.experiment:
        return None
    try:
        if logger._state["run_id"] and logger.client.get_run(logger.run_id).info.lifecycle_stage != "active":
            return None
    except MlflowException as error:
        if not can_wait(error, uri):
            return None
    return logger


def close_run(
    uri: str,
    folder: str | Path,
    status: str,
    outcome: str,
    experiment: str = "",
    tags: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """End the run of a training whose process is gone, unless that ended it, and send what waits.

    Args:
        folder: folder of the training.
        status, outcome: see ``MlflowLogger.end``.
        experiment: see ``MlflowLogger``.
        tags: tags to set first.
    """
    try:
        logger = MlflowLogger(uri, folder, experiment)
        if not logger.file.exists() or not logger.experiment:  # no process came so far
            return
        logger.tags(tags)
        if logger.ended:
            logger.flush()
        else:
            logger.end(status, outcome, wait=0)
    except (MlflowException, SQLAlchemyError, OSError) as error:  # a full disk, say, was reported already
        note(f"MLflow at {mask_secrets(uri)} does not have the end of {Path(folder).name}: {short(error)}")

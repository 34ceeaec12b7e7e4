"""Find MLflow runs, set their final status, and link to them in MLflow's web interface."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote, urlencode

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from umbrella.base import mask_secrets, note
from umbrella.tracking.mlflow_logger import PARENT, MlflowLogger
from umbrella.tracking.store import describe_error, is_temporary

RUN_TABLE = "workflowType=machine_learning"
"""Query parameter that selects the view for training. Otherwise MLflow opens the one for chats and prompts."""


def find_run(uri: str, folder: Path) -> MlflowLogger | None:
    """Return the logger of a finished training.

    If the server does not answer, the run is assumed to exist.

    Returns:
        None if the store does not have the run, or the folder is not writable.
    """
    logger = MlflowLogger(uri, folder)
    if not os.access(logger.file, os.W_OK) or not logger.experiment:
        return None
    try:
        if logger.has_id and logger.client.get_run(logger.run_id).info.lifecycle_stage != "active":
            return None
    except MlflowException as error:
        if not is_temporary(error, uri):
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
    """Set the final status of a run whose process has ended without doing so, and send its pending events.

    Args:
        folder: folder of the training.
        status, outcome: see ``MlflowLogger.end``.
        experiment: see ``MlflowLogger``.
        tags: tags to set first.
    """
    try:
        logger = MlflowLogger(uri, folder, experiment)
        if not logger.file.exists() or not logger.experiment:  # the training ended before it created a run
            return
        logger.tags(tags)
        if logger.ended:
            logger.flush()
        else:
            logger.end(status, outcome, wait=0)
    except (MlflowException, SQLAlchemyError, OSError) as error:  # such as a full disk, which is reported elsewhere
        note(f"MLflow at {mask_secrets(uri)} does not have the end of {Path(folder).name}: {describe_error(error)}")


def page_urls(uri: str, experiment: str, server: str, metric: str, mode: str) -> dict[str, str]:
    """URLs of two pages of MLflow: all runs, best first, and a comparison of the trials of the newest sweep.

    Args:
        experiment: id of the experiment.
        server: URL of MLflow's server.
        metric, mode: ``tune.metric`` and ``tune.mode``.

    Returns:
        Description of a page to its URL. The comparison is left out if there are fewer than two trials.
    """
    order = urlencode(
        {"orderByKey": f"metrics.`best/{metric}`", "orderByAsc": str(mode == "min").lower()}, quote_via=quote
    )
    urls = {"runs, best first": f"{server}/#/experiments/{experiment}/runs?{RUN_TABLE}&{order}"}
    trials = _newest_trials(MlflowClient(uri), experiment)
    if len(trials) > 1:
        runs, experiments = (
            quote(json.dumps(ids, separators=(",", ":"))) for ids in ([run.info.run_id for run in trials], [experiment])
        )
        urls["trials of the newest sweep, side by side"] = (
            f"{server}/#/compare-runs?runs={runs}&experiments={experiments}&{RUN_TABLE}"
        )
    return urls


def _newest_trials(client: MlflowClient, experiment: str) -> list[Run]:
    newest = client.search_runs([experiment], f"tags.`{PARENT}` LIKE '%'", max_results=1)
    if not newest:
        return []
    parent = newest[0].data.tags[PARENT]
    return client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'", order_by=["attributes.start_time ASC"])

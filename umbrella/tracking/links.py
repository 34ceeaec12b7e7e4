"""Addresses of MLflow's pages that are worth opening first."""

import json
from urllib.parse import quote, urlencode

from mlflow import MlflowClient
from mlflow.entities import Run

from umbrella.tracking.mlflow_logger import PARENT

TRAINING = "workflowType=machine_learning"
"""Without this MLflow opens its page for chats and prompts."""


def pages(uri: str, experiment: str, page: str, metric: str, mode: str) -> dict[str, str]:
    """Address of the table of runs, best first, and of the newest sweep's trials side by side, by a description.

    Args:
        page: address under which MLflow is served.
        metric, mode: ``tune.metric`` and ``tune.mode``.
    """
    order = urlencode(
        {"orderByKey": f"metrics.`best/{metric}`", "orderByAsc": str(mode == "min").lower()}, quote_via=quote
    )
    found = {"runs, best first": f"{page}/#/experiments/{experiment}/runs?{TRAINING}&{order}"}
    trials = _newest_trials(MlflowClient(uri), experiment)
    if len(trials) > 1:
        runs = _quoted([run.info.run_id for run in trials])
        address = f"{page}/#/compare-runs?runs={runs}&experiments={_quoted([experiment])}&{TRAINING}"
        found["trials of the newest sweep, side by side"] = address
    return found


def _newest_trials(client: MlflowClient, experiment: str) -> list[Run]:
    newest = client.search_runs([experiment], f"tags.`{PARENT}` LIKE '%'", max_results=1)
    if not newest:
        return []
    parent = newest[0].data.tags[PARENT]
    return client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'", order_by=["attributes.start_time ASC"])


def _quoted(values: list[str]) -> str:
    return quote(json.dumps(values, separators=(",", ":")))

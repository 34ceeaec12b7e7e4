"""Addresses of MLflow's pages that are worth opening first."""

import json
from urllib.parse import quote

from mlflow import MlflowClient

from umbrella.tracking.delivery import PARENT


def compare_link(uri: str, experiment: str, page: str) -> str:
    """The compare page of the newest sweep's trials; empty where there is none with two.

    Args:
        page: the address under which MLflow is served.
    """
    client = MlflowClient(uri)
    children = client.search_runs([experiment], f"tags.`{PARENT}` LIKE '%'", max_results=1)  # newest first
    if not children:
        return ""
    parent = children[0].data.tags[PARENT]
    trials = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'", order_by=["attributes.start_time ASC"])
    if len(trials) < 2:
        return ""
    runs = quote(json.dumps([run.info.run_id for run in trials], separators=(",", ":")))
    return f"{page}/#/compare-runs?runs={runs}&experiments={quote(json.dumps([experiment]))}"

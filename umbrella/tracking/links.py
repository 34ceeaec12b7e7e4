"""Addresses of MLflow's pages that are worth opening first."""

import json
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Run

from umbrella.tracking.delivery import OUTCOME, PARENT

VIEW = "umbrella"
"""Key of the view of the table of runs that is kept in a tag of the experiment, as MLflow's "Share" keeps one."""
TRAINING = "workflowType=machine_learning"
"""MLflow opens its page for chats and prompts unless it is told this."""


def pages(uri: str, experiment: str, page: str, metric: str, mode: str) -> dict[str, str]:
    """What to look at, in words, to its address: all runs, best first, and the newest sweep's trials side by side.

    The table of runs gets columns for the metric at each run's best evaluation, for whatever the newest sweep's trials
    differ in, and for how each run ended: to MLflow's own sign a trial that the scheduler stopped and one that failed
    are alike.

    Args:
        page: the address under which MLflow is served.
        metric, mode: what decides, as in ``tune.metric`` and ``tune.mode``.
    """
    client = MlflowClient(uri)
    trials = _newest_trials(client, experiment)
    order = f"metrics.`best/{metric}`"
    shown = list(dict.fromkeys([order, "metrics.`best/eval/loss`"]))
    swept = [f"params.`{name}`" for name in _differing(trials)]
    columns = [*shown, *swept, f"tags.`{OUTCOME}`", "attributes.`Duration`"]
    view = {"selectedColumns": columns, "orderByKey": order, "orderByAsc": mode == "min"}
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))
    found = {"runs, best first": f"{page}/#/experiments/{experiment}/runs?{TRAINING}&viewStateShareKey={VIEW}"}
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


def _differing(runs: list[Run]) -> list[str]:
    """Parameters that all of the runs have and that are not the same in all."""
    common = set.intersection(*(set(run.data.params) for run in runs)) if runs else set()
    return sorted(name for name in common if len({run.data.params[name] for run in runs}) > 1)


def _quoted(values: list[str]) -> str:
    return quote(json.dumps(values, separators=(",", ":")))

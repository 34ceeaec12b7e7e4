"""The messages of one run, told to MLflow. Each may come twice, and leaves what it leaves when it comes once."""

import json
import sys
import threading
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from umbrella.base import masked
from umbrella.storage import put_text
from umbrella.tracking.datasets import to_input
from umbrella.tracking.keys import KEY
from umbrella.tracking.machine import SYSTEM
from umbrella.tracking.outbox import RUN, Message
from umbrella.tracking.store import can_wait, is_refusal, short

TRIAL, PARENT = "ray.trial_id", "mlflow.parentRunId"
OUTCOME, DRIVER = "umbrella.outcome", "umbrella.driver"
MAX_METRICS, MAX_PARAMS = 1000, 100  # per request, MLflow's own limits


class Delivery:
    """Sends messages about one run, and remembers in the run's folder which run that is.

    What MLflow refuses for good, such as anything about a run that somebody deleted, is named and put aside.
    """

    def __init__(self, uri: str, client: MlflowClient, folder: Path) -> None:
        self.uri, self.client, self.folder = uri, client, folder
        self._file = folder / RUN
        self._lock, self._refused = threading.Lock(), False
        self.state: dict[str, Any] = self._known()

    def _known(self) -> dict[str, Any]:
        return json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}

    def remember(self, **values: Any) -> None:
        """Keep in the run's folder: its id, its driver, its start in ms, the last step that was written.

        ``ahead``: the last step of each metric that the store has and the folder did not know of.
        """
        with self._lock:
            self.state |= values
            put_text(self._file, json.dumps(self.state))

    def __call__(self, message: Message) -> None:
        """Send one. Raises what ``can_wait`` is true of, and what is wrong with the storage."""
        if "run_id" not in self.state:  # another process may have sent the start meanwhile
            self.state |= self._known()
        try:
            getattr(self, f"send_{message['do']}")(message)
        except Exception as error:
            if can_wait(error, self.uri) or not is_refusal(error, self.uri) or message["do"] == "start":
                raise
            with (self.folder / "refused.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(message) + "\n")
            if not self._refused:
                refused = f"MLflow at {masked(self.uri)} refuses what it is told: {short(error)}"
                print(f"note: {refused}; kept in {file.name}", file=sys.stderr, flush=True)
            self._refused = True

    def send_start(self, message: Message) -> None:
        run, what, where = self._known_run()
        run = run or find_run(self.client, message["experiment"], message["tags"].get(KEY))
        if what:
            self.remember(until=-1, ahead={}, results={})  # all its steps are with it
            goes_on = f"it goes on in {run.info.run_id}" if run else "a new one begins"
            print(f"note: {what}: {goes_on}; each step so far is in {where}", file=sys.stderr, flush=True)
        if run is None:
            run = self.client.create_run(
                message["experiment"], start_time=message["time"], run_name=message["name"], tags=message["tags"]
            )
        else:
            self.client.update_run(run.info.run_id, status="RUNNING")
            self.client.log_batch(run.info.run_id, tags=[RunTag(*tag) for tag in message["tags"].items()])
            # A mirror's copy of this folder may be older than what was sent. The machine's steps are seconds.
            newest = {m.key: m.step for m in run.data.to_proto().metrics if not m.key.startswith(SYSTEM)}
            known = message.get("known", -1)
            self.remember(ahead={name: step for name, step in newest.items() if step > known})
        self.remember(run_id=run.info.run_id, start=run.info.start_time)

    def _known_run(self) -> tuple[Run | None, str, str]:
        """The run so far; if that cannot go on, what became of it, and where its steps are."""
        if "run_id" not in self.state:
            return None, "", ""
        run_id, name, store = self.state["run_id"], self.folder.parents[1].name, f"MLflow at {masked(self.uri)}"
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None, f"{store} has no run {run_id} of {name}", "the database that had it"
        if run.info.lifecycle_stage == "active":
            return run, "", ""
        deleted = f"the deleted one, which `mlflow runs restore --run-id {run_id}` brings back"
        return None, f"somebody deleted the run {run_id} of {name} in {store}", deleted

    def send_params(self, message: Message) -> None:
        known = self.client.get_run(self.state["run_id"]).data.params
        new = [Param(name, value) for name, value in message["values"].items() if name not in known]
        for i in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.state["run_id"], params=new[i : i + MAX_PARAMS])

    def send_tags(self, message: Message) -> None:
        self.client.log_batch(self.state["run_id"], tags=[RunTag(*tag) for tag in message["values"].items()])

    def send_metrics(self, message: Message) -> None:
        # A metric of the same name, value, step and time is one to MLflow: sent again, it is there once.
        ahead = self.state.get("ahead", {}) if "until" in message else {}
        metrics = [Metric(*metric) for metric in message["values"] if metric[3] > ahead.get(metric[0], -1)]
        for i in range(0, len(metrics), MAX_METRICS):
            self.client.log_batch(self.state["run_id"], metrics=metrics[i : i + MAX_METRICS])

    def send_inputs(self, message: Message) -> None:
        self.client.log_inputs(self.state["run_id"], [to_input(told) for told in message["values"]])

    def send_file(self, message: Message) -> None:
        # Of a copy that was taken while it was sent, the file may be gone: with the last message all of them are.
        if (self.folder / message["path"]).exists():
            self.client.log_artifact(self.state["run_id"], str(self.folder / message["path"]), message["to"] or None)

    def send_folder(self, message: Message) -> None:
        self.client.log_artifacts(self.state["run_id"], message["path"], message["to"])

    def send_end(self, message: Message) -> None:
        self.client.log_batch(self.state["run_id"], tags=[RunTag(OUTCOME, message["outcome"])])
        self.client.set_terminated(self.state["run_id"], message["status"], message["time"])


def find_run(client: MlflowClient, experiment: str, key: str | None) -> Run | None:
    """The run that was made, although whoever made it was killed before it could remember which."""
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1) if key else []
    return found[0] if found else None

"""Log to MLflow: one run per training, sweep or evaluation. The runs of trials are children of their sweep's run.

All events are appended to a file in the run's folder and sent from there, so that an outage of the server loses
nothing but system metrics. Models are logged by ``tracking.model_registry``.
"""

import json
import logging
import os
import posixpath
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4, uuid5

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from sqlalchemy.exc import SQLAlchemyError

from umbrella.base import UserError, mask_secrets, note
from umbrella.fileio import describe_storage_error, write_atomic
from umbrella.tracking.provenance import code_version, to_dataset_input
from umbrella.tracking.store import SWEEP, describe_error, is_active, is_sqlite, is_temporary, store_id

logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # logs each start and stop

KEY, OUTCOME, TRIAL, PARENT = "umbrella.run", "umbrella.outcome", "ray.trial_id", "mlflow.parentRunId"
"""Tags of a run: its ``run_key``, how it ended, the unique name of a training, and the run of its sweep."""
WINNER, DESCRIPTION = "umbrella.winner", "mlflow.note.content"
"""Tags of a run: whether it is the best trial of its sweep, and the text that MLflow shows with it."""
MAX_METRICS = 40
"""Metrics of a run at most, without MLflow's system metrics."""
FOLDER = "mlflow"
"""Subfolder of a training, sweep or evaluation."""
RETRY = 30.0
"""Seconds until the next try after the server did not answer."""
Event = dict[str, Any]


class MlflowLogger:
    """Logger of the MLflow run of a folder.

    Each call appends an event to ``<folder>/mlflow/events.jsonl`` and sends those that MLflow did not acknowledge.
    Sending an event twice has no effect: MLflow identifies a metric by its name, value, step and time. Only one process
    at a time may write to a folder.

    Args:
        uri: address of the MLflow store.
        folder: folder of the training, sweep or evaluation.
        experiment: id of the experiment. If it is given and the store does not have the run, or the run was deleted
            there, a new run is created and all events are sent to it.
    """

    def __init__(self, uri: str, folder: str | Path, experiment: str = "") -> None:
        self.uri, self.client = uri, MlflowClient(uri)
        self.folder = Path(folder) / FOLDER
        self.file = self.folder / "events.jsonl"
        # Files with a leading dot are not uploaded. This one is valid on this machine only.
        self._state_file = self.folder / f".{store_id(uri)}.json"
        self._state: Event = {"experiment": experiment, "run_id": "", "offset": 0, "ahead": {}}
        if self._state_file.exists():
            self._state |= json.loads(self._state_file.read_text(encoding="utf-8"))
        self._may_create = bool(experiment)
        self._name, self._begun, self._last_step, self.ended = Path(folder).name, _now(), -1, False
        self._newest: dict[str, tuple[int, float]] = {}
        for event, _ in self._events():
            self._update(event)
        self._logged_until = self._last_step
        self._pending: list[tuple[str, float, int, int]] = []
        self._next_try, self._is_down, self._has_rejected = 0.0, False, False
        self._logs_system = False
        self._monitor: SystemMetricsMonitor | None = None

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        name: str,
        *,
        folder: str | Path,
        parent: str | None = None,
        trial: str | None = None,
        sweep: str | None = None,
    ) -> "MlflowLogger":
        """Start or resume the run of a folder; its status becomes RUNNING.

        Args:
            parent: id of the sweep's run, for a trial.
            trial: unique name of the training.
            sweep: name of the sweep, for it and its trials. MLflow's table shows it in the column "Source".
        """
        key = run_key(folder, parent)
        logger = cls(uri, folder, experiment)
        logger._save_state(experiment=experiment)
        tags = {KEY: key, PARENT: parent, TRIAL: trial, SWEEP: sweep, "mlflow.source.name": sweep or "umbrella"}
        tags = {name: value for name, value in {**tags, **code_version()}.items() if value}
        logger._log({"do": "start", "name": name, "tags": tags, "time": _now()})
        return logger

    @property
    def run_id(self) -> str:
        """Id of the run in MLflow.

        Raises:
            UserError: the run was not created yet, because the server does not answer.
        """
        if not self._state["run_id"]:
            raise UserError(
                f"MLflow at {mask_secrets(self.uri)} does not answer, so the run has no id yet; try again later"
            )
        return self._state["run_id"]

    @property
    def experiment(self) -> str:
        """Id of the experiment."""
        return self._state["experiment"]

    @property
    def has_pending(self) -> bool:
        """Whether MLflow has not acknowledged all events."""
        return next(self._events(self._state["offset"]), None) is not None

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters. Parameters that a resumed run already has keep their values."""
        self._log({"do": "params", "values": {name: str(value) for name, value in values.items()}})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags."""
        self._log({"do": "tags", "tags": {name: str(value) for name, value in values.items()}})

    def inputs(self, datasets: Sequence[Mapping[str, Any]]) -> None:
        """Log the datasets of the run, see ``provenance.describe_dataset``."""
        self._log({"do": "inputs", "values": [dict(dataset) for dataset in datasets]})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Buffer metrics until ``flush``. Steps that an interrupted training has logged before are skipped."""
        now = _now()
        if step > self._logged_until:
            self._pending += [(name, value, now, step) for name, value in self._first_metrics(values).items()]

    def flush(self) -> None:
        """Log the buffered metrics."""
        # MLflow's compare page selects the metric that was logged first: sorted by name, this is best/...
        pending, self._pending = sorted(self._pending, key=lambda metric: metric[0]), []
        if pending:
            self._append({"do": "metrics", "values": pending})
        self._send()

    def results(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics that are computed after a step, such as the evaluation of its checkpoint.

        Values that have not changed are skipped. The run may have ended.
        """
        now, kept = _now(), self._first_metrics(values)
        if new := [(name, value, now, step) for name, value in kept.items() if self._newest[name] != (step, value)]:
            self._append({"do": "results", "values": new})
        self._send()

    def _first_metrics(self, values: Mapping[str, float]) -> dict[str, float]:
        """Leave out the metrics that are not among the first ``MAX_METRICS`` of the run."""
        for name in values:
            if len(self._newest) < MAX_METRICS:
                self._newest.setdefault(name, (-1, 0.0))
        return {name: float(value) for name, value in values.items() if name in self._newest}

    def artifact(self, content: str | bytes, file: str) -> None:
        """Log an artifact by its relative path. A copy stays in the folder until the next one of this name."""
        copy = self.folder / "files" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content.encode() if isinstance(content, str) else content)
        self._log({"do": "file", "file": file})

    def folder_artifact(self, path: str | Path, folder: str) -> None:
        """Log the files of a folder as artifacts. They are not copied: the folder must exist until they are sent."""
        self._log({"do": "folder", "path": os.path.relpath(path, self.folder), "to": folder})

    def watch_system(self) -> None:
        """Start to log system metrics at the first ``flush``."""
        self._logs_system = True

    def history(self, *names: str) -> dict[str, list[tuple[int, float]]]:
        """Return the (step, value) pairs of metrics in all events. Metrics without a value are left out."""
        found: dict[str, dict[int, float]] = {name: {} for name in names}
        for event, _ in self._events():
            for name, value, _, step in event["values"] if event["do"] == "metrics" else ():
                if name in found:
                    found[name][step] = value
        return {name: sorted(points.items()) for name, points in found.items() if points}

    def end(self, status: str = "FINISHED", outcome: str = "finished", wait: float = 20.0) -> None:
        """End the run.

        Args:
            status: FINISHED, FAILED or KILLED.
            outcome: value of the tag ``umbrella.outcome``, which distinguishes early stopping, too.
            wait: seconds for which to retry if the server does not answer.
        """
        if self._monitor and not self._is_down:
            self._monitor.finish()
        self._logs_system = False
        self.flush()
        self._log({"do": "end", "status": status, "tags": {OUTCOME: outcome}, "time": _now()})
        until = time.monotonic() + wait
        while self.has_pending and time.monotonic() < until:
            time.sleep(0.2 if is_sqlite(self.uri) else 1.0)
            self._next_try = 0.0
            self._send()
        if self.has_pending:
            problem = f"MLflow at {mask_secrets(self.uri)} still does not answer"
            note(f"{problem}; the rest stays in {self.file} and is sent when this run is resumed")

    def _log(self, event: Event) -> None:
        self._append(event)
        self._send()

    def _append(self, event: Event) -> None:
        line = json.dumps(event).encode() + b"\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # incomplete line of a killed process
                    line = b"\n" + line
            file.write(line)
        self._update(event)

    def _events(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """Yield the events from an offset on, each with the offset after it."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(offset)
            content = file.read()
        for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            offset += len(line)
            with suppress(json.JSONDecodeError):  # incomplete line
                yield json.loads(line), offset

    def _update(self, event: Event) -> None:
        """Update the attributes of this logger from an event."""
        if event["do"] == "start":
            self._name, self._begun, self.ended = event["name"], min(self._begun, event["time"]), False
        elif event["do"] == "end":
            self.ended = True
        elif event["do"] in ("metrics", "results"):
            self._newest |= {name: (step, value) for name, value, _, step in event["values"]}
            if event["do"] == "metrics":
                self._last_step = max([self._last_step, *(step for *_, step in event["values"])])

    def _save_state(self, **values: Any) -> None:
        self._state |= values
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._state_file, json.dumps(self._state))

    def _send(self) -> None:
        """Send pending events, unless the last try failed less than ``RETRY`` seconds ago."""
        if time.monotonic() < self._next_try or not self.has_pending:
            return
        try:
            if self._may_create or not self._state["run_id"]:
                self._find_or_create()
            for event, end in self._events(self._state["offset"]):
                self._send_or_skip(event)
                self._save_state(offset=end)
            self._start_monitor()
            self._is_down = False
        except Exception as error:
            if not is_temporary(error, self.uri):
                raise
            self._next_try = time.monotonic() + RETRY
            if not self._is_down:
                note(f"MLflow at {mask_secrets(self.uri)} does not answer; unsent events stay in {self.file}")
            self._is_down = True

    def _find_or_create(self) -> None:
        """Find the run by its id or key, or create it. All events are sent to a run whose id was not known."""
        run_id, key = self._state["run_id"], run_key(self.folder.parent)
        if not run_id or not is_active(self.client, run_id):
            found = self.client.search_runs([self.experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
            run = found[0] if found else self.client.create_run(self.experiment, self._begun, {KEY: key}, self._name)
            # Another machine may have sent events that this folder lacks; their steps are repeated here.
            ahead = {metric.key: metric.step for metric in run.data.to_proto().metrics}
            self._save_state(run_id=run.info.run_id, offset=0, ahead=ahead)
            if run_id:
                problem = f"MLflow at {mask_secrets(self.uri)} does not have the run {run_id} of {self._name} any more"
                note(f"{problem}; the run {run.info.run_id} gets all that was logged so far")
        self._may_create = False

    def _send_or_skip(self, event: Event) -> None:
        """Send an event. One that MLflow refuses, or whose file cannot be read or stored, is skipped with a note."""
        try:
            self._send_event(event, self._state["run_id"])
        except Exception as error:
            refused = event["do"] in ("file", "folder") and isinstance(error, OSError)
            if isinstance(error, MlflowException) and error.get_http_status_code() < 500:
                refused = not describe_storage_error(error)
            if is_temporary(error, self.uri) or not refused:
                raise
            if not self._has_rejected:
                problem = f"MLflow at {mask_secrets(self.uri)} refuses an event: {describe_error(error)}"
                note(f"{problem}; it stays in {self.file}")
            self._has_rejected = True

    def _send_event(self, event: Event, run_id: str) -> None:
        client, values = self.client, event.get("values", [])
        if "tags" in event:
            client.log_batch(run_id, tags=[RunTag(*tag) for tag in event["tags"].items()])
        if event["do"] == "start":
            client.update_run(run_id, status="RUNNING")
        elif event["do"] == "params":
            known = client.get_run(run_id).data.params
            client.log_batch(run_id, params=[Param(*param) for param in values.items() if param[0] not in known])
        elif event["do"] in ("metrics", "results"):
            newest = self._state["ahead"] if event["do"] == "metrics" else {}
            metrics = [Metric(*value) for value in values if value[3] > newest.get(value[0], -1)]
            client.log_batch(run_id, metrics=metrics)
        elif event["do"] == "inputs":
            client.log_inputs(run_id, [to_dataset_input(dataset) for dataset in values])
        elif event["do"] == "file" and (path := self.folder / "files" / event["file"]).exists():
            client.log_artifact(run_id, str(path), posixpath.dirname(event["file"]) or None)
        elif event["do"] == "folder" and (path := self.folder / event["path"]).exists():
            client.log_artifacts(run_id, str(path.resolve()), event["to"])
        elif event["do"] == "end":
            client.set_terminated(run_id, event["status"], event["time"])

    def _start_monitor(self) -> None:
        """Start MLflow's system monitor, or restart it after an outage, which stops it."""
        if self._logs_system and self._last_step >= 0 and (not self._monitor or self._is_down):
            if self._monitor:
                self._monitor.finish()
            self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
            self._monitor.start()


def find_run(uri: str, folder: Path) -> MlflowLogger | None:
    """Return the logger of a finished training.

    If the server does not answer, the run is assumed to exist.

    Returns:
        None if the store does not have the run, or the folder is not writable.
    """
    logger = MlflowLogger(uri, folder)
    if not os.access(logger.file, os.W_OK) or not logger.experiment:
        return None
    run_id = logger._state["run_id"]
    try:
        return logger if not run_id or is_active(logger.client, run_id) else None
    except MlflowException as error:
        return logger if is_temporary(error, uri) else None


def close_run(
    uri: str, folder: str | Path, status: str, outcome: str, experiment: str = "", tags: Mapping[str, str] | None = None
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
        if tags:
            logger.tags(tags)
        if logger.ended:
            logger.flush()
        else:
            logger.end(status, outcome, wait=0)
    except (MlflowException, SQLAlchemyError, OSError) as error:  # such as a full disk, which is reported elsewhere
        note(f"MLflow at {mask_secrets(uri)} does not have the end of {Path(folder).name}: {describe_error(error)}")


def run_key(folder: str | Path, parent: str | None = None) -> str:
    """Return the UUID tag of a run, which is stored in the folder; create it if there is none.

    Args:
        parent: id of the sweep's run. The key of its trial is derived from it and the folder's name, so that another
            machine gets the same key, even if the folder was not uploaded yet.
    """
    file = Path(folder, FOLDER, "run.uuid")
    if not (file.exists() and file.read_text(encoding="utf-8")):  # it may be empty after a power failure
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, (uuid5(UUID(parent), Path(folder).name) if parent else uuid4()).hex)
    return file.read_text(encoding="utf-8")


def _now() -> int:
    return int(time.time() * 1000)

"""Runs in MLflow: one per training; trials of a sweep are children of one parent run."""

import logging
import os
import posixpath
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from sqlalchemy.exc import SQLAlchemyError

from umbrella.base import UserError

TRIAL, PARENT, OUTCOME = "ray.trial_id", "mlflow.parentRunId", "umbrella.outcome"
LAST_WRITTEN = "train/waiting_for_data"
"""The metric of an evaluation whose name sorts behind all others."""
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs, at length, what it raises as well
MAX_METRICS, MAX_PARAMS = 1000, 100  # per request, MLflow's own limits


def tracking_uri(storage: str | Path) -> str:
    """Where runs are kept: ``MLFLOW_TRACKING_URI`` if it is set, else an SQLite file in the storage folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(storage).absolute() / 'mlflow.db'}"


def is_name(target: str) -> bool:
    """Whether MLflow takes metrics that have this in the midst of their names."""
    name = f"eval/{target}/balanced_accuracy"
    return re.fullmatch(r"[\w\-. :/]{1,250}", name) is not None and posixpath.normpath(name) == name


def open_experiment(uri: str, name: str, storage: str | Path) -> str:
    """The experiment's id, made when missing. To be called in the driver, before any worker opens the database.

    Raises:
        UserError: the store cannot be reached, or the experiment was deleted there.
    """
    try:
        client = MlflowClient(uri)
        artifacts = (Path(storage).absolute() / "artifacts").as_uri() if uri.startswith("sqlite:") else None
        experiment = client.get_experiment_by_name(name)
        if artifacts and experiment:
            _follow_artifacts(uri, artifacts)
        if experiment is None:
            return client.create_experiment(name, artifact_location=artifacts)
    except (MlflowException, SQLAlchemyError, sqlite3.Error) as error:
        raise UserError(f"MLflow at {uri}: {_short(error)}") from None
    if experiment.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment {name!r} was deleted; restore it, or choose another name: experiment=...")
    return experiment.experiment_id


def _follow_artifacts(uri: str, here: str) -> None:
    """Where the storage was moved or copied, let its database say where the artifacts are now.

    MLflow keeps absolute addresses, and has no command to change them.
    """
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=60)) as database, database:
        for (there,) in database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall():
            old, new = (Path(url2pathname(urlsplit(address).path)) for address in (there, here))
            if not there.startswith("file:") or old.name != new.name or (old.exists() and old.samefile(new)):
                continue
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                    (here, len(there) + 1, len(there) + 1, f"{there}/"),
                )


class Tracker:
    """One MLflow run. Metrics are gathered and written together by ``flush``, since each request costs up to 70 ms."""

    def __init__(self, uri: str, run: Run) -> None:
        self.uri, self.client = uri, MlflowClient(uri)
        self.run_id = run.info.run_id
        self._pending: list[Metric] = []
        self._monitor: SystemMetricsMonitor | None = None
        # Of a run that goes on: up to this step everything is there. Metrics are written by name, and this one is last.
        known = self.client.get_metric_history(self.run_id, LAST_WRITTEN) if LAST_WRITTEN in run.data.metrics else []
        self._known_until = max((metric.step for metric in known), default=-1)

    @classmethod
    def start(
        cls, uri: str, experiment: str, name: str, *, parent: str | None = None, trial: str | None = None
    ) -> "Tracker":
        """A new run, or the one that this trial already has."""
        client = MlflowClient(uri)
        if trial:
            found = find_trial(client, experiment, trial)
            if found:
                client.update_run(found.info.run_id, status="RUNNING")
                return cls(uri, found)
        tags = {"mlflow.source.name": "umbrella", **code_version()}
        tags |= {PARENT: parent} if parent else {}
        tags |= {TRIAL: trial} if trial else {}
        return cls(uri, client.create_run(experiment, run_name=name, tags=tags))

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; a resumed run keeps what it has."""
        known = self.client.get_run(self.run_id).data.params
        new = [Param(name, str(value)) for name, value in values.items() if name not in known]
        for i in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=new[i : i + MAX_PARAMS])

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags."""
        self.client.log_batch(self.run_id, tags=[RunTag(name, str(value)) for name, value in values.items()])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Gather metrics of a step, unless the run has them from before it was interrupted."""
        if step <= self._known_until:
            return
        now = int(time.time() * 1000)
        self._pending += [Metric(name, float(value), now, step) for name, value in values.items()]

    def flush(self) -> None:
        """Write the gathered metrics."""
        # By name: MLflow's compare page opens with the metric that was written first, and eval/... is what decides.
        pending, self._pending = sorted(self._pending, key=lambda metric: metric.key), []
        for i in range(0, len(pending), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=pending[i : i + MAX_METRICS])

    def watch_system(self) -> None:
        """From now to the end also write, every 10 s from a thread, what this machine does: CPU, memory, disk, GPUs.

        GPUs only where nvidia-ml-py is installed. These metrics count their own steps, and go on counting in a run that
        goes on.
        """
        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # it says when it starts and ends
        self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
        self._monitor.start()

    def text(self, content: str, file: str) -> None:
        """Save a text as an artifact."""
        self.client.log_text(self.run_id, content, file)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Save a file as an artifact."""
        self.client.log_artifact(self.run_id, str(path), folder)

    def end(self, status: str = "FINISHED", outcome: str = "finished") -> None:
        """Close the run. ``status``: FINISHED, FAILED or KILLED; ``outcome``: also tells early stopping apart."""
        if self._monitor:
            self._monitor.finish()
        self.flush()
        self.tags({OUTCOME: outcome})
        self.client.set_terminated(self.run_id, status)


def find_trial(client: MlflowClient, experiment: str, trial: str) -> Run | None:
    """The run of a trial, by its tag."""
    found = client.search_runs([experiment], f"tags.`{TRIAL}` = '{trial}'", max_results=1)
    return found[0] if found else None


def close_trial(uri: str, experiment: str, trial: str, status: str, outcome: str) -> None:
    """End a trial's run from the driver: its worker may have been stopped before it could. Outcome as in ``end``."""
    try:
        client = MlflowClient(uri)
        run = find_trial(client, experiment, trial)
        if run and not RunStatus.is_terminated(RunStatus.from_string(run.info.status)):
            Tracker(uri, run).end(status, outcome)
    except (MlflowException, SQLAlchemyError) as error:  # the disk is full: that is said already, and weighs more
        print(f"note: MLflow at {uri} does not know that {trial} has ended: {_short(error)}", file=sys.stderr)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def code_version() -> dict[str, str]:
    """The git commit of this code and whether files differ from it; empty outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the checkout around us is somebody else's
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain"))),
        }
    return {}

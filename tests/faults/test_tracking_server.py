"""A restarted tracking server has all events and files of a training and a sweep, each once."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient

from umbrella.tracking import mlflow_logger
from umbrella.tracking.mlflow_logger import OUTCOME, MlflowLogger, close_run
from umbrella.tracking.model_registry import log_best_model
from umbrella.tracking.settings import TrackingSettings
from umbrella.tracking.store import open_experiment
from umbrella.tuning.monitor import STATUS, Monitor
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import make_trial_folder, save_outcome, trial_id_of

pytestmark = pytest.mark.slow


class Server:
    """MLflow's server on SQLite, on a free port."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store = folder, store
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        words = f"-m mlflow server --host 127.0.0.1 --port {self.port} --workers 1 --backend-store-uri {self.store}"
        words += f" --artifacts-destination {self.folder / 'artifacts'}"
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words.split()], stdout=log, stderr=log, env=env, start_new_session=True
            )
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with suppress(OSError), urlopen(f"{self.uri}/health", timeout=1):
                return
            time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text(encoding="utf-8"))

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(mlflow_store: Callable[[Path], str], tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, mlflow_store(tmp_path))
    try:
        server.start()
        yield server
    finally:
        server.kill()


def steps(tracker: MlflowLogger, name: str = "train/loss") -> list[int]:
    return [metric.step for metric in tracker.client.get_metric_history(tracker.run_id, name)]


def test_restarted_tracking_server_has_every_event_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_logger, "RETRY", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    storage = tmp_path / "runs"
    experiment = open_experiment(server.uri, "x", storage)
    first, second = (storage / "trainings" / name for name in ("first", "second"))

    def train(tracker: MlflowLogger, steps: range) -> None:
        for step in steps:
            tracker.metrics({"train/loss": 1 / step}, step)
            if step % 10 == 0:
                tracker.metrics({"eval/loss": 2 / step}, step)
                tracker.flush()

    tracker = MlflowLogger.start(server.uri, experiment, "first", trial="first", folder=first)
    tracker.watch_system()
    train(tracker, range(1, 31))
    server.kill()
    train(tracker, range(31, 61))
    tracker.artifact("late", "texts/late.txt")
    # The training is killed and resumes from step 45 while the server is down. Another training starts.
    again = MlflowLogger.start(server.uri, experiment, "first", trial="first", folder=first)
    train(again, range(46, 81))
    other = MlflowLogger.start(server.uri, experiment, "second", trial="second", folder=second)
    train(other, range(1, 11))
    other.end("FAILED", "failed", wait=0)
    said = [line for line in capsys.readouterr().err.splitlines() if "unsent events stay in" in line]
    assert len(said) == 3, "once for each process"

    server.start()
    train(again, range(81, 91))
    assert steps(again) == list(range(1, 91))
    server.kill()
    train(again, range(91, 101))
    server.start()
    again.end()
    assert not again.has_pending
    assert steps(again) == list(range(1, 101))
    assert steps(again, "eval/loss") == list(range(10, 101, 10))
    assert (Path(again.client.download_artifacts(again.run_id, "texts/late.txt"))).read_text() == "late"
    run = again.client.get_run(again.run_id)
    assert (run.info.status, run.data.tags[OUTCOME]) == ("FINISHED", "finished")

    # The second one ended while the server was down.
    MlflowLogger(server.uri, second).flush()
    found = MlflowClient(server.uri).search_runs([experiment])
    assert {(run.info.run_name, run.info.status) for run in found} == {("first", "FINISHED"), ("second", "FAILED")}
    assert steps(MlflowLogger(server.uri, second)) == list(range(1, 11))


def test_sweep_that_lost_its_tracking_server_has_correct_status_and_model_after_a_resume(
    server: Server, learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_logger, "RETRY", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    sweep, client = tmp_path / "runs" / "sweeps" / "night", MlflowClient(server.uri)
    experiment, again = open_experiment(server.uri, "x", tmp_path / "runs"), "tune.py --resume night"
    points = {"finished": {"lr": 0.1}, "stopped by the scheduler": {"lr": 0.2}, "failed": {"lr": 0.3}}
    folders = {state: make_trial_folder(sweep, point) for state, point in points.items()}

    def begin() -> MlflowLogger:
        return MlflowLogger.start(server.uri, experiment, "night", trial="night", folder=sweep)

    def start(state: str, parent: MlflowLogger) -> MlflowLogger:
        told = {"parent": parent.run_id, "trial": trial_id_of(folders[state]), "folder": folders[state]}
        return MlflowLogger.start(server.uri, experiment, state, **told)

    def end(parent: MlflowLogger) -> None:
        parent.results({"best/eval/loss": 0.5}, 0)
        parent.artifact("<p>", "report.html")
        parent.end(wait=0)
        log_best_model(TrackingSettings(registered_as="brains"), server.uri, sweep, learnt, again)

    parent = begin()
    trials = [start(state, parent) for state in ("finished", "stopped by the scheduler")]
    server.kill()
    trials.append(start("failed", parent))  # the server does not know it
    for step, tracker in enumerate(trials, 1):
        tracker.metrics({"train/loss": 1.0}, step)
        tracker.flush()
    trials[0].end(wait=0)
    for state, folder in folders.items():  # as the sweep's monitor does, whose workers could not
        save_outcome(folder, state)
        close_run(server.uri, folder, STATUS.get(state, "FINISHED"), state)
    end(parent)
    assert f"note: {learnt} was not logged as a model in MLflow: " in (said := capsys.readouterr().err)
    assert said.endswith(f"; {again} logs it\n")

    server.start()
    for _ in range(2):
        parent = begin()
        with Monitor(sweep, parent, 3, TuneSettings()):
            end(parent)
    assert "note: " not in capsys.readouterr().err
    found = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert len(client.search_runs([experiment])) == 4
    assert {name: (run.info.status, run.data.tags[OUTCOME]) for name, run in found.items()} == {
        "night": ("FINISHED", "finished"),
        "finished": ("FINISHED", "finished"),
        "stopped by the scheduler": ("KILLED", "stopped by the scheduler"),
        "failed": ("FAILED", "failed"),
    }
    night = found.pop("night")
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {night.info.run_id}
    assert [steps(tracker) for tracker in (MlflowLogger(server.uri, folder) for folder in folders.values())] == [
        [1],
        [2],
        [3],
    ]
    assert [value.value for value in client.get_metric_history(night.info.run_id, "best/eval/loss")] == [0.5]
    assert len(client.search_model_versions("name = 'brains'")) == 1


HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def test_locked_tracking_database_gets_all_events_later(
    uri: str, experiment: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    logger = MlflowLogger.start(uri, experiment, "x", folder=tmp_path / "one")
    words = [sys.executable, "-c", HOLD, uri.removeprefix("sqlite:///")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        logger.metrics({"train/loss": 2.0}, 1)
        logger.flush()  # MLflow gives up after 20 s
        assert logger.has_pending
        holder.communicate()  # it releases the lock
    logger.end()
    assert steps(logger) == [1]
    assert capfd.readouterr().err.startswith(f"note: MLflow at {uri} does not answer; unsent events stay in ")

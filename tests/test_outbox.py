"""The outbox: in order, once, whole, and there after whatever ends a process."""

import json
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.environment_variables import (
    MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
)

from umbrella.base import UserError
from umbrella.tracking import runs, store
from umbrella.tracking.outbox import Outbox
from umbrella.tracking.runs import Tracker
from umbrella.tracking.store import PATIENCE, open_experiment


def test_messages_are_sent_in_order_and_those_behind_a_failure_stay(tmp_path: Path) -> None:
    box, sent, down = Outbox(tmp_path), [], True

    def send(message: Any) -> None:
        if message["n"] == 2 and down:
            raise ConnectionError
        sent.append(message["n"])

    for n in range(4):
        box.put({"n": n})
    with pytest.raises(ConnectionError):
        box.drain(send)
    assert (sent, [message["n"] for message in box.waiting()]) == ([0, 1], [2, 3])
    down = False
    Outbox(tmp_path).put({"n": 4})  # of another process
    box.drain(send)
    assert (sent, box.waiting(), box.file.exists()) == ([0, 1, 2, 3, 4], [], False)


def test_what_comes_while_others_are_sent_is_sent_too_and_by_one_alone(tmp_path: Path) -> None:
    box, sent = Outbox(tmp_path), []

    def send(message: Any) -> None:
        sent.append(message["n"])
        if message["n"] < 3:
            other = Outbox(tmp_path)
            other.put({"n": message["n"] + 1})
            other.drain(lambda unused: pytest.fail("two send at once"))

    box.put({"n": 0})
    box.drain(send)
    assert (sent, box.waiting()) == ([0, 1, 2, 3], [])


def test_half_a_line_of_a_process_that_was_killed_is_no_message(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    box.put({"n": 0})
    with box.file.open("ab") as file:
        file.write(b'{"n": 1, "val')
    assert box.waiting() == [{"n": 0}]
    box.put({"n": 2, "value": float("nan")})
    assert [message["n"] for message in box.waiting()] == [0, 2]


@contextmanager
def silent_server(answers: bool) -> Iterator[str]:
    """The address of a port that refuses, or of one that takes a connection and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("answers", [False, True])
def test_a_dead_server_costs_a_training_a_moment_once_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    with silent_server(answers) as uri:
        began = time.monotonic()
        tracker = Tracker.start(uri, "1", "x", trial="one", folder=tmp_path)
        first = time.monotonic() - began
        assert first < 5  # a second for each of two tries, and a second between them
        tracker.watch_system()
        began = time.monotonic()
        for step in range(100):
            tracker.metrics({"train/loss": 1.0}, step)
            tracker.flush()
        tracker.text("late", "late.txt")
        assert time.monotonic() - began < 2
        assert tracker.history("train/loss") == []
        with pytest.raises(UserError, match=r"does not answer, so the run has no id yet"):
            print(tracker.run_id)
        tracker.end(wait=0)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"note: MLflow at {uri} does not answer: kept in {tracker.outbox.file}, sent later"
    assert len(said) == 2, said
    assert "still does not answer; what it missed stays in" in said[1]
    kinds = [message["do"] for message in tracker.outbox.waiting()]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    assert {"metrics", "file"} == set(kinds[1:-1])


def test_mlflows_client_gives_up_within_half_a_minute_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PATIENCE:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "99")
    assert store.__file__
    runpy.run_path(store.__file__)
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 99
    tries = 1 + MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()
    assert tries * int(PATIENCE["MLFLOW_HTTP_REQUEST_TIMEOUT"]) + MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR.get() < 35


def test_a_server_that_is_down_at_the_start_is_named_before_anything_starts(tmp_path: Path) -> None:
    with (
        silent_server(False) as uri,
        pytest.raises(UserError, match=rf"^MLflow at {uri}: .*; start it, or name another one: tracking\.uri=\.\.\.$"),
    ):
        open_experiment(uri, "x", tmp_path)


WRITERS = """
import os, sys
import alembic.command, mlflow.store.tracking.sqlalchemy_store  # once, and not in each
from umbrella.tracking.runs import Tracker
uri, experiment, folder = sys.argv[1:]
children = []
for number in range(8):
    child = os.fork()
    if not child:
        try:
            tracker = Tracker.start(uri, experiment, f"trial {number}", trial=str(number), folder=f"{folder}/{number}")
            tracker.params({f"p{i}": i for i in range(100)})
            for step in range(1, 301):
                tracker.metrics({"train/loss": number + step / 1000, "train/lr": 0.1}, step)
                if step % 30 == 0:
                    tracker.metrics({"eval/loss": step}, step)
                    tracker.flush()
            tracker.end()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_eight_trials_that_write_at_once_to_one_sqlite_file_lose_nothing_and_say_nothing(
    mlflow_store: Callable[[Path], str], tmp_path: Path
) -> None:
    uri = mlflow_store(tmp_path)
    experiment = open_experiment(uri, "eight", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WRITERS, uri, experiment, str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    client = MlflowClient(uri)
    found = client.search_runs([experiment])
    assert {(run.info.run_name, run.info.status) for run in found} == {(f"trial {i}", "FINISHED") for i in range(8)}
    for run in found:
        number = int(run.info.run_name.split()[1])
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [(m.step, m.value) for m in history] == [(step, number + step / 1000) for step in range(1, 301)]
        assert [m.step for m in client.get_metric_history(run.info.run_id, "eval/loss")] == list(range(30, 301, 30))
        assert len(run.data.params) == 100


HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_database_that_is_locked_for_longer_than_mlflow_waits_gets_everything_later(
    mlflow_store: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(runs, "RETRY", 0.0)
    uri = mlflow_store(tmp_path)
    tracker = Tracker.start(uri, open_experiment(uri, "x", tmp_path), "x", folder=tmp_path)
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.flush()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "mlflow.db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    tracker.metrics({"train/loss": 2.0}, 2)
    tracker.flush()  # MLflow gives up after 20 s
    assert tracker.outbox.waiting()
    holder.communicate()  # it lets go
    tracker.end()
    assert tracker.history("train/loss") == [(1, 1.0), (2, 2.0)]
    said = capfd.readouterr()
    assert "is locked" not in said.out + said.err
    assert said.err.startswith(f"note: MLflow at {uri} does not answer: kept in ")


KILLED = """
import os, signal, sys
from umbrella.tracking.runs import Tracker
uri, experiment, folder, where = sys.argv[1:]
tracker = Tracker.start(uri, experiment, "x", trial="one", folder=folder)
for step in range(1, 8):
    tracker.metrics({"train/loss": float(step)}, step)
tracker.flush()
die = lambda *unused: os.kill(os.getpid(), signal.SIGKILL)
for step in range(8, 11):
    tracker.metrics({"train/loss": float(step)}, step)
if where == "written":  # to the outbox, but not sent
    tracker.outbox.drain = die
elif where == "sent":  # but not taken from the outbox
    tracker.outbox._drop = die
tracker.flush()
die()
"""


@pytest.mark.parametrize("where", ["written", "sent"])
def test_a_process_that_is_killed_as_it_writes_leaves_each_step_once(
    mlflow_store: Callable[[Path], str], tmp_path: Path, where: str
) -> None:
    uri = mlflow_store(tmp_path)
    experiment = open_experiment(uri, "x", tmp_path)
    folder = tmp_path / "training"
    done = subprocess.run([sys.executable, "-c", KILLED, uri, experiment, str(folder), where])
    assert done.returncode == -signal.SIGKILL
    (waiting,) = Outbox(next(folder.rglob("outbox.jsonl")).parent).waiting()
    assert waiting["until"] == 10

    again = Tracker.start(uri, experiment, "x", trial="one", folder=folder)
    for step in range(5, 13):  # the checkpoint was of step 4
        again.metrics({"train/loss": float(step)}, step)
    again.end()
    assert again.history("train/loss") == [(step, float(step)) for step in range(1, 13)]
    assert json.loads(next(folder.rglob("run.json")).read_text(encoding="utf-8"))["until"] == 12

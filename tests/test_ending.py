"""How a run ended is true in MLflow, also of what was killed; and what lives, or is of others, is left alone."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from umbrella.tracking.delivery import OUTCOME
from umbrella.tracking.drivers import announce, driver_id, gone
from umbrella.tracking.ending import close_trial, mend
from umbrella.tracking.runs import DRIVER, Tracker

SCRIPT = """
import sys, time
from umbrella.tracking.drivers import announce, driver_id, gone
from umbrella.tracking.ending import mend
from umbrella.tracking.runs import Tracker
uri, experiment, storage, name = sys.argv[1:]
mend(uri, experiment, storage)
for kind in ("parent", "trial"):
    tracker = Tracker.start(uri, experiment, f"{name} {kind}", trial=f"{name}.{kind}", folder=f"{storage}/trainings/{name}.{kind}")
tracker.metrics({"train/loss": 1.0}, 1)
tracker._put({"do": "metrics", "values": [["train/loss", 2.0, 5, 2]], "until": 2})  # not sent
print("running", flush=True)
time.sleep(600)
"""  # noqa: E501


def test_runs_of_a_script_that_was_killed_become_killed_and_all_others_stay(
    uri: str, experiment: str, tmp_path: Path
) -> None:
    def start(name: str, storage: Path) -> subprocess.Popen:
        words = [sys.executable, "-c", SCRIPT, uri, experiment, str(storage), name]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    def states() -> dict[str, str]:
        return {run.info.run_name: run.info.status for run in client.search_runs([experiment])}

    client = MlflowClient(uri)
    killed, lives, elsewhere = start("killed", tmp_path), start("lives", tmp_path), start("elsewhere", tmp_path / "b")
    for script in (killed, lives, elsewhere):
        assert script.stdout is not None
        assert script.stdout.readline() == "running\n"
    foreign = Tracker.start(uri, experiment, "another host", driver="another-host 1 0.00")
    (tmp_path / ".drivers" / f"sqlite-{experiment}" / "another-host 1 0.00").touch()  # nobody here can see its lock
    try:
        mend(uri, experiment, tmp_path)
        assert set(states().values()) == {"RUNNING"}
        for script in (killed, elsewhere):
            script.send_signal(signal.SIGKILL)
            script.wait()
        mend(uri, experiment, tmp_path)
        expected = dict.fromkeys(("lives parent", "lives trial", "another host", "elsewhere parent"), "RUNNING")
        expected |= {"elsewhere trial": "RUNNING", "killed parent": "KILLED", "killed trial": "KILLED"}
        assert states() == expected
    finally:
        lives.kill()
        lives.wait()
    run = next(run for run in client.search_runs([experiment]) if run.info.run_name == "killed trial")
    assert run.data.tags[OUTCOME] == "its script was killed"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [2], "what waited was sent"

    again = Tracker.start(
        uri, experiment, "killed trial", trial="killed.trial", folder=tmp_path / "trainings/killed.trial"
    )
    assert again.run_id == run.info.run_id
    again.end()
    mend(uri, experiment, tmp_path)
    states_now = states()
    assert (states_now["killed trial"], states_now["lives trial"]) == ("FINISHED", "KILLED")
    assert client.get_run(foreign.run_id).data.tags[DRIVER] == "another-host 1 0.00"


def test_a_script_may_open_a_storage_again_that_was_moved_while_it_lives(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    announce(old, "x")
    old.rename(new)
    announce(new, "x")
    assert list(gone(new, "x")) == []
    assert [path.name for path in (new / ".drivers" / "x").iterdir()] == [driver_id()]


def test_closing_a_training_ends_a_running_run_and_leaves_an_ended_one(
    uri: str, experiment: str, tmp_path: Path
) -> None:
    client = MlflowClient(uri)
    worker = Tracker.start(uri, experiment, "stopped", trial="stopped", folder=tmp_path / "stopped")
    close_trial(uri, tmp_path / "stopped", "KILLED", "stopped early")
    run = client.get_run(worker.run_id)
    assert (run.info.status, run.data.tags[OUTCOME]) == ("KILLED", "stopped early")
    close_trial(uri, tmp_path / "stopped", "FAILED", "failed")
    run = client.get_run(worker.run_id)
    assert (run.info.status, run.data.tags[OUTCOME]) == ("KILLED", "stopped early")
    close_trial(uri, tmp_path / "never started", "FAILED", "failed")
    assert not (tmp_path / "never started").exists()


def test_a_training_that_is_closed_while_the_store_is_down_is_closed_when_it_is_back(
    uri: str, experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    down = "http://127.0.0.1:9"  # nobody listens to it
    Tracker.start(down, experiment, "x", trial="x", folder=tmp_path / "x").flush()
    close_trial(down, tmp_path / "x", "FAILED", "failed")
    (mail,) = (tmp_path / "x").rglob("outbox.jsonl")
    (tmp_path / "x" / "tracking" / "sqlite").mkdir()
    mail.rename(tmp_path / "x" / "tracking" / "sqlite" / mail.name)  # it is back, as another store
    Tracker(uri, tmp_path / "x").flush()
    (run,) = MlflowClient(uri).search_runs([experiment])
    assert (run.info.status, run.data.tags[OUTCOME]) == ("FAILED", "failed")

"""A run in MLflow: which run belongs to a folder, one value per step, its status, and what an outage costs."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.tracking import mlflow_logger
from umbrella.tracking.mlflow_logger import KEY, OUTCOME, PARENT, TRIAL, MlflowLogger, run_key
from umbrella.tracking.runs import close_run, find_run
from umbrella.tracking.store import open_experiment
from umbrella.training.launch import LANGUAGE_MODEL
from umbrella.training.run import check_unchanged
from umbrella.training.task import Job
from umbrella.tuning.monitor import Monitor
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import FAILED, STOPPED, make_trial_folder, save_outcome


@pytest.fixture
def start(uri: str, experiment: str, tmp_path: Path) -> Callable[..., MlflowLogger]:
    """Begins or continues the run of a folder below this test's, in its store."""
    return lambda folder="one", **more: MlflowLogger.start(uri, experiment, "a run", folder=tmp_path / folder, **more)


def train(logger: MlflowLogger, steps: range) -> None:
    """Log a loss at each step and an evaluation at each second one."""
    for step in steps:
        logger.metrics({"train/loss": float(step)}, step)
        if step % 2 == 0:
            logger.metrics({"eval/loss": step / 2}, step)
            logger.flush()


def values(logger: MlflowLogger, name: str = "train/loss") -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in logger.client.get_metric_history(logger.run_id, name)]


def copied(folder: Path, to: Path) -> None:
    """Copy a folder to another machine as checkpoint_sync does: without names that begin with a dot."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)


def test_what_is_logged_is_read_back(start: Callable[..., MlflowLogger], client: MlflowClient, tmp_path: Path) -> None:
    logger = start(parent="f" * 32, trial="sweep-one")
    requests = []
    write = logger.client.log_batch

    def watch(run_id: str, **entities: list) -> None:
        requests.append({kind: len(some) for kind, some in entities.items()})
        write(run_id, **entities)

    logger.client.log_batch = watch
    logger.params({f"group.setting_{i}": i for i in range(230)})
    logger.params({"group.setting_0": "changed", "optim.lr": 1e-05})
    for step in range(1300):
        logger.metrics({"train/loss": 1 / (step + 1)}, step)
    logger.metrics({"train/grad_norm": float("nan")}, 3)
    assert client.get_run(logger.run_id).data.metrics == {}, "collected, not yet logged"
    logger.text("loss: Σ", "texts/statement.txt")
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "model").write_text("weights")
    logger.folder_artifact(tmp_path / "step_1", "checkpoint")
    logger.end()

    # A server refuses more than 100 parameters or 1000 metrics in a request, which SQLite does not.
    sizes = [{"params": 100}, {"params": 100}, {"params": 30}, {"params": 1}, {"metrics": 1000}, {"metrics": 301}]
    assert requests == [*sizes, {"tags": 1}]
    run = client.get_run(logger.run_id)
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert run.data.params == {f"group.setting_{i}": str(i) for i in range(230)} | {"optim.lr": "1e-05"}
    assert values(logger) == [(step, 1 / (step + 1)) for step in range(1300)]
    assert logger.history("train/loss", "eval/loss") == {"train/loss": values(logger)}
    assert run.data.tags.items() >= {PARENT: "f" * 32, TRIAL: "sweep-one", OUTCOME: "finished"}.items()
    assert (
        Path(client.download_artifacts(logger.run_id, "texts/statement.txt")).read_text(encoding="utf-8") == "loss: Σ"
    )
    assert [file.path for file in client.list_artifacts(logger.run_id, "checkpoint")] == ["checkpoint/model"]


def test_a_result_that_changed_is_logged_again_and_one_that_did_not_is_there_once(
    start: Callable[..., MlflowLogger], client: MlflowClient
) -> None:
    name = "best/eval/balanced_accuracy"
    for best in (0.75, 0.75, 0.5):
        logger = start()
        logger.results({name: best}, 0)
        logger.end()
        assert client.get_run(logger.run_id).data.metrics == {name: best}
    assert values(logger, name) == [(0, 0.75), (0, 0.5)]


def test_a_run_belongs_to_a_folder_and_not_to_a_name(
    start: Callable[..., MlflowLogger], client: MlflowClient, tmp_path: Path
) -> None:
    first = start("sweeps/night")
    trials = [start(f"sweeps/night/trials/{name}", parent=first.run_id) for name in "ab"]
    others = [start(folder) for folder in ("trainings/night", "colleague/sweeps/night")]
    ids = [logger.run_id for logger in (first, *trials, *others)]
    assert len(set(ids)) == 5
    first.end("FAILED", "failed")
    assert start("sweeps/night").run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    shutil.rmtree(tmp_path / "trainings")
    assert start("trainings/night").run_id not in ids, "it was deleted, and begins again"


@pytest.mark.parametrize("of", ["training", "trial"])
def test_a_run_whose_id_was_not_noted_is_found_by_its_key_here_and_on_another_machine(
    uri: str, experiment: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, of: str
) -> None:
    here, elsewhere = tmp_path / "here" / "night", tmp_path / "elsewhere" / "night"
    parent = "f" * 32 if of == "trial" else None
    if of == "training":  # as it is begun, before a worker is asked for
        check_unchanged(
            Job(
                task=LANGUAGE_MODEL,
                settings=load_settings(),
                data={"data.fingerprint": ""},
                tracking={},
                folder=str(here),
            )
        )
    else:
        here.mkdir(parents=True)
    copied(here, elsewhere)  # the last upload before the machine is lost
    save_state = MlflowLogger._save_state

    def die(logger: MlflowLogger, **values: Any) -> None:
        if "run_id" in values:
            raise SystemExit
        save_state(logger, **values)

    monkeypatch.setattr(MlflowLogger, "_save_state", die)
    with pytest.raises(SystemExit):
        MlflowLogger.start(uri, experiment, "night", folder=here, parent=parent)
    monkeypatch.undo()
    (made,) = client.search_runs([experiment])
    for folder in (here, elsewhere):
        assert made.data.tags[KEY] == run_key(folder, parent)
        assert MlflowLogger.start(uri, experiment, "night", folder=folder, parent=parent).run_id == made.info.run_id
    assert len(client.search_runs([experiment])) == 1


@pytest.mark.parametrize("place", ["here", "another machine"])
def test_a_training_that_is_resumed_before_its_last_metrics_has_one_value_per_step(
    start: Callable[..., MlflowLogger], tmp_path: Path, place: str
) -> None:
    first = start("here/x")
    train(first, range(1, 4))
    copied(tmp_path / "here", tmp_path / "another machine")
    train(first, range(4, 6))  # killed: step 5 was never logged
    again = start(f"{place}/x")
    train(again, range(3, 9))  # its checkpoint was of step 2
    again.end()
    assert again.run_id == first.run_id
    expected = {
        "train/loss": [(step, float(step)) for step in range(1, 9)],
        "eval/loss": [(step, step / 2) for step in (2, 4, 6, 8)],
    }
    assert {name: values(again, name) for name in expected} == expected
    assert again.history(*expected) == expected


KILLED = """
import os, signal, sys
import alembic.command, mlflow.store.tracking.sqlalchemy_store  # once, and not in each
from umbrella.tracking.mlflow_logger import MlflowLogger
uri, experiment, folder, *places = sys.argv[1:]
for where in places:
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        continue
    logger = MlflowLogger.start(uri, experiment, "x", folder=f"{folder}/{where}")
    logger.metrics({f"train/{name}": 1.0 for name in range(8)}, 1)
    logger.flush()
    die = lambda *unused, **more: os.kill(os.getpid(), signal.SIGKILL)
    if where == "written":  # to the file, but not sent
        logger._send = die
    elif where == "sent":  # but not noted as acknowledged
        logger._save_state = die
    logger.metrics({f"train/{name}": 2.0 for name in range(8)}, 2)
    if where == "half a line":
        with logger.file.open("ab") as file:
            file.write(b'{"do": "metrics", "values": [["train/0", 2.0')
        die()
    logger.flush()
    os._exit(1)
"""


def test_a_process_that_is_killed_as_it_logs_leaves_each_step_once(
    uri: str, experiment: str, tmp_path: Path, start: Callable[..., MlflowLogger]
) -> None:
    places = ["half a line", "written", "sent"]
    subprocess.run([sys.executable, "-c", KILLED, uri, experiment, str(tmp_path), *places], check=True)
    for place in places:
        again = start(place)
        for step in (1, 2, 3):
            again.metrics({f"train/{name}": float(step) for name in range(8)}, step)
        again.end()
        for name in range(8):
            assert values(again, f"train/{name}") == [(1, 1.0), (2, 2.0), (3, 3.0)], place
        begun = [event for event, _ in again._events() if event["do"] == "start"]
        assert len(begun) == 2, f"none is lost in {place}"


WRITERS = """
import os, sys, traceback
import alembic.command, mlflow.store.tracking.sqlalchemy_store  # once, and not in each
from umbrella.tracking.mlflow_logger import MlflowLogger
uri, experiment, folder = sys.argv[1:]
children = []
for number in range(8):
    child = os.fork()
    if not child:
        try:
            logger = MlflowLogger.start(uri, experiment, f"trial {number}", folder=f"{folder}/{number}")
            logger.params({f"p{i}": i for i in range(100)})
            for step in range(1, 101):
                logger.metrics({"train/loss": number + step / 1000, "train/lr": 0.1}, step)
                if step % 10 == 0:
                    logger.metrics({"eval/loss": step}, step)
                    logger.flush()
            logger.end()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_eight_trials_that_write_to_one_sqlite_file_at_once_lose_nothing(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", WRITERS, uri, experiment, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    found = client.search_runs([experiment])
    assert {(run.info.run_name, run.info.status) for run in found} == {(f"trial {i}", "FINISHED") for i in range(8)}
    for run in found:
        number = int(run.info.run_name.split()[1])
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [(m.step, m.value) for m in history] == [(step, number + step / 1000) for step in range(1, 101)]
        assert [m.step for m in client.get_metric_history(run.info.run_id, "eval/loss")] == list(range(10, 101, 10))
        assert len(run.data.params) == 100


@pytest.mark.parametrize("what", ["deleted run", "another store"])
def test_a_run_that_the_store_does_not_have_begins_again_with_all_that_was_logged_and_a_note(
    mlflow_store: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture, what: str
) -> None:
    def begin() -> MlflowLogger:
        return MlflowLogger.start(uri, open_experiment(uri, "x", tmp_path), "x", folder=tmp_path / "night")

    uri = mlflow_store(tmp_path)
    first = begin()
    first.params({"optim.lr": 0.1})
    first.text("told", "told.txt")
    train(first, range(1, 5))
    first.results({"test/loss": 1.0}, 4)
    first.end()
    if what == "deleted run":
        first.client.delete_run(first.run_id)
    else:
        (tmp_path / "other").mkdir()
        uri = mlflow_store(tmp_path / "other")
    capsys.readouterr()
    again = begin()
    assert capsys.readouterr().err == (
        f"note: MLflow at {uri} does not have the run {first.run_id} of x any more; the run {again.run_id} gets all"
        " that was logged so far\n"
    )
    train(again, range(4, 7))
    again.end()
    assert values(again) == [(step, float(step)) for step in range(1, 7)]
    (run,) = again.client.search_runs([again.experiment])
    assert (run.info.run_id, run.info.status, run.info.start_time) == (again.run_id, "FINISHED", again._begun)
    assert run.data.params == {"optim.lr": "0.1"}
    assert run.data.metrics == {"train/loss": 6.0, "eval/loss": 3.0, "test/loss": 1.0}
    assert [file.path for file in again.client.list_artifacts(run.info.run_id)] == ["told.txt"]
    if what == "deleted run":
        again.client.restore_run(first.run_id)
    assert begin().run_id == again.run_id


def test_a_run_that_is_deleted_during_a_training_is_named_once_and_the_training_goes_on(
    start: Callable[..., MlflowLogger], uri: str, client: MlflowClient, capsys: pytest.CaptureFixture
) -> None:
    logger = start()
    client.delete_run(logger.run_id)
    train(logger, range(1, 7))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: MLflow at {uri} refuses an event: ")
    assert line.endswith(f"; it stays in {logger.file}")
    again = start()
    assert values(again) == [(step, float(step)) for step in range(1, 7)]


def test_an_artifact_that_cannot_be_stored_is_named_and_the_training_goes_on(
    start: Callable[..., MlflowLogger], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "artifacts").write_text("in the way of a folder")
    logger = start()
    logger.text("one", "one.txt")
    train(logger, range(1, 3))
    assert "Not a directory" in capsys.readouterr().err
    assert values(logger) == [(1, 1.0), (2, 2.0)]


class Silent:
    """A server that takes connections and hangs up, and counts them."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen(50)
        self.uri = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.asked = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.asked += 1
            connection.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = Silent()
    yield server
    server.socket.shutdown(socket.SHUT_RDWR)
    server.socket.close()


def test_a_server_that_is_down_is_asked_once_and_again_later_and_costs_one_note(
    silent: Silent, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_logger, "RETRY", 3600.0)
    logger = MlflowLogger.start(silent.uri, "1", "x", folder=tmp_path)
    logger.watch_system()
    asked = silent.asked
    assert asked > 0
    train(logger, range(1, 101))
    logger.text("late", "late.txt")
    assert silent.asked == asked
    assert len(logger.history("train/loss")["train/loss"]) == 100
    with pytest.raises(UserError, match=r"does not answer, so the run has no id yet"):
        print(logger.run_id)
    logger._next_try = 0.0  # later
    logger.flush()
    assert silent.asked > asked
    logger.end(wait=0)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"note: MLflow at {silent.uri} does not answer; unsent events stay in {logger.file}",
        f"note: MLflow at {silent.uri} still does not answer; the rest stays in {logger.file} and is sent when this run"
        " is resumed",
    ]
    kinds = [json.loads(line)["do"] for line in logger.file.read_text().splitlines()]
    assert kinds == ["start", *["metrics"] * 50, "file", "end"]


def test_a_script_refuses_to_start_where_the_server_does_not_answer(silent: Silent, tmp_path: Path) -> None:
    expected = rf"^MLflow at {silent.uri}: .*; start it, or name another one: tracking\.uri=\.\.\.$"
    with pytest.raises(UserError, match=expected):
        open_experiment(silent.uri, "x", tmp_path)


def test_a_run_that_ends_while_the_server_is_down_is_sent_when_it_is_resumed(
    silent: Silent, uri: str, experiment: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = MlflowLogger.start(silent.uri, experiment, "x", folder=tmp_path / "one")
    train(down, range(1, 5))
    close_run(silent.uri, tmp_path / "one", "FAILED", "failed")
    monkeypatch.setattr(mlflow_logger, "store_id", lambda unused: down._state_file.name[1:-5])  # it is back
    close_run(uri, tmp_path / "one", "KILLED", "killed")
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.data.tags[OUTCOME]) == ("FAILED", "failed")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]


def test_closing_a_run_ends_one_that_is_running_and_leaves_one_that_ended(
    start: Callable[..., MlflowLogger], uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    logger = start()
    for status, outcome in (("KILLED", "stopped early"), ("FAILED", "failed")):
        close_run(uri, tmp_path / "one", status, outcome)
        run = client.get_run(logger.run_id)
        assert (run.info.status, run.data.tags[OUTCOME]) == ("KILLED", "stopped early")
    close_run(uri, tmp_path / "never started", "FAILED", "failed")
    assert not (tmp_path / "never started").exists()


@pytest.mark.parametrize("store", ["the same", "another"])
def test_a_sweep_that_is_resumed_repairs_the_runs_that_its_killed_script_left(
    mlflow_store: Callable[[Path], str], tmp_path: Path, store: str
) -> None:
    sweep = tmp_path / "sweeps" / "night"
    outcomes = {STOPPED: "KILLED", FAILED: "FAILED", "finished": "FINISHED", "its script was killed": "KILLED"}

    def begin(place: str) -> MlflowLogger:
        (tmp_path / place).mkdir(exist_ok=True)
        uri = mlflow_store(tmp_path / place)
        return MlflowLogger.start(uri, open_experiment(uri, "x", tmp_path / place), "night", folder=sweep)

    parent = begin("the same")
    for number, outcome in enumerate(outcomes):
        folder = make_trial_folder(sweep, outcome, {"lr": number})
        trial = MlflowLogger.start(parent.uri, parent.experiment, outcome, folder=folder, parent=parent.run_id)
        train(trial, range(1, 3))
        if outcome in (STOPPED, FAILED, "finished"):
            save_outcome(folder, outcome)
        if outcome == "finished":
            trial.end()
    again = parent if store == "the same" else begin("another")
    with Monitor(sweep, again, 4, TuneSettings()):
        runs = again.client.search_runs([again.experiment], f"tags.`{PARENT}` = '{again.run_id}'")
    assert {run.data.tags[OUTCOME]: run.info.status for run in runs} == outcomes
    assert {run.info.run_name for run in runs} == set(outcomes)
    assert all(run.data.metrics == {"train/loss": 2.0, "eval/loss": 1.0} for run in runs)


def test_the_run_of_a_training_that_is_over_is_found_unless_the_store_does_not_have_it(
    start: Callable[..., MlflowLogger], mlflow_store: Callable[[Path], str], uri: str, tmp_path: Path, silent: Silent
) -> None:
    logger = start()
    found = find_run(uri, tmp_path / "one")
    assert found is not None
    assert found.run_id == logger.run_id
    assert find_run(uri, tmp_path / "no training") is None
    assert find_run(silent.uri, tmp_path / "one") is None, "another store"
    logger.client.delete_run(logger.run_id)
    assert find_run(uri, tmp_path / "one") is None
    assert not (tmp_path / "no training").exists()


def test_system_metrics_are_logged_to_the_end_of_a_run_and_go_on_with_it(
    start: Callable[..., MlflowLogger],
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    seen = 0
    for steps in (range(1, 3), range(3, 5)):
        logger = start()
        logger.watch_system()
        train(logger, steps)
        while len(found := values(logger, "system/cpu_utilization_percentage")) < seen + 2:
            time.sleep(0.02)
        logger.end()
        seen = len(values(logger, "system/cpu_utilization_percentage"))
        assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]
    steps_seen = [step for step, _ in found]
    assert steps_seen == sorted(set(steps_seen))
    written = client.get_run(logger.run_id).data.metrics
    assert {"system/system_memory_usage_megabytes", "system/disk_usage_percentage"} <= written.keys()
    assert next(iter(written)).startswith("eval/"), "MLflow's compare page selects the first one"
    assert list(elsewhere.iterdir()) == [], "MLflow makes no database where the process stands"
    assert capfd.readouterr().err == ""

"""The logger of a run in MLflow: identity of the run, one value per step, final status, outages, system metrics."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from umbrella.base import UserError
from umbrella.tracking import mlflow_logger
from umbrella.tracking.mlflow_logger import KEY, OUTCOME, PARENT, TRIAL, MlflowLogger, close_run, find_run, run_key
from umbrella.tracking.store import open_experiment
from umbrella.tuning.monitor import Monitor
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import FAILED, STOPPED, make_trial_folder, save_outcome


@pytest.fixture
def start(uri: str, experiment: str, tmp_path: Path) -> Callable[..., MlflowLogger]:
    """Starts or resumes the run of a folder below ``tmp_path``."""
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


def upload(folder: Path, to: Path) -> None:
    """Copy a folder to another machine as checkpoint_sync does: without names that begin with a dot."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)


def test_everything_that_is_logged_can_be_read_from_mlflow(
    start: Callable[..., MlflowLogger], client: MlflowClient, tmp_path: Path
) -> None:
    logger = start(parent="f" * 32, trial="sweep-one")
    logger.params({f"group.setting_{i}": i for i in range(230)})  # more than fit into one request
    logger.params({"group.setting_0": "changed", "optim.lr": 1e-05})
    for step in range(1300):
        logger.metrics({"train/loss": 1 / (step + 1)}, step)
    logger.metrics({"train/grad_norm": float("nan")}, 3)
    assert client.get_run(logger.run_id).data.metrics == {}, "metrics are buffered until flush"
    logger.artifact("loss: Σ", "texts/statement.txt")
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "model").write_text("weights")
    logger.folder_artifact(tmp_path / "step_1", "checkpoint")
    for best in (0.75, 0.75, 0.5):
        logger.results({"best/eval/loss": best}, 0)
    logger.end()

    run = client.get_run(logger.run_id)
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert run.data.params == {f"group.setting_{i}": str(i) for i in range(230)} | {"optim.lr": "1e-05"}
    assert values(logger) == [(step, 1 / (step + 1)) for step in range(1300)]
    assert values(logger, "best/eval/loss") == [(0, 0.75), (0, 0.5)], "unchanged results are logged once"
    assert logger.history("train/loss", "eval/loss") == {"train/loss": values(logger)}
    assert run.data.tags.items() >= {PARENT: "f" * 32, TRIAL: "sweep-one", OUTCOME: "finished"}.items()
    statement = Path(client.download_artifacts(logger.run_id, "texts/statement.txt"))
    assert statement.read_text(encoding="utf-8") == "loss: Σ"
    assert [file.path for file in client.list_artifacts(logger.run_id, "checkpoint")] == ["checkpoint/model"]


def test_a_run_has_the_first_40_metrics_on_every_machine_that_continues_it(
    start: Callable[..., MlflowLogger], client: MlflowClient, tmp_path: Path
) -> None:
    logger = start()
    for step in (1, 2):
        logger.metrics({f"train/{i}": float(step) for i in range(30)}, step)
        logger.flush()
    logger.end()
    upload(tmp_path / "one", tmp_path / "elsewhere")
    for place in ("one", "elsewhere"):
        later = MlflowLogger(logger.uri, tmp_path / place, logger.experiment)
        later.results({f"test/{i}": 1.0 for i in range(20)}, 2)
        found = client.get_run(logger.run_id).data.metrics
        assert set(found) == {f"train/{i}" for i in range(30)} | {f"test/{i}" for i in range(10)}
    assert values(logger, "train/29") == [(1, 1.0), (2, 2.0)]
    later.results({"train/29": 3.0}, 3)
    assert values(logger, "train/29")[-1] == (3, 3.0), "a known metric is not left out"


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
    assert start("trainings/night").run_id not in ids, "a deleted folder starts a new run"


@pytest.mark.parametrize("parent", [None, "f" * 32], ids=["training", "trial"])
def test_a_run_whose_id_was_not_saved_is_found_by_its_key_on_any_machine(
    uri: str, experiment: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parent: str | None
) -> None:
    here, elsewhere = tmp_path / "here" / "night", tmp_path / "elsewhere" / "night"
    here.mkdir(parents=True)
    if not parent:  # before the first upload
        run_key(here)
    upload(here, elsewhere)
    save_state = MlflowLogger._save_state

    def die(logger: MlflowLogger, **values: Any) -> None:
        if "run_id" in values:
            raise SystemExit
        save_state(logger, **values)

    monkeypatch.setattr(MlflowLogger, "_save_state", die)
    with pytest.raises(SystemExit):
        MlflowLogger.start(uri, experiment, "night", folder=here, parent=parent)
    monkeypatch.undo()
    (created,) = client.search_runs([experiment])
    for folder in (here, elsewhere):
        assert created.data.tags[KEY] == run_key(folder, parent)
        assert MlflowLogger.start(uri, experiment, "night", folder=folder, parent=parent).run_id == created.info.run_id
    assert len(client.search_runs([experiment])) == 1


@pytest.mark.parametrize("place", ["here", "another machine"])
def test_a_training_that_repeats_steps_after_a_resume_has_one_value_per_step(
    start: Callable[..., MlflowLogger], tmp_path: Path, place: str
) -> None:
    first = start("here/x")
    train(first, range(1, 4))
    upload(tmp_path / "here", tmp_path / "another machine")
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


@pytest.mark.parametrize("moment", ["half a line is written", "the line is written", "the event is sent"])
def test_a_process_killed_while_it_logs_leaves_each_step_once(
    start: Callable[..., MlflowLogger], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def die(*unused: Any, **more: Any) -> None:
        raise SystemExit

    logger = start()
    train(logger, range(1, 3))
    if moment == "half a line is written":
        with logger.file.open("ab") as file:
            file.write(b'{"do": "metrics", "values": [["train/loss", 4.0')
    else:
        monkeypatch.setattr(logger, "_send" if moment == "the line is written" else "_save_state", die)
        with pytest.raises(SystemExit):
            train(logger, range(3, 5))
    again = start()
    train(again, range(3, 7))
    again.end()
    assert values(again) == [(step, float(step)) for step in range(1, 7)]
    assert values(again, "eval/loss") == [(2, 1.0), (4, 2.0), (6, 3.0)]


@pytest.mark.parametrize("missing", ["deleted run", "another store"])
def test_a_run_that_the_store_does_not_have_is_created_again_with_all_events_and_a_note(
    mlflow_store: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture, missing: str
) -> None:
    def begin() -> MlflowLogger:
        return MlflowLogger.start(uri, open_experiment(uri, "x", tmp_path), "x", folder=tmp_path / "night")

    uri = mlflow_store(tmp_path)
    first = begin()
    first.params({"optim.lr": 0.1})
    first.artifact("content", "file.txt")
    train(first, range(1, 5))
    first.results({"test/loss": 1.0}, 4)
    first.end()
    if missing == "deleted run":
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
    assert [file.path for file in again.client.list_artifacts(run.info.run_id)] == ["file.txt"]


@pytest.mark.parametrize("problem", ["deleted run", "no artifact folder"])
def test_refused_events_give_one_note_and_the_training_continues(
    start: Callable[..., MlflowLogger],
    uri: str,
    client: MlflowClient,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    problem: str,
) -> None:
    logger = start()
    if problem == "deleted run":
        client.delete_run(logger.run_id)
    else:
        (tmp_path / "artifacts").write_text("in the way of a folder")
    for number in range(2):
        logger.artifact("content", f"{number}.txt")
    train(logger, range(1, 7))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: MLflow at {uri} refuses an event: ")
    assert line.endswith(f"; it stays in {logger.file}")
    assert values(start()) == [(step, float(step)) for step in range(1, 7)], "a new run gets the events"


DOWN = "http://127.0.0.1:9"
"""Address of a server that does not answer."""


@pytest.fixture(autouse=True)
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def test_an_outage_costs_one_try_per_interval_and_one_note(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[None] = []
    connect = MlflowLogger._find_or_create
    monkeypatch.setattr(MlflowLogger, "_find_or_create", lambda logger: (tries.append(None), connect(logger)))
    monkeypatch.setattr(mlflow_logger, "RETRY", 3600.0)
    logger = MlflowLogger.start(DOWN, "1", "x", folder=tmp_path)
    logger.watch_system()
    train(logger, range(1, 101))
    logger.artifact("late", "late.txt")
    assert len(tries) == 1
    assert len(logger.history("train/loss")["train/loss"]) == 100
    with pytest.raises(UserError, match=r"does not answer, so the run has no id yet"):
        print(logger.run_id)
    logger._next_try = 0.0  # after the interval
    logger.flush()
    assert len(tries) == 2
    logger.end(wait=0)
    assert capsys.readouterr().err.splitlines() == [
        f"note: MLflow at {DOWN} does not answer; unsent events stay in {logger.file}",
        f"note: MLflow at {DOWN} still does not answer; the rest stays in {logger.file} and is sent when this run"
        " is resumed",
    ]
    kinds = [json.loads(line)["do"] for line in logger.file.read_text().splitlines()]
    assert kinds == ["start", *["metrics"] * 50, "file", "end"]


def test_a_run_that_ended_during_an_outage_is_sent_when_it_is_resumed(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = MlflowLogger.start(DOWN, experiment, "x", folder=tmp_path / "one")
    train(logger, range(1, 5))
    close_run(DOWN, tmp_path / "one", "FAILED", "failed")
    monkeypatch.setattr(mlflow_logger, "store_id", lambda unused: logger._state_file.name[1:-5])  # it is back
    close_run(uri, tmp_path / "one", "KILLED", "killed")
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.data.tags[OUTCOME]) == ("FAILED", "failed"), "it had ended before"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    close_run(uri, tmp_path / "never started", "FAILED", "failed")
    assert not (tmp_path / "never started").exists()


@pytest.mark.parametrize("store", ["the same", "another"])
def test_a_resumed_sweep_repairs_the_runs_of_its_killed_script(
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
        folder = make_trial_folder(sweep, {"lr": number})
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


def test_the_run_of_a_finished_training_is_found_if_the_store_has_it(
    start: Callable[..., MlflowLogger], uri: str, tmp_path: Path
) -> None:
    logger = start()
    found = find_run(uri, tmp_path / "one")
    assert found is not None
    assert found.run_id == logger.run_id
    assert find_run(uri, tmp_path / "no training") is None
    assert find_run(DOWN, tmp_path / "one") is None, "another store"
    logger.client.delete_run(logger.run_id)
    assert find_run(uri, tmp_path / "one") is None
    assert not (tmp_path / "no training").exists()


def test_system_metrics_are_logged_from_the_first_flush_to_the_end_of_each_attempt(
    start: Callable[..., MlflowLogger],
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
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
    assert os.listdir() == [], "no database in the working directory"
    assert capfd.readouterr().err == ""

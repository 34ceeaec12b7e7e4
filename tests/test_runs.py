"""Which run in MLflow is whose: one for each training or trial, however often, where and by whom it is started."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from umbrella.config import load_settings
from umbrella.tracking.delivery import TRIAL, Delivery
from umbrella.tracking.runs import Tracker
from umbrella.tracking.store import open_experiment
from umbrella.training.history import note
from umbrella.training.job import AnyJob
from umbrella.training.reporting import open_run
from umbrella.training.run import check_same


def test_a_trial_that_starts_again_continues_its_run(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    first = Tracker.start(uri, experiment, "lr=0.1", trial="one", folder=tmp_path / "one")
    first.metrics({"train/loss": 3.0}, 1)
    first.end("FAILED", "failed")
    again = Tracker.start(uri, experiment, "lr=0.1", trial="one", folder=tmp_path / "one")
    assert again.run_id == first.run_id
    assert client.get_run(again.run_id).info.status == "RUNNING"
    again.metrics({"train/loss": 2.0}, 2)
    again.end()
    assert [m.value for m in client.get_metric_history(again.run_id, "train/loss")] == [3.0, 2.0]
    other = Tracker.start(uri, experiment, "lr=0.1", trial="two", folder=tmp_path / "two")
    assert other.run_id != first.run_id
    assert len({Tracker.start(uri, experiment, "a sweep").run_id for _ in range(2)}) == 2  # no folder: always new
    assert len(client.search_runs([experiment])) == 4


def test_runs_of_one_name_are_one_only_where_their_folder_or_their_sweep_is(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    def start(folder: str, parent: str | None = None, trial: str = "night") -> str:
        return Tracker.start(uri, experiment, "night", parent=parent, trial=trial, folder=tmp_path / folder).run_id

    sweep, training, other = (start(place) for place in ("sweeps/night", "trainings/night", "colleague/sweeps/night"))
    trials = [start(f"{name}/trials/a", parent, "night-a") for name, parent in (("mine", sweep), ("theirs", other))]
    assert len({sweep, training, other, *trials}) == 5
    assert start("trainings/night") == training
    shutil.rmtree(tmp_path / "trainings")
    assert start("trainings/night") not in {sweep, training, other}, "it was deleted, and began again"
    assert len(client.search_runs([experiment])) == 6


@pytest.mark.parametrize("of", ["training", "trial"])
def test_a_run_that_was_made_and_not_remembered_is_found_here_and_on_another_machine(
    uri: str, experiment: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, of: str
) -> None:
    here, elsewhere = tmp_path / "here" / "night", tmp_path / "elsewhere" / "night"
    told: dict[str, Any] = {"name": "night", "trial": "night", "parent": "f" * 32 if of == "trial" else None}
    if of == "training":  # as it is begun, before a worker is asked for
        job = AnyJob(settings=load_settings(), data={"data.fingerprint": ""}, tracking={}, folder=str(here))
        check_same(job)
    else:
        here.mkdir(parents=True)
    shutil.copytree(here, elsewhere)  # what a mirror has when the machine is lost
    remember = Delivery.remember

    def die(delivery: Delivery, **values: Any) -> None:
        if "run_id" in values:
            raise SystemExit
        remember(delivery, **values)

    monkeypatch.setattr(Delivery, "remember", die)
    with pytest.raises(SystemExit):
        Tracker.start(uri, experiment, **told, folder=here)
    monkeypatch.undo()
    (made,) = client.search_runs([experiment])
    Tracker(uri, here).flush()  # its message comes again
    for folder in (here, elsewhere):
        assert Tracker.start(uri, experiment, **told, folder=folder).run_id == made.info.run_id
    assert len(client.search_runs([experiment])) == 1


def test_a_folder_of_before_there_were_keys_goes_on_with_its_run(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    run = client.create_run(experiment, tags={TRIAL: "night"})
    state = tmp_path / "tracking" / "sqlite" / "run.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"run_id": run.info.run_id, "until": 7}), encoding="utf-8")
    assert Tracker.start(uri, experiment, "night", trial="night", folder=tmp_path).run_id == run.info.run_id
    state.unlink()
    assert Tracker.start(uri, experiment, "night", trial="night", folder=tmp_path).run_id == run.info.run_id


def test_a_training_whose_database_is_another_one_now_has_a_new_run_with_its_evaluations_and_says_so(
    mlflow_store: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def train(machine: str, training: Path, *steps: int) -> tuple[MlflowClient, Tracker]:
        storage = tmp_path / machine
        storage.mkdir()
        uri = mlflow_store(storage)
        told = {"uri": uri, "experiment": open_experiment(uri, "x", storage), "name": "first", "trial": "first"}
        settings = load_settings(overrides={"resources.storage": str(storage)})
        job = AnyJob(settings=settings, data={}, tracking=told, folder=str(training))
        tracker = open_run(job, torch.device("cpu"), {})
        for step in steps:
            tracker.metrics({"train/loss": float(step)}, step)
            if step % 2 == 0:
                tracker.metrics({"eval/loss": step / 2}, step)
                tracker.flush()
                note(training, {"step": step, "steps": 8, "train/loss": float(step), "eval/loss": step / 2})
        return MlflowClient(uri), tracker

    training = tmp_path / "first"  # as it comes from a mirror
    training.mkdir()
    _, first = train("one", training, 1, 2, 3, 4)
    capsys.readouterr()
    client, again = train("two", training, 5, 6)
    again.end()
    assert again.run_id != first.run_id
    said = capsys.readouterr().err
    assert said.count("note: ") == 1
    assert f"has no run {first.run_id} of first: a new one begins" in said
    found = {name: client.get_metric_history(again.run_id, name) for name in ("train/loss", "eval/loss")}
    assert [(m.step, m.value) for m in found["eval/loss"]] == [(2, 1.0), (4, 2.0), (6, 3.0)]
    assert [m.step for m in found["train/loss"]] == [2, 4, 5, 6]
    assert client.get_run(again.run_id).info.status == "FINISHED"


def test_who_waited_for_the_store_goes_on_with_the_run_that_another_process_told_it_of(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    worker = Tracker(uri, tmp_path)
    driver = Tracker.start(uri, experiment, "x", folder=tmp_path)
    worker.tags({"said": "by the worker"})
    assert client.get_run(driver.run_id).data.tags["said"] == "by the worker"


@pytest.mark.parametrize(("place", "answers"), [("here", True), ("mirror", True), ("mirror", False)])
def test_a_run_that_goes_on_from_before_its_last_metrics_has_each_step_once(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path, monkeypatch: Any, place: str, answers: bool
) -> None:
    def train(tracker: Tracker, steps: range) -> None:
        for step in steps:
            tracker.metrics({"train/loss": float(step)}, step)
            if step % 2 == 0:
                tracker.metrics({"eval/loss": step / 2}, step)
                tracker.flush()

    first = Tracker.start(uri, experiment, "x", trial="killed", folder=tmp_path / "here")
    train(first, range(1, 4))
    shutil.copytree(tmp_path / "here", tmp_path / "mirror")
    train(first, range(4, 6))  # killed: what came after step 4 was never written
    with monkeypatch.context() as quiet:
        if not answers:
            quiet.setattr(Tracker, "_deliver", lambda self, again=False: None)
        again = Tracker.start(uri, experiment, "x", trial="killed", folder=tmp_path / place)
        train(again, range(3, 9))  # its checkpoint was of step 2
    again.end()
    assert again.run_id == first.run_id
    history = client.get_metric_history(again.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(step, float(step)) for step in range(1, 9)]
    assert [m.step for m in client.get_metric_history(again.run_id, "eval/loss")] == [2, 4, 6, 8]
    assert again.history("eval/loss") == [(2, 1.0), (4, 2.0), (6, 3.0), (8, 4.0)]


def test_a_run_that_is_gone_is_made_anew_with_all_its_steps(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    first = Tracker.start(uri, experiment, "x", trial="gone", folder=tmp_path / "a")
    first.metrics({"train/loss": 1.0}, 1)
    first.flush()
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("key"))
    known = next((tmp_path / "b").rglob("run.json"))
    known.write_text(known.read_text(encoding="utf-8").replace(first.run_id, "f" * 32), encoding="utf-8")
    again = Tracker.start(uri, experiment, "x", trial="not gone", folder=tmp_path / "b")
    again.metrics({"train/loss": 1.0}, 1)
    again.end()
    assert again.run_id not in (first.run_id, "f" * 32)
    assert [m.step for m in client.get_metric_history(again.run_id, "train/loss")] == [1]


def test_a_run_that_somebody_deleted_goes_on_as_a_new_one_and_the_way_back_is_said(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "night"
    first = Tracker.start(uri, experiment, "x", trial="deleted", folder=folder)
    first.metrics({"train/loss": 1.0}, 1)
    first.results({"best/eval/loss": 1.0}, 0)
    first.flush()
    client.delete_run(first.run_id)
    again = Tracker.start(uri, experiment, "x", trial="deleted", folder=folder)
    assert again.anew
    assert capsys.readouterr().err == (
        f"note: somebody deleted the run {first.run_id} of night in MLflow at {uri}: a new one begins; each step so far"
        f" is in the deleted one, which `mlflow runs restore --run-id {first.run_id}` brings back\n"
    )
    again.metrics({"train/loss": 1.0}, 1)
    again.results({"best/eval/loss": 1.0}, 0)
    again.end()
    (found,) = client.search_runs([experiment])
    assert (found.info.run_id, found.info.status) == (again.run_id, "FINISHED")
    assert found.data.metrics == {"train/loss": 1.0, "best/eval/loss": 1.0}
    client.restore_run(first.run_id)
    once_more = Tracker.start(uri, experiment, "x", trial="deleted", folder=folder)
    assert (once_more.run_id, once_more.anew) == (again.run_id, False)

"""The time budget of a sweep on real trainings, and the model of the best trial in MLflow."""

import csv
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from umbrella.tracking.mlflow_logger import OUTCOME, PARENT, TRIAL
from umbrella.tracking.store import tracking_uri
from umbrella.training.checkpoint_files import find_damage
from umbrella.tuning import monitor
from umbrella.tuning.monitor import Monitor
from umbrella.tuning.report import SweepResult
from umbrella.tuning.sweep import run_sweep

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
GOOD, BEST, NEVER = [3e-3, 4e-3, 5e-3], 2e-2, 6e-3
LONG, STEPS = 8, 38
"""Epochs and steps of the trial that is stopped. Each step is evaluated. The other trials have 5."""
HOUR = 3600.0


@pytest.fixture(scope="module")
def swept(small_settings: Any, ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A sweep that runs one trial at a time. Its time budget ends at the first evaluation of the last but one.

    Returns its settings, its result, the MLflow client, its run, and the runs of the trials by their rates.
    """
    storage = tmp_path_factory.mktemp("storage")
    settings = small_settings(
        {
            "tune.space": {
                "optim.lr": {"grid": [*GOOD, BEST, NEVER]},
                "train.epochs": {"grid": [LONG], "when": {"optim.lr": [BEST]}},
            },
            "tune.metric": "eval/loss",
            "tune.mode": "min",
            "tune.scheduler": "none",
            "tune.hours": 1,
            "tune.concurrent": 1,
            "train.epochs": 1,
            "train.evaluate_every": 1,
            "optim.warmup": 0,
            "optim.schedule": "constant",
            "tracking.model": True,
            "tracking.registered_as": "small-brains",
            "experiment": "ends",
            "resources.storage": str(storage),
        }
    )
    jump = {"seconds": 0.0}
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + jump["seconds"])
    show_result = Monitor.on_trial_result

    def result(self: Monitor, **info: Any) -> None:
        show_result(self, **info)
        if info["trial"].config["optim.lr"] == BEST:
            jump.update(seconds=HOUR)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "time", clock)
        patch.setattr(Monitor, "on_trial_result", result)
        answer = run_sweep(settings, frozenset(), lambda things, what: things)
    client = MlflowClient(tracking_uri(storage))
    runs = client.search_runs([client.get_experiment_by_name("ends").experiment_id])
    (parent,) = [run for run in runs if PARENT not in run.data.tags]
    by_trial = {run.data.tags[TRIAL]: run for run in runs if PARENT in run.data.tags}
    return settings, answer, client, parent, {t.point["optim.lr"]: by_trial[t.trial_id] for t in answer.trials}


def ends(answer: SweepResult) -> dict[float, tuple[str, str]]:
    """State and reason of each trial, by its rate."""
    return {trial.point["optim.lr"]: (trial.state, trial.reason) for trial in answer.trials}


def in_mlflow(run: Run) -> tuple[str, str]:
    return run.info.status, run.data.tags[OUTCOME]


def test_time_budget_stops_running_trials_and_starts_none(swept: Any) -> None:
    _, answer, _, _, runs = swept
    state, reason = ends(answer)[BEST]
    assert state == "out of time"
    assert reason.startswith("after 1 hours (tune.hours), step ")
    assert in_mlflow(runs[BEST]) == ("KILLED", "out of time")
    assert NEVER not in ends(answer)
    assert len(runs) == 4


def test_time_budget_reports_the_best_trial_so_far(swept: Any) -> None:
    _, answer, client, _, runs = swept
    losses = {trial.point["optim.lr"]: trial.metric for trial in answer.trials}
    assert answer.trials[0].metric == min(losses.values())
    assert answer.best_settings.optim.lr == answer.trials[0].point["optim.lr"]
    for trial in answer.trials:
        assert not find_damage(trial.checkpoint)
        told = client.get_metric_history(runs[trial.point["optim.lr"]].info.run_id, "eval/loss")
        assert {point.step: point.value for point in told} == {row["step"]: row["eval/loss"] for row in trial.curve}
        assert len(told) == len(trial.curve)
    with (answer.folder / "ranking.csv").open(encoding="utf-8") as file:
        assert {float(row["optim.lr"]): (row["state"], row["reason"]) for row in csv.DictReader(file)} == ends(answer)
    page = (answer.folder / "report.html").read_text(encoding="utf-8")
    assert all(reason in page for _, reason in ends(answer).values())


def test_only_the_best_trial_is_logged_and_registered_and_belongs_to_the_run_of_the_sweep(swept: Any) -> None:
    _, answer, client, parent, runs = swept
    [output] = client.get_run(parent.info.run_id).outputs.model_outputs
    assert not any(client.get_run(run.info.run_id).outputs.model_outputs for run in runs.values())
    [version] = client.search_model_versions("name = 'small-brains'")
    logged = client.get_logged_model(output.model_id)
    assert (version.source, version.run_id) == (logged.artifact_location, parent.info.run_id)
    assert (logged.status, logged.source_run_id) == ("READY", parent.info.run_id)
    kept = Path(logged.artifact_location.removeprefix("file://")) / "artifacts" / "checkpoint"
    best = Path(answer.trials[0].checkpoint)
    for name in ("model.safetensors", "config.json", "settings.yaml", "tokenizer.json"):
        assert (kept / name).read_bytes() == (best / name).read_bytes()


def test_sweep_resumes_after_its_time_budget_with_stopped_and_unstarted_trials(swept: Any) -> None:
    settings, before, client, parent, runs = swept
    again = run_sweep(settings.with_values({"tracking.model": False}), frozenset(), lambda *_: _[0], before.folder)
    assert ends(again)[BEST] == ends(again)[NEVER] == ("finished", "")
    told = client.get_metric_history(runs[BEST].info.run_id, "eval/loss")
    assert [point.step for point in told] == list(range(1, STEPS + 1))
    assert in_mlflow(client.get_run(runs[BEST].info.run_id)) == ("FINISHED", "finished")
    assert again.trials[0].metric < before.trials[0].metric
    assert client.get_run(parent.info.run_id).data.metrics == {"best/eval/loss": again.trials[0].metric}


def test_failed_model_logging_keeps_the_results_and_a_resume_logs_the_model_once(
    swept: Any, capsys: pytest.CaptureFixture
) -> None:
    settings, before, client, parent, _ = swept
    models = Path(settings.resources.storage) / "artifacts" / "models"
    models.rename(models.with_name("kept"))
    models.write_text("in the way", encoding="utf-8")

    def resume() -> SweepResult:
        told: list[Any] = []
        answer = run_sweep(settings, frozenset(), lambda *_: _[0], before.folder, told.append, told.append)
        assert told == [answer, answer]
        assert in_mlflow(client.get_run(parent.info.run_id)) == ("FINISHED", "finished")
        return answer

    def versions() -> int:
        return len(client.search_model_versions("name = 'small-brains'"))

    capsys.readouterr()
    answer = resume()
    said = capsys.readouterr().err
    assert f"note: {answer.trials[0].checkpoint} was not logged as a model in MLflow: " in said
    assert f"; umbrella tune --resume {before.folder.name} logs it\n" in said
    assert versions() == 1
    models.unlink()
    models.with_name("kept").rename(models)
    for _ in range(2):
        resume()
        assert versions() == 2
    assert len(client.get_run(parent.info.run_id).outputs.model_outputs) == 2
    metric = client.get_metric_history(parent.info.run_id, "best/eval/loss")
    assert [point.value for point in metric] == [before.trials[0].metric, answer.trials[0].metric]


def test_resume_of_a_sweep_with_a_deleted_run_creates_a_new_one_for_its_trials(
    swept: Any, capsys: pytest.CaptureFixture
) -> None:
    settings, before, client, parent, runs = swept
    client.delete_run(parent.info.run_id)
    capsys.readouterr()
    run_sweep(settings.with_values({"tracking.model": False}), frozenset(), lambda *_: _[0], before.folder)
    assert f" does not have the run {parent.info.run_id} of {before.folder.name} any more" in capsys.readouterr().err
    found = client.search_runs([parent.info.experiment_id])
    (new,) = [run for run in found if PARENT not in run.data.tags]
    assert in_mlflow(new) == ("FINISHED", "finished")
    assert {run.info.run_id for run in found if run.data.tags.get(PARENT) == new.info.run_id} >= {
        run.info.run_id for run in runs.values()
    }
    assert len(found) == 1 + len(before.trials) + 1, "the trial that had not started"

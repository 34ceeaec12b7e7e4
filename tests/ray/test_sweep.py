"""A sweep on Ray Tune, as experiments/tune.py runs it: one trial learns, ASHA stops one, and one cannot succeed."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.printed import printed_to, unknown_lines
from tests.ray.conftest import no_progress
from umbrella.tracking.mlflow_logger import DESCRIPTION, MAX_METRICS, PARENT, TRIAL, WINNER, MlflowLogger
from umbrella.tracking.store import SWEEP, tracking_uri
from umbrella.tuning.sweep import run_sweep
from umbrella.tuning.sweep_files import load_outcome

OUTPUT = "output_of_sweep.txt"

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def swept(small_settings: Any, ray_session: Any) -> Any:
    """The result of a sweep over rates of which one is good, its run, and the runs of its trials.

    One trial after the other, so that ASHA compares the second one with the first.
    """
    space = {
        "optim.lr": {"grid": [3e-3, 1e-30, 1e30]},
        "mask.supervise": {"grid": ["last_assistant"]},
        "modalities.sMRI.intensity": {"grid": ["zscore_foreground"]},
        "train.augment": {"grid": [{"shift": 0.05}]},
    }
    settings = small_settings(
        {
            "tune.space": space,
            "tune.metric": "eval/loss",
            "tune.mode": "min",
            "tune.grace": 1,
            "tune.reduction": 2,
            "tune.concurrent": 1,
            "optim.warmup": 0,
            "experiment": "sweep",
            "tracking.hash_subjects": True,
            "resources.max_failures": 0,  # a second attempt would start another process
        }
    )
    with printed_to(Path(settings.resources.storage) / OUTPUT):
        answer = run_sweep(settings, frozenset(), no_progress)
    client = MlflowClient(tracking_uri(settings.resources.storage))
    runs = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    (parent,) = [run for run in runs if PARENT not in run.data.tags]
    return answer, client, parent, {run.data.tags[TRIAL]: run for run in runs if PARENT in run.data.tags}


def test_each_trial_is_one_run_below_the_run_of_the_sweep(swept: Any) -> None:
    answer, _, parent, children = swept
    assert set(children) == {trial.trial_id for trial in answer.trials}
    assert len(children) == 3
    assert {run.data.tags[PARENT] for run in children.values()} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"


def test_asha_stop_is_killed_diverged_trial_is_failed_and_the_sweep_continues(swept: Any) -> None:
    answer, client, _, children = swept
    assert [trial.state for trial in answer.trials] == ["finished", "stopped by the scheduler", "failed"]
    assert [children[trial.trial_id].info.status for trial in answer.trials] == ["FINISHED", "KILLED", "FAILED"]
    stopped = answer.trials[1]
    assert stopped.reason.startswith("by ASHA at evaluation 1, step ")
    assert [row["step"] for row in stopped.curve] == [stopped.step], "the checkpoint of its only evaluation is whole"
    losses = client.get_metric_history(children[stopped.trial_id].info.run_id, "train/loss")
    assert [m.step for m in losses] == list(range(1, stopped.step + 1)), "it took no step after that"


def test_sweep_prints_only_known_lines(swept: Any) -> None:
    answer, _, _, _ = swept
    output = (answer.folder.parents[1] / OUTPUT).read_text(encoding="utf-8")
    assert re.search(r": finished  \(\d of 3 trials ended, \d running, \d pending(, about \d\d:\d\d left)?\)\n", output)
    assert unknown_lines(output) == []


def test_swept_values_reach_the_training(swept: Any) -> None:
    answer, client, _, children = swept
    good = children[answer.trials[0].trial_id]
    assert good.data.params["optim.lr"] == "0.003"
    assert good.data.params["mask.supervise"] == "last_assistant"
    assert good.data.params["modalities.sMRI.intensity"] == "zscore_foreground"
    assert good.data.params["train.augment.shift"] == "0.05"
    rates = [m.value for m in client.get_metric_history(good.info.run_id, "train/lr")]
    assert max(rates) == pytest.approx(3e-3)
    assert (
        "mask: supervise=last_assistant"
        in Path(client.download_artifacts(good.info.run_id, "statement.txt")).read_text()
    )


def test_run_of_a_trial_has_settings_code_version_data_and_metrics(swept: Any) -> None:
    answer, client, parent, children = swept
    best = answer.trials[0]
    good = children[best.trial_id]
    files = {file.path for file in client.list_artifacts(good.info.run_id)}
    assert files == {
        "settings.yaml", "environment.json", "statement.txt", "mask_audit.html", "predictions.json", "curves.png",
        "evaluations.jsonl"
    }  # fmt: skip
    for run in (good, parent):
        told = {given.dataset.name: json.loads(given.dataset.profile) for given in run.inputs.dataset_inputs}
        assert set(told) == {"training", "validation"}
        assert set(told["training"]["labels"]["sex"]) == {"female", "male"}
    assert {"device", "host", "ray.job", "umbrella.run", "mlflow.source.git.commit"} <= good.data.tags.keys()
    assert good.data.tags["best.checkpoint"] == best.checkpoint
    assert good.data.metrics["best/eval/loss"] == best.metric == best.loss
    table = json.loads(Path(client.download_artifacts(good.info.run_id, "predictions.json")).read_text())
    assert len(table["data"]) > 2
    rights = [row[table["columns"].index("right")] for row in table["data"]]
    lines = Path(client.download_artifacts(good.info.run_id, "evaluations.jsonl")).read_text().splitlines()
    (accuracy,) = [row["eval/sex/accuracy"] for row in map(json.loads, lines) if row["step"] == best.step]
    assert sum(filter(None, rights)) / sum(right is not None for right in rights) == pytest.approx(accuracy)
    places = [answer.folder, *answer.folder.glob("trials/*/")]
    assert not [place for place in places if MlflowLogger(answer.tracking_uri, place).has_pending]


def test_runs_of_a_sweep_name_it_and_say_what_was_asked_and_what_won(swept: Any) -> None:
    answer, _, parent, children = swept
    best, stopped, failed = (children[trial.trial_id].data.tags for trial in answer.trials)
    for tags in (parent.data.tags, best, stopped, failed):
        assert tags[SWEEP] == tags["mlflow.source.name"] == parent.info.run_name
    assert [tags[WINNER] for tags in (best, stopped, failed)] == ["yes", "no", "no"]
    asked, won, lead = parent.data.tags[DESCRIPTION].split(". ", 2)
    assert asked.startswith("3 trials compared optim.lr, mask.supervise, modalities.sMRI.intensity, train.augment")
    assert asked.endswith(" for the smallest eval/loss")
    first, second = answer.trials[:2]
    assert won == f"The winner is {first.name} with {first.metric:.4g}"
    difference = f"{second.metric - first.metric:.4g}"
    assert lead == f"The next best, {second.name}, has {second.metric:.4g}, which is {difference} more."
    assert f"Place 1 of 3: eval/loss {first.metric:.4g} at step {first.step}. State: finished." in best[DESCRIPTION]
    assert "State: stopped by the scheduler, by ASHA at evaluation 1" in stopped[DESCRIPTION]
    assert failed[DESCRIPTION].endswith("State: failed.")


def test_runs_of_a_sweep_have_at_most_40_metrics_and_headline_parameters(swept: Any) -> None:
    answer, _, parent, children = swept
    for run in (parent, *children.values()):
        metrics = {name for name in run.data.metrics if not name.startswith("system/")}
        assert len(metrics) <= MAX_METRICS == 40
        assert len(run.data.params) <= 30
    assert {"best/eval/loss", "train/loss", "train/lr", "train/samples_per_second"} <= set(
        children[answer.trials[0].trial_id].data.metrics
    )


def test_runs_of_a_sweep_that_hashes_subjects_contain_no_subject_id(swept: Any) -> None:
    answer, client, parent, children = swept
    failed = answer.trials[-1]
    assert "sub-0" in load_outcome(answer.folder / "trials" / failed.trial_id.split("-")[-1]).reason, "a sample's name"
    assert "subject-" in failed.reason
    for run in (parent, *children.values()):
        assert "sub-0" not in str(run.to_dictionary())
        for file in Path(client.download_artifacts(run.info.run_id, "")).rglob("*.*"):
            assert "sub-0" not in file.read_bytes().decode("latin-1"), file.name


def test_result_has_the_best_settings_and_an_existing_checkpoint(swept: Any) -> None:
    from umbrella.training.checkpoint_files import read_training_state

    answer, client, parent, _ = swept
    assert answer.best_settings.optim.lr == 3e-3
    assert answer.best_settings.mask.supervise == "last_assistant"
    assert read_training_state(answer.trials[0].checkpoint).step == answer.trials[0].step
    with (answer.folder / "ranking.csv").open() as file:
        assert [row["optim.lr"] for row in csv.DictReader(file)] == ["0.003", "1e-30", "1e+30"]
    assert (answer.folder / "metric.png").stat().st_size > 10_000
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {
        "best.yaml",
        "metric.png",
        "ranking.csv",
        "report.html",
        "settings.yaml",
    }

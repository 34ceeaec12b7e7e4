"""A sweep on Ray Tune, as experiments/tune.py runs it, with one trial that cannot succeed."""

import csv
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from umbrella.tracking.delivery import PARENT, TRIAL
from umbrella.tracking.store import tracking_uri
from umbrella.tuning.sweep import run_sweep

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def swept(small_settings: Any, ray_session: Any) -> Any:
    """The answer of a sweep over a good rate and one that explodes; its run, and its trials' runs by trial."""
    space = {"optim.lr": {"grid": [3e-3, 1e30]}, "mask.supervise": {"grid": ["last_assistant"]}}
    settings = small_settings({"tune.space": space, "optim.warmup": 0, "experiment": "sweep"})
    answer = run_sweep(settings, frozenset(), lambda things, what: things)
    client = MlflowClient(tracking_uri(settings.resources.storage))
    runs = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    (parent,) = [run for run in runs if PARENT not in run.data.tags]
    return answer, client, parent, {run.data.tags[TRIAL]: run for run in runs if PARENT in run.data.tags}


def test_each_trial_is_one_run_under_the_sweeps_run(swept: Any) -> None:
    answer, _, parent, children = swept
    assert set(children) == {trial.trial_id for trial in answer.trials}
    assert len(children) == 2
    assert {run.data.tags[PARENT] for run in children.values()} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"


def test_a_trial_that_explodes_is_failed_and_the_others_go_on(swept: Any) -> None:
    answer, _, _, children = swept
    assert [trial.state for trial in answer.trials] == ["finished", "failed"]
    assert [children[trial.trial_id].info.status for trial in answer.trials] == ["FINISHED", "FAILED"]


def test_a_swept_value_acts_where_it_should(swept: Any) -> None:
    answer, client, _, children = swept
    good = children[answer.trials[0].trial_id]
    assert good.data.params["optim.lr"] == "0.003"
    assert good.data.params["mask.supervise"] == "last_assistant"
    rates = [m.value for m in client.get_metric_history(good.info.run_id, "train/lr")]
    assert max(rates) == pytest.approx(3e-3)
    assert (
        "mask: supervise=last_assistant"
        in Path(client.download_artifacts(good.info.run_id, "statement.txt")).read_text()
    )


def test_the_answer_names_the_best_settings_and_a_checkpoint_that_is_there(swept: Any) -> None:
    from umbrella.training.progress import read_progress

    answer, client, parent, _ = swept
    assert answer.best.optim.lr == 3e-3
    assert answer.best.mask.supervise == "last_assistant"
    assert read_progress(answer.trials[0].checkpoint).step == answer.trials[0].step
    with (answer.folder / "ranking.csv").open() as file:
        assert [row["optim.lr"] for row in csv.DictReader(file)] == ["0.003", "1e+30"]
    assert answer.figure.stat().st_size > 10_000
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"metric.png", "ranking.csv", "settings.yaml"}

"""Population-based training on real trainings: a trial goes on from another one's weights, at another rate."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from umbrella.base import UserError
from umbrella.tracking.delivery import OUTCOME, PARENT, TRIAL
from umbrella.tracking.store import tracking_uri
from umbrella.training.progress import read_metrics
from umbrella.tuning.results import Trial
from umbrella.tuning.sweep import Answer, run_sweep

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
POPULATION = {
    "tune.space": {"optim.lr": {"loguniform": [1e-5, 3e-2]}},
    "tune.samples": 2,
    "seed": 8,  # one rate at which nothing is learnt, 1.4e-4, and one at which much is, 2.7e-2
    "tune.scheduler": "pbt",
    "tune.perturb_every": 2,
    "tune.metric": "eval/loss",
    "tune.mode": "min",
    "train.epochs": 3,
    "train.evaluate_every": 3,
    "optim.warmup": 0,
    "optim.schedule": "constant",
    "resources.keep_checkpoints": 9,
    "experiment": "population",
    "name": "population",
}
"""10 steps, evaluated at 3, 6, 9 and 10; decided on at 6."""


class Member(NamedTuple):
    """A trial, its run in MLflow, and the run's metrics by name and step."""

    trial: Trial
    run: Run
    metrics: dict[str, dict[int, list[float]]]


@pytest.fixture(scope="module")
def population(small_settings: Any, ray_session: Any) -> tuple[Answer, Member, Member]:
    """The answer; the trial that was the worse one, and took the other's checkpoint; and that other one."""
    settings = small_settings(POPULATION)
    answer = run_sweep(settings, frozenset(), lambda things, what: things)
    client = MlflowClient(tracking_uri(settings.resources.storage))
    runs = client.search_runs([client.get_experiment_by_name("population").experiment_id])
    by_trial = {run.data.tags[TRIAL]: run for run in runs if PARENT in run.data.tags}
    assert len(runs) == 1 + len(by_trial) == 3

    def member(trial: Trial) -> Member:
        metrics: dict[str, dict[int, list[float]]] = {}
        run = by_trial[trial.trial_id]
        for name in ("train/loss", "train/lr", "eval/loss"):
            for point in client.get_metric_history(run.info.run_id, name):
                metrics.setdefault(name, {}).setdefault(point.step, []).append(point.value)
        return Member(trial, run, metrics)

    taker, giver = sorted(map(member, answer.trials), key=lambda one: -len(one.trial.adopted))
    return answer, taker, giver


def test_the_worse_trial_goes_on_from_the_better_ones_weights_at_the_changed_rate(population: Any) -> None:
    _, taker, giver = population
    [adoption] = taker.trial.adopted
    assert giver.trial.adopted == ()
    assert adoption.step == 6
    rate = taker.trial.point["optim.lr"]
    assert rate not in (adoption.before["optim.lr"], adoption.donor["optim.lr"])
    assert adoption.after == taker.trial.point
    # The same batch with the same weights: the same loss. Before it, and after a step at another rate, another one.
    mine, theirs = taker.metrics["train/loss"], giver.metrics["train/loss"]
    assert mine[7] == theirs[7]
    assert all(mine[step] != theirs[step] for step in (2, 3, 4, 5, 6, 8, 9, 10))
    assert [taker.metrics["train/lr"][step] for step in (6, 7, 10)] == [
        [pytest.approx(adoption.before["optim.lr"])], [pytest.approx(rate)], [pytest.approx(rate)],
    ]  # fmt: skip
    assert float(taker.run.data.tags["acts.optim.lr"]) == rate


def test_each_trial_is_one_run_with_one_value_for_each_step(population: Any) -> None:
    _, *members = population
    for one in members:
        assert (one.trial.state, one.run.info.status, one.run.data.tags[OUTCOME]) == (
            "finished", "FINISHED", "finished",
        )  # fmt: skip
        expected = {"train/loss": list(range(1, 11)), "train/lr": list(range(1, 11)), "eval/loss": [3, 6, 9, 10]}
        for name, steps in expected.items():
            assert {step: len(values) for step, values in one.metrics[name].items()} == dict.fromkeys(steps, 1), name
        assert {e.step: [e.loss] for e in one.trial.curve} == one.metrics["eval/loss"]


def test_what_a_trial_counts_with_was_measured_of_it_and_not_of_the_giver(population: Any) -> None:
    _, taker, giver = population
    for one in (taker, giver):
        assert one.metrics["eval/loss"][one.trial.step] == [one.trial.metric]
        assert read_metrics(one.trial.checkpoint)["eval/loss"] == one.trial.metric
    folder = Path(taker.trial.checkpoint).parent
    assert read_metrics(folder / "step_0000006") == {}
    assert read_metrics(folder / "step_0000003")["eval/loss"] == taker.metrics["eval/loss"][3][0]


def test_run_and_report_say_what_was_adopted_from_whom(population: Any) -> None:
    answer, taker, giver = population
    [adoption] = taker.trial.adopted
    source = giver.trial.trial_id.rpartition("-")[2]
    assert adoption.source == source
    said = adoption.in_words
    assert said.startswith(f"after step 6 from {source} (lr=0.02709); lr=1.371e-4 became lr=")
    assert taker.run.data.tags["adopted"] == said
    assert "adopted" not in giver.run.data.tags
    page = answer.files.page.read_text(encoding="utf-8")
    assert "What was adopted" in page
    assert adoption.giver in page
    assert adoption.change in page
    assert ("This is another training" in page) == bool(answer.trials[0].adopted)
    with answer.files.ranking.open(encoding="utf-8") as file:
        assert {row["trial"]: row["adopted"] for row in csv.DictReader(file)} == {
            taker.trial.trial_id: said, giver.trial.trial_id: "",
        }  # fmt: skip
    lines = (Path(taker.trial.checkpoint).parent / "adopted.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [6]


def test_a_population_that_does_not_fit_at_once_is_refused(small_settings: Any) -> None:
    settings = small_settings(POPULATION | {"tune.samples": 50, "name": "crowd"})
    with pytest.raises(UserError, match=r"^tune\.scheduler=pbt: all of its 50 trials run at once, and \d would; take"):
        run_sweep(settings, frozenset(), lambda things, what: things)

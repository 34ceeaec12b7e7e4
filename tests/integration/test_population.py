"""Population-based training on real trainings: a trial goes on from another one's weights, at another rate.

All of it is true of a sweep that was left alone, of one whose trials have several workers or take turns, and of one
that was killed around its decision and goes on.
"""

import csv
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from sweep_kills import batches_taken, start

from umbrella.config import Settings
from umbrella.tracking.delivery import OUTCOME, PARENT, TRIAL
from umbrella.tracking.store import tracking_uri
from umbrella.training.filenames import ADOPTED
from umbrella.training.history import read_history
from umbrella.training.progress import read_metrics
from umbrella.tuning.results import Trial
from umbrella.tuning.sweep import Answer, run_sweep

from .faults import TWO, samples

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
    "data.log_samples": True,
}
"""10 steps, evaluated at 3, 6, 9 and 10; decided on at 6."""
IN_TURNS = {"tune.concurrent": 1}


class Way(NamedTuple):
    """How a sweep comes to its end."""

    settings: Mapping[str, Any] = MappingProxyType({})
    moment: Callable[[Settings, Path], bool] | None = None
    """When its script gets a signal, to be gone on with."""
    signal: Signals = SIGKILL


def evaluated(step: int) -> Callable[[Settings, Path], bool]:
    """Whether a trial has evaluated at a step; its checkpoint is about to be written then."""
    return lambda _, sweep: any(row["step"] == step for trial in sweep.glob("trials/*/") for row in read_history(trial))


def adopted(_: Settings, sweep: Path) -> bool:
    return any(sweep.glob(f"trials/*/{ADOPTED}"))


WAYS = {
    "left alone": Way(),
    "two workers each": Way(TWO | {"train.batch_size": 2}),
    "three in turns": Way(IN_TURNS | {"tune.samples": 3}),
    "killed before the checkpoint to decide on": Way(moment=evaluated(6)),
    "killed as one adopts": Way(moment=adopted),
    "killed when one has gone on and the other has not": Way(IN_TURNS, moment=evaluated(9)),
    "asked to stop after its decision": Way(moment=lambda settings, _: batches_taken(settings) > 14, signal=SIGTERM),
}


class Member(NamedTuple):
    """A trial, its run in MLflow, and the run's metrics by name and step."""

    trial: Trial
    run: Run
    metrics: dict[str, dict[int, list[float]]]
    folder: Path


class Population(NamedTuple):
    """The answer; the trial that was the worst one, and took another's checkpoint; that other one; and all."""

    answer: Answer
    taker: Member
    giver: Member
    members: list[Member]


def interrupted(settings: Settings, way: Way) -> Path:
    """Begin a sweep as a script, and signal to it at a moment; returns the sweep's folder."""
    assert way.moment
    script = start(settings, go_on=False)
    sweep = Path(settings.resources.storage) / "sweeps" / settings.name
    while not way.moment(settings, sweep):
        assert script.poll() is None, "it ended before the moment came"
        time.sleep(0.001)
    script.send_signal(way.signal)
    try:
        assert script.wait(60) != 0
    except subprocess.TimeoutExpired:
        script.kill()
        raise
    return sweep


@pytest.fixture(scope="module", params=WAYS)
def population(request: Any, small_settings: Any, ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    way, storage = WAYS[request.param], tmp_path_factory.mktemp("storage")
    named = {"name": "population", "experiment": "population", "resources.storage": str(storage)}
    settings = small_settings({**POPULATION, **way.settings, **named})
    begun = interrupted(settings, way) if way.moment else None
    answer = run_sweep(settings, frozenset(), lambda things, what: things, begun)
    client = MlflowClient(tracking_uri(storage))
    runs = client.search_runs([client.get_experiment_by_name("population").experiment_id])
    by_trial = {run.data.tags[TRIAL]: run for run in runs if PARENT in run.data.tags}
    assert len(runs) == 1 + len(by_trial) == 1 + settings.tune.samples

    def member(trial: Trial) -> Member:
        metrics: dict[str, dict[int, list[float]]] = {}
        run = by_trial[trial.trial_id]
        for name in ("train/loss", "train/lr", "eval/loss"):
            for point in client.get_metric_history(run.info.run_id, name):
                metrics.setdefault(name, {}).setdefault(point.step, []).append(point.value)
        return Member(trial, run, metrics, answer.folder / "trials" / trial.trial_id.rpartition("-")[2])

    members = list(map(member, answer.trials))
    [taker] = [one for one in members if one.trial.adopted]
    [giver] = [one for one in members if one.folder.name == taker.trial.adopted[0].source]
    return Population(answer, taker, giver, members)


def test_the_worse_trial_goes_on_from_the_better_ones_weights_at_the_changed_rate(population: Population) -> None:
    _, taker, giver, members = population
    [adoption] = taker.trial.adopted
    assert adoption.step == 6
    rate = taker.trial.point["optim.lr"]
    assert rate not in (adoption.before["optim.lr"], adoption.donor["optim.lr"])
    assert adoption.donor == giver.trial.point
    assert adoption.after == taker.trial.point
    at_6 = {one.folder: one.metrics["eval/loss"][6] for one in members}
    assert at_6[giver.folder] == min(at_6.values()) < max(at_6.values()) == at_6[taker.folder]
    # The same batch with the same weights: the same loss. Before it, and after a step at another rate, another one.
    mine, theirs = taker.metrics["train/loss"], giver.metrics["train/loss"]
    assert mine[7] == theirs[7]
    assert all(mine[step] != theirs[step] for step in (2, 3, 4, 5, 6, 8, 9, 10))
    for one in members:
        rates = dict.fromkeys(range(1, 11), one.trial.point["optim.lr"])
        if one is taker:
            rates |= dict.fromkeys(range(1, 7), adoption.before["optim.lr"])
        assert one.metrics["train/lr"] == {step: [pytest.approx(rate)] for step, rate in rates.items()}
        assert float(one.run.data.tags["acts.optim.lr"]) == one.trial.point["optim.lr"]


def test_each_trial_is_one_run_with_one_value_for_each_step(population: Population) -> None:
    for one in population.members:
        assert (one.trial.state, one.run.info.status, one.run.data.tags[OUTCOME]) == (
            "finished", "FINISHED", "finished",
        )  # fmt: skip
        expected = {"train/loss": list(range(1, 11)), "train/lr": list(range(1, 11)), "eval/loss": [3, 6, 9, 10]}
        for name, steps in expected.items():
            assert {step: len(values) for step, values in one.metrics[name].items()} == dict.fromkeys(steps, 1), name
        assert {e.step: [e.loss] for e in one.trial.curve} == one.metrics["eval/loss"]


def test_all_trials_learn_from_each_sample_once_an_epoch(population: Population) -> None:
    assert len({tuple(samples(one.folder)) for one in population.members}) == 1


def test_what_a_trial_counts_with_was_measured_of_it_and_not_of_the_giver(population: Population) -> None:
    taker = population.taker
    for one in population.members:
        assert one.metrics["eval/loss"][one.trial.step] == [one.trial.metric]
        assert read_metrics(one.trial.checkpoint)["eval/loss"] == one.trial.metric
    assert read_metrics(taker.folder / "step_0000006") == {}
    assert read_metrics(taker.folder / "step_0000003")["eval/loss"] == taker.metrics["eval/loss"][3][0]


def test_run_and_report_say_what_was_adopted_from_whom(population: Population) -> None:
    answer, taker, giver, members = population
    [adoption] = taker.trial.adopted
    said = adoption.in_words
    was = {1.371e-4: "1.371e-4", 1.283e-4: "1.283e-4"}[adoption.before["optim.lr"]]
    assert said.startswith(f"after step 6 from {giver.folder.name} (lr=0.02709); lr={was} became lr=")
    assert [one.run.data.tags.get("adopted") for one in members] == [said if one is taker else None for one in members]
    page = answer.files.page.read_text(encoding="utf-8")
    assert "What was adopted" in page
    assert adoption.giver in page
    assert adoption.change in page
    assert ("This is another training" in page) == bool(answer.trials[0].adopted)
    with answer.files.ranking.open(encoding="utf-8") as file:
        assert {row["trial"]: row["adopted"] for row in csv.DictReader(file)} == {
            one.trial.trial_id: said if one is taker else "" for one in members
        }
    lines = (taker.folder / ADOPTED).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [6]


def test_no_more_train_at_once_than_are_to(population: Population) -> None:
    legs: dict[float, float] = {}
    for one in population.members:
        for row in read_history(one.folder):
            legs[row["begun"]] = max(row["time"], legs.get(row["begun"], 0.0))
    assert len(legs) >= 2 * len(population.members)
    together = [sum(begun <= moment < end for begun, end in legs.items()) for moment in legs]
    assert max(together) <= (population.answer.best.tune.concurrent or len(population.members))

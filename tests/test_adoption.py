"""A trial's adoption of another one's checkpoint is there whole or not at all, whatever is killed when."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from umbrella.config import load_settings
from umbrella.tracking.delivery import OUTCOME
from umbrella.tracking.runs import Tracker
from umbrella.tracking.store import open_experiment
from umbrella.training.filenames import ADOPTED
from umbrella.training.history import HISTORY
from umbrella.training.progress import METRICS, PROGRESS, latest_checkpoint, read_metrics, what_is_wrong, write_files
from umbrella.tuning.adoption import Adoption, adopt, read_adoptions, read_point, settle, stand_at
from umbrella.tuning.ending import BUDGET, write_end
from umbrella.tuning.folder import trial_folder
from umbrella.tuning.monitor import Monitor
from umbrella.tuning.schedulers import make_scheduler
from umbrella.tuning.settings import TuneSettings

BEFORE, DONOR, AFTER = {"optim.lr": 1e-4}, {"optim.lr": 1e-2}, {"optim.lr": 1.2e-2}


def evaluate(folder: Path, step: int, evaluation: int | None) -> Path:
    """What a trial leaves at a step: a checkpoint, and a line if it evaluated."""
    checkpoint = folder / f"step_{step:07d}"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text(f"{folder.name} at {step}", encoding="utf-8")
    (checkpoint / METRICS).write_text(json.dumps({"eval/loss": 0.5}), encoding="utf-8")
    (checkpoint / PROGRESS).write_text(json.dumps({"step": step}), encoding="utf-8")
    write_files(checkpoint)
    if evaluation:
        with (folder / HISTORY).open("a", encoding="utf-8") as file:
            print(json.dumps({"step": step, "evaluation": evaluation, "begun": 0.0, "time": 1.0}), file=file)
    return checkpoint


def pair(sweep: Path) -> tuple[Path, Path]:
    """Two trials that wait at their second evaluation: the worse one, and the better one."""
    taker, giver = trial_folder(sweep, "ray_0", BEFORE), trial_folder(sweep, "ray_1", DONOR)
    for folder in (taker, giver):
        evaluate(folder, 3, 1)
        evaluate(folder, 6, 2)
    return taker, giver


def killed_at(event: int, taker: Path, giver: Path) -> bool:
    """Adopt in a process that is killed before its n-th word to the file system; whether it came so far."""
    child = os.fork()
    if not child:
        left = [event]

        def hook(name: str, arguments: Any) -> None:
            if name.startswith(("os.", "open", "shutil.")):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        adopt(taker, giver, BEFORE, DONOR, AFTER)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_any_moment_an_adoption_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    found, event, killed = [], 0, True
    while killed:
        event += 1
        taker, giver = pair(tmp_path / str(event))
        killed = killed_at(event, taker, giver)
        settle(taker)
        newest = taker / "step_0000006"
        assert latest_checkpoint(taker) == newest
        adopted = bool(read_adoptions(taker))
        assert (newest / "weights").read_text() == f"{(giver if adopted else taker).name} at 6"
        assert read_metrics(newest) == ({} if adopted else {"eval/loss": 0.5})
        assert read_point(taker) == (AFTER if adopted else BEFORE)
        assert stand_at(2, taker, giver) != adopted  # decided again where it was not decided, and only there
        assert not what_is_wrong(giver / "step_0000006")
        found.append(adopted)
    assert found == sorted(found)
    assert 10 < found.index(True) < len(found) - 3, "killed both before and after it was decided"


def test_what_a_killed_adoption_left_does_not_hinder_the_next(tmp_path: Path) -> None:
    taker, giver = pair(tmp_path)
    assert killed_at(8, taker, giver)
    settle(taker)
    assert read_adoptions(taker) == ()
    adopt(taker, giver, BEFORE, DONOR, AFTER)
    assert read_adoptions(taker) == (Adoption(6, giver.name, BEFORE, DONOR, AFTER),)
    assert (taker / "step_0000006" / "weights").read_text() == f"{giver.name} at 6"


def test_who_has_adopted_at_a_step_neither_takes_nor_gives_there_again(tmp_path: Path) -> None:
    taker, giver = pair(tmp_path)
    other = trial_folder(tmp_path, "ray_2", {"optim.lr": 3e-3})
    evaluate(other, 6, 2)
    assert stand_at(2, taker, giver)
    adopt(taker, giver, BEFORE, DONOR, AFTER)
    assert not stand_at(2, taker, giver)
    assert not stand_at(2, other, taker)
    assert stand_at(2, other, giver)


@pytest.mark.parametrize("evaluation", [None, 3])
def test_who_has_gone_past_a_decision_is_not_decided_on_there_again(tmp_path: Path, evaluation: int | None) -> None:
    taker, giver = pair(tmp_path)
    evaluate(taker, 8, evaluation)  # without one: it was asked to stop
    assert not stand_at(2, taker, giver)
    assert not stand_at(2, giver, taker)


def test_who_loses_an_adopted_checkpoint_goes_back_to_before_it_with_the_values_of_then(tmp_path: Path) -> None:
    taker, giver = pair(tmp_path)
    adopt(taker, giver, BEFORE, DONOR, AFTER)
    (taker / "step_0000006" / "weights").unlink()
    settle(taker)
    assert read_point(taker) == BEFORE
    assert read_adoptions(taker) == ()
    assert (taker / ADOPTED).exists()
    assert latest_checkpoint(taker) == taker / "step_0000003"


def test_who_goes_back_to_after_an_adoption_keeps_it(tmp_path: Path) -> None:
    taker, giver = pair(tmp_path)
    adopt(taker, giver, BEFORE, DONOR, AFTER)
    evaluate(taker, 9, 3)
    settle(taker)
    assert read_point(taker) == AFTER
    assert [adoption.step for adoption in read_adoptions(taker)] == [6]


def test_a_trial_goes_on_with_its_folders_point_whatever_ray_tune_has_noted_or_lost(tmp_path: Path) -> None:
    from ray.train._internal.storage import StorageContext
    from ray.tune.experiment import Trial

    sweep = tmp_path / "sweep"
    taker, giver = pair(sweep)
    adopt(taker, giver, BEFORE, DONOR, AFTER)
    tune = {"space": {"optim.lr": {"loguniform": [1e-5, 1e-1]}}, "scheduler": "pbt"}
    population: Any = make_scheduler(load_settings(overrides={f"tune.{name}": value for name, value in tune.items()}))
    population.set_search_properties("eval/loss", "min")
    storage = StorageContext(str(tmp_path), sweep.name)
    for ray_id in ("ray_0", "of a sweep begun anew"):
        trial = Trial("Trial", trial_id=ray_id, config=dict(BEFORE), storage=storage, stub=True)
        population.on_trial_add(SimpleNamespace(search_alg=None), trial)
        assert trial.config == AFTER
        assert trial.status == Trial.PAUSED
        assert trial_folder(sweep, ray_id, trial.config) == taker


def test_the_run_of_a_trial_says_what_it_has_adopted_where_it_ended_before_its_first_step_after_that(
    mlflow_store: Callable[[Path], str], tmp_path: Path
) -> None:
    uri = mlflow_store(tmp_path)
    experiment = open_experiment(uri, "x", tmp_path)
    taker, giver = pair(tmp_path / "sweep")
    runs = [Tracker.start(uri, experiment, folder.name, folder=folder).run_id for folder in (taker, giver)]
    adopt(taker, giver, BEFORE, DONOR, AFTER)
    for folder in (taker, giver):
        write_end(folder, BUDGET, "after 1 hours")
    with Monitor(tmp_path / "sweep", uri, 2, TuneSettings()):
        found = [MlflowClient(uri).get_run(run).data.tags for run in runs]
    said = f"after step 6 from {giver.name} (lr=0.01); lr=1e-4 became lr=0.012"
    assert [tags.get("adopted") for tags in found] == [said, None]
    assert [tags[OUTCOME] for tags in found] == [BUDGET, BUDGET]

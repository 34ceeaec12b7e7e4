"""Trainings that are killed go on as if nothing had happened: the same losses to the bit, the same samples in order."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from umbrella.tracking import tracking_uri
from umbrella.training.progress import latest_checkpoint
from umbrella.training.run import run_training

LONGER = {"train.epochs": 12, "train.evaluate_every": 5, "optim.lr": 1e-2, "data.log_samples": True}
KEEP = {"resources.keep_checkpoints": 2, "experiment": "faults"}
"""39 steps on the small cohort, with a checkpoint after each 5."""
STEPS = 39
TRAIN = Path(__file__).resolve().parents[2] / "experiments" / "train.py"

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def go_on(settings: Any) -> Path:
    return run_training(settings, lambda things, what: things)


def samples(folder: Path) -> list[list[str]]:
    """The conversations of each step, of four; of a step that was taken twice, the last time."""
    lines = (folder / "samples_0.jsonl").read_text(encoding="utf-8").splitlines()
    by_position = {entry["position"]: entry["task_ids"] for entry in map(json.loads, lines)}
    assert sorted(by_position) == list(range(0, 4 * STEPS, 4))
    return [by_position[position] for position in sorted(by_position)]


def losses(settings: Any, folder: Path) -> list[tuple[int, float]]:
    """(step, loss) as MLflow has them."""
    client = MlflowClient(tracking_uri(settings.resources.storage))
    experiment = client.get_experiment_by_name(settings.experiment)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`ray.trial_id` = '{folder.name}'")
    assert run.info.status == "FINISHED"
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]


@pytest.fixture(scope="module")
def never_stopped(small_settings: Callable[..., Any], ray_session: Any) -> tuple[list, list]:
    """What a training sees and loses that nothing happens to."""
    settings = small_settings({**LONGER, **KEEP})
    folder = go_on(settings)
    return losses(settings, folder), samples(folder)


def when_step(folder: Path, step: int, then: Callable[[], None]) -> threading.Thread:
    """Do something once a training has begun a step."""

    def watch() -> None:
        log = folder / "samples_0.jsonl"
        while not log.exists() or log.read_text(encoding="utf-8").count("\n") < step:
            time.sleep(0.005)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def kill_workers() -> None:
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::") and "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)


def test_a_worker_killed_at_any_step_changes_nothing(
    small_settings: Callable[..., Any], never_stopped: tuple[list, list]
) -> None:
    step = random.Random(os.environ.get("FAULT_SEED", "0")).randint(1, STEPS - 9)  # the kill takes some steps to arrive
    settings = small_settings({**LONGER, **KEEP, "name": f"killed-at-{step}"})
    folder = Path(settings.resources.storage) / "trainings" / settings.name
    killer = when_step(folder, step, kill_workers)
    assert go_on(settings) == folder
    killer.join(5)
    assert len((folder / "samples_0.jsonl").read_text().splitlines()) > STEPS, "it was killed, and took steps twice"
    assert (losses(settings, folder), samples(folder)) == never_stopped


def test_a_killed_driver_and_a_broken_checkpoint_change_nothing_when_the_command_is_given_again(
    small_settings: Callable[..., Any], never_stopped: tuple[list, list], capfd: pytest.CaptureFixture
) -> None:
    settings = small_settings({**LONGER, **KEEP, "name": "driver"})
    folder = Path(settings.resources.storage) / "trainings" / settings.name
    file = Path(settings.resources.storage) / "driver.yaml"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen([sys.executable, TRAIN, file], stdout=subprocess.DEVNULL, env=environment)
    when_step(folder, 23, driver.kill).join(100)
    assert driver.wait(60) == -signal.SIGKILL
    newest = latest_checkpoint(folder)
    assert newest is not None
    model = newest / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    older = latest_checkpoint(folder)
    assert older is not None
    assert older < newest

    done = subprocess.run([sys.executable, TRAIN, file], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"{newest} cannot be used: model.safetensors has" in done.stdout + done.stderr
    assert (losses(settings, folder), samples(folder)) == never_stopped

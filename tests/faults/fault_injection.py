"""Faults for trainings, and what the trainings log; for the fault tests and random_kills."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

from umbrella.tracking.mlflow_logger import TRIAL
from umbrella.tracking.store import tracking_uri
from umbrella.training.run import run_training

LONGER = {
    "train.epochs": 8, "train.evaluate_every": 5, "optim.lr": 1e-2, "data.log_samples": True,
    "resources.keep_checkpoints": 2, "experiment": "faults",
}  # fmt: skip
"""38 steps of 4 on the small cohort of 19, with a checkpoint after each 5."""
STEPS, COHORT = 38, 19
TWO = {"resources.workers": 2, "resources.cpus_per_worker": 0.25}
TRAIN = Path(__file__).resolve().parents[2] / "experiments" / "train.py"


def train_to_end(settings: Any) -> Path:
    """Start or resume a training, and return its folder."""
    return run_training(settings, lambda things, what: things)


def folder_of(settings: Any) -> Path:
    """Return the folder of a training."""
    return Path(settings.resources.storage) / "trainings" / settings.name


def sample_log(folder: Path) -> list[dict[str, Any]]:
    """Return the sample logs of all workers, sorted by time."""
    lines = [line for log in folder.glob("samples_*.jsonl") for line in log.read_text(encoding="utf-8").splitlines()]
    return sorted(map(json.loads, lines), key=lambda entry: entry["time"])


def start_positions(folder: Path) -> list[int]:
    """Return the position of each start of a worker."""
    return [entry["start"] for entry in sample_log(folder) if "start" in entry]


def learned_samples(folder: Path) -> list[str]:
    """Return the samples that the model was trained on, by position, without those that a resume undid."""
    learnt: dict[int, str] = {}
    for entry in sample_log(folder):
        if "start" in entry:  # is logged before the samples of its workers
            learnt = {position: task_id for position, task_id in learnt.items() if position < entry["start"]}
            continue
        for position, task_id in enumerate(entry["task_ids"], entry["position"]):
            assert position not in learnt, f"position {position} was seen twice"
            learnt[position] = task_id
    assert sorted(learnt) == list(range(len(learnt))), "a position was skipped"
    return [learnt[position] for position in range(len(learnt))]


def find_run(settings: Any, name: str) -> tuple[MlflowClient, Run]:
    """Return the run of a training."""
    client = MlflowClient(tracking_uri(settings.resources.storage))
    experiment = client.get_experiment_by_name(settings.experiment)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{TRIAL}` = '{name}'")
    return client, run


def losses(settings: Any, folder: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of a finished training from MLflow."""
    client, run = find_run(settings, folder.name)
    assert (run.info.status, run.data.tags["umbrella.outcome"]) == ("FINISHED", "finished")
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]


def losses_and_samples(settings: Any, folder: Path) -> tuple[list, list]:
    """Return the losses, and the samples in order; they are equal for equal trainings."""
    return losses(settings, folder), learned_samples(folder)


def assert_each_once_per_epoch(folder: Path, epochs: int) -> None:
    seen = learned_samples(folder)
    assert len(seen) >= COHORT * epochs
    for epoch in range(epochs):
        assert len(set(seen[COHORT * epoch : COHORT * (epoch + 1)])) == COHORT


def write_settings(settings: Any) -> Path:
    """Write settings to a file for a script."""
    file = Path(settings.resources.storage) / f"{settings.name}.yaml"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    return file


def count_batches(folder: Path) -> int:
    """Count the batches of a training's first worker, with repeated ones."""
    log = folder / "samples_0.jsonl"
    return log.read_text(encoding="utf-8").count('"position"') if log.exists() else 0


def wait_until(condition: Callable[[], Any], script: subprocess.Popen[str]) -> None:
    """Wait until a condition is true. The script must run meanwhile."""
    while not condition():
        assert script.poll() is None, "\n".join(script.communicate())
        time.sleep(0.01)


def at_step(folder: Path, step: int, then: Callable[[], Any]) -> threading.Thread:
    """Call ``then`` when a training's first worker has read the batch of a step, see ``count_batches``."""

    def watch() -> None:
        while count_batches(folder) < step:
            time.sleep(0.005)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def killed_once(step: int, died: Path) -> Callable[[], type]:
    """Return a language-model task whose first worker kills itself once before a step. The file ``died`` marks it."""

    def task() -> type:
        from umbrella.training.language_model import LanguageModelTask

        class Dies(LanguageModelTask):
            def __init__(self, job, rank, *others):  # type: ignore[no-untyped-def]  # this file's names stay here
                super().__init__(job, rank, *others)
                self.rank = rank

            def step(self, batches, schedule):  # type: ignore[no-untyped-def]
                if self.rank == 0 and schedule.last_epoch + 1 == step and not died.exists():
                    died.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().step(batches, schedule)

        return Dies

    return task


def command_line(process: psutil.Process) -> str:
    """Return the command line of a process, or "" if it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def kill(processes: Iterable[psutil.Process]) -> int:
    """Send SIGKILL to processes, and return how many were alive."""
    killed = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            killed += 1
    return killed


def training_workers(of: int | None = None) -> list[psutil.Process]:
    """Return the training workers of a process (default: this one)."""
    return [p for p in psutil.Process(of).children(recursive=True) if command_line(p).startswith("ray::RayTrainWorker")]


def kill_workers(of: int | None = None) -> int:
    """Send SIGKILL to the training workers of a process, and return how many there were."""
    return kill(training_workers(of))


def environment_without_ray() -> dict[str, str]:
    """Return this process's environment without Ray's variables, for a script that starts its own Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

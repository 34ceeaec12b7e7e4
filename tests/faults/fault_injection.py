"""What can go wrong with a training, on purpose, and what it leaves; for the tests of faults and for random_kills."""

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
    "train.epochs": 12, "train.evaluate_every": 5, "optim.lr": 1e-2, "data.log_samples": True,
    "resources.keep_checkpoints": 2, "experiment": "faults",
}  # fmt: skip
"""39 steps of 4 on the small cohort of 13, with a checkpoint after each 5."""
STEPS, COHORT = 39, 13
TWO = {"resources.workers": 2, "resources.cpus_per_worker": 0.25}
TRAIN = Path(__file__).resolve().parents[2] / "experiments" / "train.py"


def go_on(settings: Any) -> Path:
    """Run a training, or what is left of it; returns its folder."""
    return run_training(settings, lambda things, what: things)


def folder_of(settings: Any) -> Path:
    """Where the checkpoints of a training with a name lie."""
    return Path(settings.resources.storage) / "trainings" / settings.name


def entries(folder: Path) -> list[dict[str, Any]]:
    """What all workers have logged of their samples, as it happened."""
    lines = [line for log in folder.glob("samples_*.jsonl") for line in log.read_text(encoding="utf-8").splitlines()]
    return sorted(map(json.loads, lines), key=lambda entry: entry["time"])


def starts(folder: Path) -> list[int]:
    """The positions from which workers have started, as often as they did."""
    return [entry["start"] for entry in entries(folder) if "start" in entry]


def samples(folder: Path) -> list[str]:
    """The conversations that the model learnt from, by position; what is undone by going back is left out."""
    learnt: dict[int, str] = {}
    for entry in entries(folder):
        if "start" in entry:  # comes before anything that its workers see
            learnt = {position: task_id for position, task_id in learnt.items() if position < entry["start"]}
            continue
        for position, task_id in enumerate(entry["task_ids"], entry["position"]):
            assert position not in learnt, f"position {position} was seen twice"
            learnt[position] = task_id
    assert sorted(learnt) == list(range(len(learnt))), "a position was skipped"
    return [learnt[position] for position in range(len(learnt))]


def run_of(settings: Any, name: str) -> tuple[MlflowClient, Run]:
    """A training's one run in MLflow."""
    client = MlflowClient(tracking_uri(settings.resources.storage))
    experiment = client.get_experiment_by_name(settings.experiment)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{TRIAL}` = '{name}'")
    return client, run


def losses(settings: Any, folder: Path) -> list[tuple[int, float]]:
    """(step, loss) as MLflow has them of a training that reached its end."""
    client, run = run_of(settings, folder.name)
    assert (run.info.status, run.data.tags["umbrella.outcome"]) == ("FINISHED", "finished")
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]


def left_by(settings: Any, folder: Path) -> tuple[list, list]:
    """What two trainings that are the same have in common to the bit: the losses, and the samples in their order."""
    return losses(settings, folder), samples(folder)


def taken(folder: Path) -> int:
    """How many batches a training's first worker has taken; those done again count again."""
    log = folder / "samples_0.jsonl"
    return log.read_text(encoding="utf-8").count('"position"') if log.exists() else 0


def until(true: Callable[[], Any], script: subprocess.Popen[str]) -> None:
    """Wait for something to become true while a script runs."""
    while not true():
        assert script.poll() is None, "\n".join(script.communicate())
        time.sleep(0.01)


def when_step(folder: Path, step: int, then: Callable[[], Any]) -> threading.Thread:
    """Do something once a training's first worker has taken the batch of a step, see ``taken``."""

    def watch() -> None:
        while taken(folder) < step:
            time.sleep(0.005)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def dies_once(step: int, died: Path) -> Callable[[], type]:
    """The task of a language model whose first worker kills itself before a step, and not again: it makes a file."""

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


def named(process: psutil.Process) -> str:
    """A process's command line; nothing where it has ended meanwhile."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def kill(processes: Iterable[psutil.Process]) -> int:
    """SIGKILL to processes; returns how many there still were."""
    killed = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            killed += 1
    return killed


def training_workers(of: int | None = None) -> list[psutil.Process]:
    """The training workers that a process (this one, unless told) has started."""
    return [p for p in psutil.Process(of).children(recursive=True) if named(p).startswith("ray::RayTrainWorker")]


def kill_workers(of: int | None = None) -> int:
    """SIGKILL to the training workers of a process; returns how many there were."""
    return kill(training_workers(of))


def plain_environment() -> dict[str, str]:
    """This process's environment for a script that starts a Ray of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

"""Helpers of the tests that train, and one training that several files compare with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from umbrella.data.ingest import load_splits
from umbrella.tracking.store import open_experiment, tracking_uri
from umbrella.training.launch import run_job
from umbrella.training.run import make_job, run_training

LONGER = {"train.epochs": 8, "train.evaluate_every": 9, "optim.lr": 1e-2}
"""Long enough to learn something: 38 steps on the small cohort, evaluated five times."""
TWO_WORKERS = {"resources.workers": 2, "resources.cpus_per_worker": 0.25, "train.batch_size": 2}
"""The same global batch, on two workers."""


def no_progress(items: Any, description: str) -> Any:
    """Return the items, without a progress bar."""
    return items


class Trained(NamedTuple):
    """A finished training and its run in MLflow."""

    folder: Path
    run: Run
    steps: list[int]
    """Steps with a loss."""
    curves: dict[str, list[float]]
    """Values of each metric."""


def train(settings: Any) -> Trained:
    """Run a training on Ray Train."""
    return read_trained(settings, run_training(settings, no_progress))


def train_here(settings: Any) -> Trained:
    """Run a training in this process, as in the process of a trial. It takes seconds less than on Ray Train."""
    storage = Path(settings.resources.storage)
    uri, folder = tracking_uri(storage), storage / "trainings" / settings.name
    experiment = open_experiment(uri, settings.experiment, storage)
    tracking = {"uri": uri, "experiment": experiment, "name": settings.name, "trial": settings.name}
    run_job(make_job(settings, load_splits(settings, no_progress), tracking, str(folder)), in_process=True)
    return read_trained(settings, folder)


def read_trained(settings: Any, folder: Path) -> Trained:
    """Read the run of a training from MLflow."""
    client = MlflowClient(tracking_uri(settings.resources.storage))
    experiment = client.get_experiment_by_name(settings.experiment)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`ray.trial_id` = '{folder.name}'")
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    curves = {name: [metric.value for metric in history] for name, history in histories.items()}
    return Trained(folder, run, [metric.step for metric in histories["train/loss"]], curves)


@pytest.fixture(scope="session")
def one(small_settings: Callable[..., Any], ray_session: Any) -> Trained:
    """A training in this process, with batches of four."""
    return train_here(small_settings({**LONGER, "name": "one", "experiment": "one"}))

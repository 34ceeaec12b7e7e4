"""Trials that share a card run side by side, each on it."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from tests.ray.conftest import no_progress
from umbrella.tracking.mlflow_logger import TRIAL
from umbrella.tracking.store import tracking_uri
from umbrella.training.checkpoint_files import latest_checkpoint
from umbrella.tuning import monitor
from umbrella.tuning.sweep import run_sweep

TRIALS = 4
HOUR = 3600.0

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_four_trials_share_one_gpu(small_settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small_settings(
        {
            "tune.space": {"optim.lr": {"grid": [1e-3 * (1 + number) for number in range(TRIALS)]}},
            "tune.scheduler": "none",
            "tune.hours": 1,
            "train.epochs": 2000,  # none comes to its end
            "train.evaluate_every": 50,
            "resources.gpus_per_worker": 1 / TRIALS,
            "resources.cpus_per_worker": 0.5,
            "experiment": "fractions",
            "name": "fractions",
        }
    )
    folder, passed = Path(settings.resources.storage) / "sweeps" / "fractions", {"seconds": 0.0}

    def wait_for_all() -> None:
        while sum(latest_checkpoint(trial) is not None for trial in folder.glob("trials/*/")) < TRIALS:
            time.sleep(0.1)
        passed["seconds"] = HOUR

    threading.Thread(target=wait_for_all, daemon=True).start()
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed["seconds"]))
    answer = run_sweep(settings, frozenset(), no_progress)
    assert [trial.state for trial in answer.trials] == ["out of time"] * TRIALS
    client = MlflowClient(tracking_uri(settings.resources.storage))
    runs = client.search_runs([client.get_experiment_by_name("fractions").experiment_id])
    devices = [run.data.tags["device"] for run in runs if run.data.tags[TRIAL] in {t.trial_id for t in answer.trials}]
    assert len(devices) == TRIALS
    assert all(name.startswith("cuda") for name in devices), devices

"""Trials that share a card, or the CPUs, run side by side: each on its device, each to its end."""

from itertools import combinations
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from umbrella.tracking.mlflow_logger import TRIAL
from umbrella.tracking.store import tracking_uri
from umbrella.training.history import read_history
from umbrella.tuning.sweep import run_sweep

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("device", "gpus", "trials"),
    [
        pytest.param("cpu", 0.0, 2, id="two on the CPUs"),
        pytest.param("cuda", 0.25, 4, id="four on a card", marks=[pytest.mark.gpu, NO_GPU]),
    ],
)
def test_trials_that_fit_beside_each_other_run_at_once(
    small_settings: Any, device: str, gpus: float, trials: int
) -> None:
    experiment = f"fractions-{device}"
    settings = small_settings(
        {
            "tune.space": {"optim.lr": {"grid": [1e-3 * (1 + number) for number in range(trials)]}},
            "tune.scheduler": "none",
            "train.epochs": 4,
            "train.evaluate_every": 3,
            "resources.gpus_per_worker": gpus,
            "resources.cpus_per_worker": 0.5,
            "experiment": experiment,
            "name": experiment,
        }
    )
    answer = run_sweep(settings, frozenset(), lambda things, what: things)
    assert [trial.state for trial in answer.trials] == ["finished"] * trials
    spans = []
    for trial in answer.trials:
        rows = read_history(answer.folder / "trials" / trial.trial_id.rpartition("-")[2])
        assert len({row["begun"] for row in rows}) == 1, "a trial was interrupted"
        spans.append((rows[0]["begun"], rows[-1]["time"]))
    assert any(a[0] < b[1] and b[0] < a[1] for a, b in combinations(spans, 2)), spans
    client = MlflowClient(tracking_uri(settings.resources.storage))
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    devices = [run.data.tags["device"] for run in runs if run.data.tags[TRIAL] in {t.trial_id for t in answer.trials}]
    assert len(devices) == trials
    assert all(name.startswith(device) for name in devices), devices

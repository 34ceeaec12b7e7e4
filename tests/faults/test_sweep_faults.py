"""A sweep whose script, trials and workers are killed ends with the runs of one that was left alone."""

import random
import signal
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.faults.fault_injection import count_batches
from tests.faults.sweep_kills import find_faults, start, sweep_settings, sweep_with_kills
from umbrella.tracking.mlflow_logger import OUTCOME
from umbrella.tracking.store import tracking_uri

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("trials", "kills", "seed"), [pytest.param(3, 2, 6, marks=pytest.mark.ci), (8, 5, 2)])
def test_sweep_killed_several_times_ends_with_all_runs_correct(
    tmp_path: Path, trials: int, kills: int, seed: int
) -> None:
    settings = sweep_settings(tmp_path, trials)
    assert sweep_with_kills(settings, random.Random(seed), kills, log=print) == kills
    assert find_faults(settings) == []


@pytest.mark.ci
def test_ctrl_c_ends_a_sweep_without_a_result(tmp_path: Path) -> None:
    settings = sweep_settings(tmp_path, trials=2).with_values({"train.epochs": 2000, "train.evaluate_every": 50})
    # A shell that runs the tests in the background has it ignored, and the script would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    script = start(settings, resume=False)
    signal.signal(signal.SIGINT, before)
    while len([trial for trial in tmp_path.glob("sweeps/*/trials/*/") if count_batches(trial)]) < 2:
        assert script.poll() is None
        time.sleep(0.01)
    script.send_signal(signal.SIGINT)
    assert script.wait(60) == 130
    assert "stopped by the keyboard" in (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("sweeps/*/report.html"))
    client = MlflowClient(tracking_uri(tmp_path))
    runs = client.search_runs([client.get_experiment_by_name(settings.experiment).experiment_id])
    assert len(runs) >= 2
    assert {(run.info.status, run.data.tags[OUTCOME]) for run in runs} == {("KILLED", "killed")}

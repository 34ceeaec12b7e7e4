"""Early stopping, and the metrics of a training in MLflow, in Ray and on its dashboard."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.ray.conftest import LONGER, TWO_WORKERS, Trained, no_progress, train, train_here
from umbrella.data.ingest import load_splits
from umbrella.tracking.mlflow_logger import OUTCOME
from umbrella.training.progress_log import EVALUATION_GAUGE, FORMATS, ProgressLog, gauge_name

GRAFANA = Path(__file__).resolve().parents[2] / "ray_configs" / "grafana_dashboard.json"
PATIENT = {
    **LONGER,
    **TWO_WORKERS,
    "name": "patient",
    "experiment": "reporting",
    "train.shard": True,
    "train.evaluation_batch_size": 1,  # of an odd number of conversations, so one worker has more of them
    "train.patience": 2,
    "tune.metric": "eval/loss",
    "tune.mode": "max",  # it learns, so no evaluation is better than the first, at step 9
    "data.log_samples": True,
}
STOP = 27
"""The step of the third evaluation; the last step would be 38."""
SHOWN = FORMATS.keys() - {"train/memory_device_mib"}
"""Metrics of a training without a GPU."""

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def patient(small_settings: Callable[..., Any], ray_session: Any) -> Trained:
    """Two workers with sharded weights. The first evaluation is the best, so the third one ends the training."""
    return train(small_settings(PATIENT))


def test_early_stopping_ends_all_workers_with_a_message(patient: Trained) -> None:
    assert patient.steps == list(range(1, STOP + 1))
    assert (patient.run.info.status, patient.run.data.tags[OUTCOME]) == ("FINISHED", "stopped early")
    kept = [path.name for path in sorted(patient.folder.glob("step_*"))]
    assert kept == ["step_0000009", "step_0000027"], "the best and the newest"


def test_two_sharded_workers_have_the_curve_of_one_with_unequal_evaluation_sizes(
    patient: Trained, one: Trained, small_settings: Callable[..., Any]
) -> None:
    assert patient.curves["train/loss"] == pytest.approx(one.curves["train/loss"][:STOP], abs=1e-5)
    assert patient.curves["train/grad_norm"] == pytest.approx(one.curves["train/grad_norm"][:STOP], rel=1e-2)
    assert patient.curves["eval/loss"] == pytest.approx(one.curves["eval/loss"][:3], abs=1e-5)
    assert len(load_splits(small_settings(PATIENT), no_progress).validation) % 2 == 1


def test_mlflow_metrics_equal_the_printed_values(patient: Trained) -> None:
    assert patient.run.data.metrics.keys() >= SHOWN
    assert 0 <= patient.run.data.metrics["train/waiting_for_data"] <= 1


def test_ray_exports_the_metrics_that_grafana_queries(ray_session: Any) -> None:
    (node,) = ray_session.nodes()
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

    def page() -> dict[str, list[str]]:
        """Name of each gauge of this test to its values."""
        found: dict[str, list[str]] = {}
        with urlopen(address, timeout=30) as answer:
            for line in answer.read().decode().splitlines():
                if 'run="of a test"' in line and 'trial="of a test"' in line:
                    found.setdefault(line.split("{")[0].removeprefix("ray_"), []).append(line)
        return found

    log = ProgressLog("of a test", "of a test", time.time())
    figures = dict.fromkeys(FORMATS, 0.5)
    measured = {"eval/loss": 1.5, "eval/balanced_accuracy": 0.75}
    asked = set(re.findall(r"ray_(\w+)", GRAFANA.read_text(encoding="utf-8")))
    assert asked <= {EVALUATION_GAUGE, *map(gauge_name, figures)}
    while page().keys() != {EVALUATION_GAUGE, *map(gauge_name, figures)}:  # Ray collects them now and then
        log.update(figures, {"step": 1, "steps": 2, "epoch": 0.5, "left": None})
        log.update_evaluation(measured)
    lines = page()[EVALUATION_GAUGE]
    values = {re.search(r'metric="([^"]*)"', line)[1]: float(line.split()[-1]) for line in lines}  # type: ignore[index]
    assert values == measured
    log.close()
    while not all(line.endswith(" NaN") for lines in page().values() for line in lines):
        time.sleep(0.1)


def test_ray_dashboard_shows_names_of_job_training_and_dataset(patient: Trained, ray_session: Any) -> None:
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    (job,) = ray_session._private.worker.global_worker.gcs_client.get_all_job_info().values()
    assert job.config.metadata["job_name"] == "tests of umbrella"
    dashboard = ray_session._private.worker.get_dashboard_url()
    address = f"http://{dashboard}/api/data/datasets/{ray_session.get_runtime_context().get_job_id()}"
    with urlopen(Request(address, headers=get_auth_headers_if_auth_enabled({})), timeout=30) as answer:
        datasets = json.load(answer)["datasets"]
    named = {re.sub(r"_\d+_\d+$", "", one["dataset"]) for one in datasets}  # Ray adds two counters
    assert {"train", "validation"} <= named
    assert not any("_" in name for name in named), "a hash"


def test_early_stopped_training_does_not_resume(patient: Trained, small_settings: Callable[..., Any]) -> None:
    log = patient.folder / "samples_0.jsonl"
    before = log.read_text(encoding="utf-8").count('"position"')
    again = train_here(small_settings(PATIENT))
    assert (again.steps, log.read_text(encoding="utf-8").count('"position"')) == (patient.steps, before)
    assert (again.run.info.status, again.run.data.tags[OUTCOME]) == ("FINISHED", "stopped early")

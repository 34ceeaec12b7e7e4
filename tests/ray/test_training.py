"""One training: what it learns, logs to MLflow and writes; and how it ends."""

import gc
import os
import signal
import time
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from ray.util import placement_group, remove_placement_group
from ray.util.state import list_actors

from tests.ray.conftest import Trained, no_progress
from umbrella.base import UserError
from umbrella.data import pipeline
from umbrella.data.pipeline import Plan, batches
from umbrella.tracking.store import tracking_uri
from umbrella.training.launch import run_job
from umbrella.training.run import run_training

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_losses_fall_and_evaluations_come_every_nine_steps_and_at_the_end(one: Trained) -> None:
    curves = one.curves
    assert len(curves["train/loss"]) == 38, "38 steps of 4 are 8 epochs of 19 samples"
    assert sum(curves["train/loss"][-3:]) < 0.5 * sum(curves["train/loss"][:3])
    assert min(curves["train/grad_norm/embedder"]) > 0
    assert max(curves["train/lr"]) == pytest.approx(1e-2)
    assert len(curves["eval/loss"]) == 5
    assert curves["eval/loss"][-1] < curves["eval/loss"][0]


def test_mlflow_has_summary_settings_data_and_outcome_of_a_run(one: Trained, small_settings: Any) -> None:
    run, client = one.run, MlflowClient(tracking_uri(small_settings({}).resources.storage))
    text = Path(client.download_artifacts(run.info.run_id, "statement.txt")).read_text()
    for words in ("Σ weight·nll / Σ weight", "supervise=assistant", "assistant text", "trained weights: embedder"):
        assert words in text
    assert "sMRI: a volume of 8x8x8 in patches of 4x4x4 is 8 tokens" in text
    assert "supervise: assistant" in Path(client.download_artifacts(run.info.run_id, "settings.yaml")).read_text()
    assert (run.info.status, run.data.tags["umbrella.outcome"]) == ("FINISHED", "finished")
    assert (run.data.params["optim.lr"], run.data.params["seed"]) == ("0.01", "0")
    assert len(run.data.params["data.fingerprint"]) == 16
    assert {"device", "ray.job"} <= set(run.data.tags)


def test_checkpoint_loads_as_a_model(one: Trained) -> None:
    from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration

    last = sorted(one.folder.glob("step_*"))[-1]
    model = UmbrellaForConditionalGeneration.from_pretrained(last)
    assert set(model.config.modalities) == {"sMRI", "dMRI", "fMRI"}
    assert last.name == f"step_{len(one.curves['train/loss']):07d}"


def test_ray_listens_on_localhost_only(ray_session: Any) -> None:
    assert [node["NodeManagerAddress"] for node in ray_session.nodes()] == ["127.0.0.1"]
    assert ray_session._private.worker.get_dashboard_url().startswith("127.0.0.1:")


def test_sigterm_ends_a_script_with_status_143_although_ray_is_started(ray_session: Any) -> None:
    with pytest.raises(SystemExit) as end:
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143


def test_batches_keep_the_planned_order_whatever_their_duration(
    ray_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "ROWS_PER_CHUNK", 18)
    plan = Plan(size=30, seed=1, epochs=2, workers=2, batch_size=3, accumulate=1)

    def slow(rows: Any) -> list[int]:
        time.sleep(0.03 * (rows["sample"][0] % 3))
        return rows["sample"].tolist()

    for rank in range(2):
        rows = plan.rows(rank, 12)
        seen = [sample for batch in batches(rows, plan.batch_size, prefetch=4, make=slow) for sample in batch]
        assert seen == plan.samples(plan.positions(rank, 12)).tolist()


def test_nonfinite_loss_ends_the_training_in_one_line(small_settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process = partial(run_job, in_process=True)  # Ray Train's start takes longer
    monkeypatch.setattr("umbrella.training.run.run_job", in_process)
    settings = small_settings({"optim.lr": 1e30, "optim.warmup": 0, "experiment": "explodes"})
    with pytest.raises(
        UserError,
        match=r"the training stopped: at step \d+ the loss is nan.*; samples concerned: .*; there is no checkpoint yet",
    ):
        run_training(settings, no_progress)
    client = MlflowClient(tracking_uri(settings.resources.storage))
    (run,) = client.search_runs([client.get_experiment_by_name("explodes").experiment_id])
    assert run.info.status == "FAILED"


def test_a_training_that_waits_for_resources_stops_at_the_first_sigterm(small_settings: Any, run: Any) -> None:
    settings = small_settings({"name": "no-resources", "experiment": "waits"})
    file = Path(settings.resources.storage) / "no-resources.yaml"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    gc.collect()  # releases the CPUs of an interrupted sweep of another test
    taken = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert taken.wait(60)

    def controllers() -> set[str]:
        alive = [("class_name", "=", "TrainController"), ("state", "=", "ALIVE")]
        address = ray.get_runtime_context().gcs_address  # this machine may have another Ray
        return {actor.actor_id for actor in list_actors(address, filters=alive)}

    earlier = controllers()  # of other tests' trainings, which may not have gone yet

    def stop() -> None:
        while not controllers() - earlier:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=stop, daemon=True).start()
    try:
        done = run("train.py", str(file))
    finally:
        remove_placement_group(taken)
    line = "SIGTERM: the training stopped without a new checkpoint; umbrella train --resume no-resources continues"
    assert (done.status, done.stderr.splitlines()[-1]) == (143, line)

"""One training: what it learns, logs to MLflow and writes; and how it ends."""

import gc
import os
import signal
import time
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import ray
import torch
from mlflow import MlflowClient
from ray.util import placement_group, remove_placement_group
from ray.util.state import list_actors

from tests.ray.conftest import Trained, no_progress
from umbrella.base import UserError
from umbrella.data import pipeline
from umbrella.data.batch_maker import BatchMaker
from umbrella.data.batching import Batch, Collator
from umbrella.data.pipeline import Plan, RemoteMaker, batches, to_table
from umbrella.data.rendering import load_renderer
from umbrella.data.splits import read_splits
from umbrella.tracking.store import tracking_uri
from umbrella.training.launch import run_job
from umbrella.training.run import run_training
from umbrella.volumes.store import open_store

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


def started(make: RemoteMaker) -> RemoteMaker:
    """Wait until its processes have started."""
    ray.wait(make.starting, num_returns=len(make.starting))
    return make


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_keep_the_planned_order_whatever_their_duration(
    ray_session: Any, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BATCHES_PER_CHUNK", 9)
    plan = Plan(size=30, seed=1, epochs=2, workers=1, batch_size=3, accumulate=1)

    def slow(start: int, stop: int) -> Any:
        samples, _ = plan.rows(start, stop)
        time.sleep(0.03 * (samples[0] % 3))
        return samples

    make = started(RemoteMaker(slow, processes)) if processes else slow
    stream = batches(plan.micro_batches(0, 12), make, list, prefetch=4)
    assert [sample for batch in stream for sample in batch] == plan.samples(np.arange(12, 60)).tolist()


def test_processes_and_threads_make_the_same_batches_and_processes_decode_missing_volumes(
    ray_session: Any, small_settings: Any, tmp_path: Path
) -> None:
    settings = small_settings({"resources.store": str(tmp_path / "store")})
    train = read_splits(settings, no_progress, ("train",)).train
    lengths = np.array([len(c.volumes) for c in train])
    plan = Plan(len(train), 0, 1, 1, 4, 1, lengths=lengths, tokens=lengths, max_tokens=5)
    table, store = ray.put(to_table(train)), open_store(settings)
    volumes = {(v.image_path, v.modality) for c in train for v in c.volumes}

    def load(batch: Batch) -> Batch:
        if processes:
            files: dict[str, Any] = batch.pixel_values
            assert all(store.contains(path, name) for name, of in files.items() for path, _ in of.sources)
        return collator.read_volumes(batch)

    collator, made = Collator(load_renderer(settings), store), {}
    for processes in (1, 0):
        assert not any(store.contains(*volume) for volume in volumes) or not processes
        make: Any = BatchMaker(settings, table, plan, decode=processes > 0)
        make = started(RemoteMaker(make, processes)) if processes else make
        made[processes] = list(batches(plan.micro_batches(0), make, load, 2))
    assert len(made[0]) == len(made[1]) == plan.steps
    for one, other in zip(made[0], made[1], strict=True):
        tensors: list[list[torch.Tensor]] = [[], []]
        for batch, into in zip((one, other), tensors, strict=True):
            batch.apply(lambda tensor, into=into: into.append(tensor) or tensor)
        assert all(map(torch.equal, *tensors))
        assert (one.task_ids, one.rng_keys, one.metadata) == (other.task_ids, other.rng_keys, other.metadata)


def test_an_error_in_another_process_is_raised_as_it_is(ray_session: Any) -> None:
    def fails(start: int, stop: int) -> None:
        raise UserError(f"no batch {start} to {stop}")

    make = started(RemoteMaker(fails, 1))
    with pytest.raises(UserError, match=r"^no batch 3 to 7$"):
        make(3, 7)


def test_this_process_makes_batches_until_the_others_have_started(ray_session: Any) -> None:
    make = RemoteMaker(lambda start, stop: os.getpid(), 2)
    assert make(0, 1) == os.getpid()
    assert os.getpid() not in {started(make)(0, 1), make(1, 2)}
    make.close()
    while {make(0, 1), make(1, 2)} != {os.getpid()}:  # without them it makes batches, too
        time.sleep(0.05)


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

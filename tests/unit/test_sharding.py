"""Sharded weights: workers that hold a part of the model each train and save like one process that holds it whole."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from tests.conftest import byte_tokenizer, make_writer
from tests.unit.steps import CPU, Make, Training, join_group, run_workers
from umbrella.config import load_settings
from umbrella.data.batching import Batch
from umbrella.models.build import component_parameters
from umbrella.paths import SIZES
from umbrella.training.checkpoint_files import TrainingState
from umbrella.training.distributed import autocast, copy_to_host, copy_training_state, full_tensor, parallelise
from umbrella.training.language_model import apply_options
from umbrella.training.settings import TrainSettings
from umbrella.training.step import train_step

KEPT = ["all", "embedder+lora"]
"""Trainings of which checkpoints are made."""
CLIP = 0.003
"""Smaller than every case's first gradient."""
STEPS = [  # by worker and micro-batch; no two workers have the same modalities in a batch, and some have no volume
    [[["two", "none"], ["none"]], [["three", "two"], ["three"]], [["none"], ["two"]]],
    [[["none"], ["none", "none"]], [["two"], ["none"]], [["three"], ["three"]]],
    [[["three"], ["two"]], [["none"], ["none"]], [["none", "two"], ["none"]]],
]


class Case(NamedTuple):
    model: Any
    steps: list[list[list[Batch]]]
    """By step, worker and micro-batch."""
    dtype: torch.dtype = torch.float32
    options: TrainSettings = TrainSettings()


def whole(steps: list[list[list[Batch]]]) -> list[list[Batch]]:
    """The steps of one process that stands for all workers."""
    return [[batch for worker in step for batch in worker] for step in steps]


def shard(model: Any, workers: int, device: torch.device) -> Any:
    parallel = parallelise(model, device, workers, shard=True)
    assert parallel is model
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    return parallel


def train(model: Any, steps: Sequence[Sequence[Batch]], dtype: torch.dtype) -> dict[str, Any]:
    """A few steps with gradients that are clipped, and a forward pass in evaluation afterwards.

    The learning rate is so high that the weights show each gradient.
    """
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=20.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    parts = component_parameters(model)
    metrics = [train_step(model, batches, optimizer, schedule, CLIP, parts, dtype) for batches in steps]
    with torch.no_grad(), autocast(model, steps[0][0].input_ids.device, dtype):
        evaluated = model.eval()(**steps[0][0].model_inputs()).token_nll
    weights = {name: full_tensor(w).cpu() for name, w in model.named_parameters()}
    return {"metrics": metrics, "weights": weights, "evaluated": evaluated.cpu()}


def assert_like_one(found: dict[str, Any], one: dict[str, Any], close: float, rank: int) -> None:
    for metrics, expected in zip(found["metrics"], one["metrics"], strict=True):
        assert metrics["train/loss"] == pytest.approx(expected["train/loss"], rel=close)
        assert metrics == pytest.approx(expected, rel=10 * close)
    torch.testing.assert_close(found["weights"], one["weights"], rtol=0, atol=close)
    if rank == 0:
        torch.testing.assert_close(found["evaluated"], one["evaluated"], rtol=0, atol=10 * close)


def losses(training: Training, steps: Sequence[Sequence[Batch]]) -> list[float]:
    return [training.step(*batches)["train/loss"] for batches in steps]


def save(training: Training, folder: Path, rank: int = 0) -> None:
    weights = copy_to_host(dict(training.model.named_parameters()), rank == 0)
    tensors = copy_training_state(training.optimizer, training.schedule, rank == 0)
    if rank == 0:
        folder.mkdir()
        writer = make_writer(folder, training.model, byte_tokenizer(), load_settings())
        writer.write(TrainingState(3, 3), {}, weights, tensors)
        writer.wait()


def restored(model: Any, folder: Path) -> Training:
    training = Training(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    training.restore(folder / "step_0000003", [name for name, _ in model.named_parameters()])
    return training


def work(rank: int, folder: Path, cases: dict[str, Case], gpus: bool = False) -> None:
    device = torch.device("cuda", rank) if gpus else CPU
    for workers in (2, 3):
        if rank >= workers or (gpus and workers == 3):
            continue
        join_group(rank, workers, folder, device)
        for name, (model, steps, dtype, options) in cases.items():
            if len(steps[0]) != workers:
                continue
            own = [[batch.to(device) for batch in batches[rank]] for batches in steps]
            again = [copy.deepcopy(model) for _ in range(3)]
            apply_options(model, options)
            torch.save(train(shard(model, workers, device), own, dtype), folder / f"{name} {rank}.pt")
            if name in KEPT and not gpus:  # never stopped, stopped, and begun by one process
                one = Training(shard(again[0], workers, device))
                losses(one, own)
                save(one, folder / f"two, {name}", rank)
                found = [losses(one, own)]
                for model, begun in zip(again[1:], ("two", "one"), strict=True):
                    distributed.barrier()
                    found.append(losses(restored(shard(model, workers, device), folder / f"{begun}, {name}"), own))
                torch.save(found, folder / f"resumed {name} {rank}.pt")
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def cases(build: Make, batch_of: Make) -> dict[str, Case]:
    def steps(workers: int, pack: int = 0) -> list[list[list[Batch]]]:
        return [[[batch_of(*names, pack=pack) for names in micro] for micro in step[:workers]] for step in STEPS]

    def small(train: str, **options: Any) -> Any:
        model = build(train=train, tower_layers=2, language_layers=3, **options)
        for name, weight in model.named_parameters():
            if ".lora_B" in name:  # adapters that do something
                torch.nn.init.normal_(weight, std=0.1)
        return model

    return {
        **{train: Case(small(train), steps(2)) for train in (*KEPT, "embedder")},
        "checkpointed": Case(small("all"), steps(2), options=TrainSettings(checkpoint_activations=True)),
        "bfloat16": Case(small("embedder+lora", dtype="bfloat16"), steps(2), torch.bfloat16),
        "packed": Case(small("all"), steps(2, 10_000)),
        "lora of three": Case(small("lora"), steps(3, 200)),
    }


@pytest.fixture(scope="module")
def sharded(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for name in KEPT:
        one = Training(copy.deepcopy(cases[name].model))
        losses(one, whole(cases[name].steps))
        save(one, folder / f"one, {name}")
    run_workers(work, (folder, cases), 3)
    return folder


@pytest.mark.parametrize("name", [*KEPT, "embedder", "checkpointed", "bfloat16", "packed", "lora of three"])
def test_workers_with_sharded_weights_train_like_one_process(cases: dict[str, Case], sharded: Path, name: str) -> None:
    model, steps, dtype, _ = cases[name]
    trained = copy.deepcopy(model)
    one = train(trained, whole(steps), dtype)
    changed = {n for n, w in model.named_parameters() if not torch.equal(one["weights"][n], w)}
    assert changed == {n for n, w in model.named_parameters() if w.requires_grad}
    assert max(metrics["train/grad_norm"] for metrics in one["metrics"]) > CLIP
    for rank in range(len(steps[0])):
        found = torch.load(sharded / f"{name} {rank}.pt", weights_only=True)
        assert_like_one(found, one, 1e-6 if dtype == torch.float32 else 1e-2, rank)


@pytest.mark.parametrize("name", KEPT)
def test_a_checkpoint_of_sharded_weights_is_that_of_one_process_and_continues_with_any_number_of_workers(
    cases: dict[str, Case], sharded: Path, name: str
) -> None:
    model, steps, *_ = cases[name]
    never_stopped = Training(copy.deepcopy(model))
    losses(never_stopped, whole(steps))
    expected = losses(never_stopped, whole(steps))
    assert len(set(expected)) == len(expected)
    for rank in (0, 1):
        whole_run, stopped, begun_by_one = torch.load(sharded / f"resumed {name} {rank}.pt", weights_only=True)
        assert stopped == whole_run, "to the last bit"
        assert begun_by_one == pytest.approx(expected, rel=1e-4)
        assert whole_run == pytest.approx(expected, rel=1e-4)
    alone = restored(copy.deepcopy(model), sharded / f"two, {name}")
    assert losses(alone, whole(steps)) == pytest.approx(expected, rel=1e-4)
    files = [sharded / f"{begun}, {name}" / "step_0000003" / SIZES for begun in ("one", "two")]
    one, two = ({n: size for n, size in json.loads(f.read_text()).items() if n != "state.pt"} for f in files)
    assert one == two


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_with_sharded_weights_train_like_one(cases: dict[str, Case], tmp_path: Path) -> None:
    torch.set_float32_matmul_precision("highest")
    chosen = {name: case for name, case in cases.items() if len(case.steps[0]) == 2}
    adapted = cases["embedder+lora"]
    chosen["compiled"] = adapted._replace(model=copy.deepcopy(adapted.model), options=TrainSettings(compile=True))
    run_workers(work, (tmp_path, chosen, True), 2, "spawn")
    for name, (model, steps, dtype, _) in chosen.items():
        batches = [[batch.to("cuda") for batch in step] for step in whole(steps)]
        one = train(copy.deepcopy(model).cuda(), batches, dtype)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name} {rank}.pt", weights_only=True)
            assert_like_one(found, one, 1e-4 if dtype == torch.float32 else 3e-2, rank)

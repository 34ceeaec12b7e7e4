"""Sharded weights: workers that hold a part of the model each do what one process does that holds it whole."""

import copy
import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.tensor import DTensor

from tests.conftest import make_writer
from tests.unit.workers import run_workers
from umbrella.config import load_settings
from umbrella.data.batching import Batch
from umbrella.data.tokenizer import byte_tokenizer
from umbrella.models.build import build_model
from umbrella.models.settings import ModelSettings
from umbrella.models.trainable_parameters import component_parameters
from umbrella.paths import SIZES
from umbrella.training.checkpoint import restore, snapshot
from umbrella.training.distributed import autocast, full_tensor, parallelise, reshard
from umbrella.training.language_model import apply_options, copy_weights, load_weights
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings, TrainSettings
from umbrella.training.step import train_step
from umbrella.training.training_state import TrainingState

SMALL = {"width": 16, "heads": 2, "tower_layers": 2, "language_layers": 3}
KEPT = ["all", "embedder+lora"]
"""Of what checkpoints are made."""
OPTIM = OptimSettings(lr=1e-2, warmup=2)
CLIP = 0.003
"""Smaller than every case's first gradient."""
STEPS = [  # by worker and micro-batch; no two workers have the same modalities in a batch, and some have no volume
    [[["two", "none"], ["none"]], [["three", "two"], ["three"]], [["none"], ["two"]]],
    [[["none"], ["none", "none"]], [["two"], ["none"]], [["three"], ["three"]]],
    [[["three"], ["two"]], [["none"], ["none"]], [["none", "two"], ["none"]]],
]


class Case(NamedTuple):
    model: dict[str, Any]
    options: dict[str, Any]
    steps: list[list[list[Batch]]]
    """By step, worker and micro-batch."""
    dtype: torch.dtype = torch.float32


class Seen(NamedTuple):
    results: list[Any]
    weights: dict[str, torch.Tensor]
    evaluated: torch.Tensor


def made(case: Case, made_of: tuple) -> Any:
    torch.manual_seed(0)
    model = build_model(ModelSettings(**SMALL | case.model), *made_of).train()
    for name, weight in model.named_parameters():
        if ".lora_B" in name:  # adapters that do something
            torch.nn.init.normal_(weight, std=0.1)
    apply_options(model, TrainSettings(**case.options))
    return model


def trained(model: Any, parallel: Any, steps: Sequence[Sequence[Batch]], dtype: torch.dtype) -> Seen:
    """What a few steps do, with gradients that are clipped, and what the model says afterwards.

    The rate is so high that the weights show each gradient.
    """
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=20.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    weights = component_parameters(model)
    results = [train_step(parallel, batches, optimizer, schedule, CLIP, weights, dtype) for batches in steps]
    with torch.no_grad(), autocast(parallel, steps[0][0].input_ids.device, dtype):
        evaluated = parallel.eval()(**steps[0][0].model_inputs()).token_nll
    reshard(parallel)
    parallel.train()
    return Seen(results, {n: full_tensor(w) for n, w in model.named_parameters()}, evaluated)


def meet(rank: int, workers: int, folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    # A worker that waits for what another does not send would wait for ever.
    distributed.init_process_group(
        "gloo", f"file://{folder / name}", timeout=timedelta(minutes=10), rank=rank, world_size=workers
    )


def work(rank: int, folder: Path, made_of: tuple, cases: dict[str, Case]) -> None:
    for workers in (2, 3):
        if rank >= workers:
            continue
        meet(rank, workers, folder, f"meeting of {workers}")
        for name, case in cases.items():
            if len(case.steps[0]) != workers:
                continue
            model = made(case, made_of)
            parallel = parallelise(model, TrainSettings(shard=True), torch.device("cpu"), workers)
            assert parallel is model
            assert all(isinstance(weight, DTensor) for weight in model.parameters())
            seen = trained(model, parallel, [batches[rank] for batches in case.steps], case.dtype)
            assert all(isinstance(weight, DTensor) for weight in model.parameters())
            torch.save(tuple(seen), folder / f"{name} {rank}.pt")
        if workers == 2:
            for train in KEPT:
                torch.save(
                    resumed(rank, folder, train, made_of, cases["all"].steps), folder / f"resumed {train} {rank}.pt"
                )
        distributed.destroy_process_group()


class Training:
    """One that is saved and restored, with the optimizer of a run."""

    def __init__(self, train: str, made_of: tuple, seed: int = 0, workers: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = build_model(ModelSettings(**SMALL | {"train": train}), *made_of).train()
        self.parallel = parallelise(self.model, TrainSettings(shard=True), torch.device("cpu"), workers)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.optimizer = build_optimizer(self.model, OPTIM)
        self.schedule = build_schedule(self.optimizer, OPTIM, 6)

    def steps(self, steps: Sequence[Sequence[Batch]]) -> list[float]:
        weights = component_parameters(self.model)
        return [
            train_step(self.parallel, batches, self.optimizer, self.schedule, 1.0, weights).loss for batches in steps
        ]

    def save(self, folder: Path) -> None:
        keep = not distributed.is_initialized() or distributed.get_rank() == 0
        taken = snapshot(
            copy_weights(self.model, self.names, keep), self.optimizer, self.schedule, TrainingState(3, 3), keep=keep
        )
        if keep:
            folder.mkdir()
            writer = make_writer(folder, self.model, byte_tokenizer(), load_settings())
            writer.write(taken)
            writer.wait()

    def restore(self, folder: Path) -> None:
        load_weights(folder / "step_0000003", self.model, self.names)
        restore(folder / "step_0000003", self.optimizer, self.schedule)


def resumed(rank: int, folder: Path, train: str, made_of: tuple, steps: list[list[list[Batch]]]) -> list[list[float]]:
    """The losses after three steps of two workers: never stopped, stopped, and begun by one process."""
    own = [batches[rank] for batches in steps]
    one = Training(train, made_of, workers=2)
    one.steps(own)
    one.save(folder / f"two, {train}")
    losses = [one.steps(own)]
    for begun in ("two", "one"):
        distributed.barrier()
        again = Training(train, made_of, seed=1, workers=2)
        again.restore(folder / f"{begun}, {train}")
        losses.append(again.steps(own))
    return losses


@pytest.fixture(scope="module")
def made_of(build: Callable[..., Any], tokenizer: Any) -> tuple:
    config = build().config
    return config.modalities, len(tokenizer), config.image_token_id


@pytest.fixture(scope="module")
def cases(batch_of: Callable[..., Batch]) -> dict[str, Case]:
    def steps(workers: int, pack: int = 0) -> list[list[list[Batch]]]:
        return [[[batch_of(*names, pack=pack) for names in micro] for micro in step[:workers]] for step in STEPS]

    two, lora = steps(2), {"train": "embedder+lora"}
    cases = {train: Case({"train": train}, {}, two) for train in ("all", "embedder", "embedder+lora", "lora")}
    return cases | {
        "checkpointed": Case({"train": "all"}, {"checkpoint_activations": True}, two),
        "bfloat16": Case(lora | {"dtype": "bfloat16"}, {}, two, torch.bfloat16),
        "packed": Case({}, {}, steps(2, 10_000)),
        "of three": Case({}, {}, steps(3)),
        "lora of three": Case(lora, {}, steps(3, 200)),
    }


def together(steps: list[list[list[Batch]]]) -> list[list[Batch]]:
    """What one process has to do that stands for all workers."""
    return [[batch for worker in step for batch in worker] for step in steps]


@pytest.fixture(scope="module")
def sharded(cases: dict[str, Case], made_of: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for train in KEPT:
        one = Training(train, made_of)
        one.steps(together(cases["all"].steps))
        one.save(folder / f"one, {train}")
    run_workers(work, (folder, made_of, cases), 3)
    return folder


@pytest.mark.parametrize(
    "name",
    ["all", "embedder", "embedder+lora", "lora", "checkpointed", "bfloat16", "packed", "of three", "lora of three"],
)
def test_workers_with_sharded_weights_train_like_one_process(
    cases: dict[str, Case], made_of: tuple, sharded: Path, name: str
) -> None:
    case = cases[name]
    model = made(case, made_of)
    before = copy.deepcopy(dict(model.named_parameters()))
    one = trained(model, model, together(case.steps), case.dtype)
    close = 1e-6 if case.dtype == torch.float32 else 1e-2
    moved = {n for n, w in one.weights.items() if not torch.equal(w, before[n])}
    assert moved == {n for n, w in before.items() if w.requires_grad}
    assert max(result.grad_norm for result in one.results) > CLIP
    for rank in range(len(case.steps[0])):
        seen = Seen(*torch.load(sharded / f"{name} {rank}.pt", weights_only=False))
        for found, expected in zip(seen.results, one.results, strict=True):
            assert found.loss == pytest.approx(expected.loss, rel=close)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=10 * close)
            assert found.grad_norm_by_part == pytest.approx(expected.grad_norm_by_part, rel=10 * close)
            assert found.supervised_tokens == expected.supervised_tokens
        torch.testing.assert_close(seen.weights, one.weights, rtol=0, atol=close)
        if rank == 0:
            torch.testing.assert_close(seen.evaluated, one.evaluated, rtol=0, atol=10 * close)


@pytest.mark.parametrize("train", KEPT)
def test_a_checkpoint_of_sharded_weights_goes_on_with_as_many_workers_to_the_last_bit_and_with_others_alike(
    cases: dict[str, Case], made_of: tuple, sharded: Path, train: str
) -> None:
    steps = together(cases["all"].steps)
    never_stopped = Training(train, made_of)
    never_stopped.steps(steps)
    expected = never_stopped.steps(steps)
    for rank in (0, 1):
        whole_run, stopped, begun_by_one = torch.load(sharded / f"resumed {train} {rank}.pt", weights_only=True)
        assert stopped == whole_run
        assert begun_by_one == pytest.approx(expected, rel=1e-4)
        assert whole_run == pytest.approx(expected, rel=1e-4)
    alone = Training(train, made_of, seed=1)
    alone.restore(sharded / f"two, {train}")
    assert alone.steps(steps) == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == len(expected)


@pytest.mark.parametrize("train", KEPT)
def test_a_checkpoint_of_sharded_weights_has_the_files_of_one_that_was_never_sharded(sharded: Path, train: str) -> None:
    sizes = [
        json.loads((sharded / f"{by}, {train}" / "step_0000003" / SIZES).read_text(encoding="utf-8"))
        for by in ("one", "two")
    ]
    tensors = [{n: size for n, size in files.items() if n.endswith((".safetensors", ".json"))} for files in sizes]
    assert tensors[0] == tensors[1]
    assert sizes[0].keys() == sizes[1].keys()


def work_on_gpus(rank: int, folder: Path, made_of: tuple, cases: dict[str, Case]) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    distributed.init_process_group(
        "nccl", f"file://{folder / 'meeting'}", timeout=timedelta(minutes=5), rank=rank, world_size=2
    )
    for name, case in cases.items():
        model = made(case, made_of)
        parallel = parallelise(model, TrainSettings(shard=True), device, 2)
        steps = [[batch.to(device) for batch in batches[rank]] for batches in case.steps]
        seen = trained(model, parallel, steps, case.dtype)
        losses = [(result.loss, result.grad_norm) for result in seen.results]
        torch.save((losses, {n: w.cpu() for n, w in seen.weights.items()}), folder / f"{name} {rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_with_sharded_weights_train_like_one(cases: dict[str, Case], made_of: tuple, tmp_path: Path) -> None:
    torch.set_float32_matmul_precision("highest")
    chosen = {name: case for name, case in cases.items() if len(case.steps[0]) == 2}
    chosen["compiled"] = Case({"train": "embedder+lora"}, {"compile": True}, cases["all"].steps)
    multiprocessing.spawn(work_on_gpus, (tmp_path, made_of, chosen), nprocs=2)
    for name, case in chosen.items():
        model = made(case._replace(options=case.options | {"compile": False}), made_of).cuda()
        steps = [[batch.to("cuda") for batch in batches] for batches in together(case.steps)]
        one = trained(model, model, steps, case.dtype)
        close = 1e-4 if case.dtype == torch.float32 else 3e-2
        for rank in (0, 1):
            losses, weights = torch.load(tmp_path / f"{name} {rank}.pt", weights_only=True)
            for (loss, norm), expected in zip(losses, one.results, strict=True):
                assert loss == pytest.approx(expected.loss, rel=close), name
                assert norm == pytest.approx(expected.grad_norm, rel=10 * close), name
            torch.testing.assert_close(weights, {n: w.cpu() for n, w in one.weights.items()}, rtol=0, atol=close)

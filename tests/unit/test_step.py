"""One optimizer step: it learns, moves what it may, says what it did, and refuses what is not finite."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from tests.unit.workers import run_workers
from umbrella.data.batching import Batch, VolumeGroup
from umbrella.models.build import build_model
from umbrella.models.settings import ModelSettings
from umbrella.models.trainable_parameters import component_parameters
from umbrella.training.distributed import parallelise
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings, TrainSettings
from umbrella.training.step import Diverged, LossWatch, StepResult, train_step
from umbrella.training.trainer import to_device

OPTIM = OptimSettings(lr=1e-2, warmup=0, schedule="constant")


def stepper(model: Any, settings: OptimSettings = OPTIM) -> Callable[[Batch], StepResult]:
    optimizer = build_optimizer(model, settings)
    schedule = build_schedule(optimizer, settings, 100)
    return lambda batch: train_step(model, [batch], optimizer, schedule, settings.clip, component_parameters(model))


@pytest.fixture
def batch(batch_of: Callable[..., Batch]) -> Batch:
    return batch_of("two", "none", "three")


def test_steps_on_one_batch_learn_it_and_the_gradient_reaches_the_embedder(
    build: Callable[..., Any], batch: Batch
) -> None:
    step = stepper(build())
    results = [step(batch) for _ in range(20)]
    assert results[-1].loss < 0.5 * results[0].loss
    assert results[0].loss == pytest.approx(5.56, abs=0.3)  # ln 260: at first, every word is as likely
    assert all(result.grad_norm_by_part["embedder"] > 0 for result in results)


@pytest.mark.parametrize(
    ("train", "moving"), [("embedder", {"embedder"}), ("embedder+projector", {"embedder", "projector"})]
)
def test_only_the_selected_weights_move(build: Callable[..., Any], batch: Batch, train: str, moving: set[str]) -> None:
    model = build(train=train)
    before = copy.deepcopy(component_parameters(model))
    result = stepper(model)(batch)
    for part, weights in component_parameters(model).items():
        moved = {not torch.equal(old, new) for old, new in zip(before[part], weights, strict=True)}
        assert moved == {part in moving}
    assert set(result.grad_norm_by_part) == moving


def test_the_same_seed_gives_the_same_curve_to_the_last_bit(build: Callable[..., Any], batch: Batch) -> None:
    def curve(seed: int) -> list[StepResult]:
        step = stepper(build(seed))
        return [step(batch) for _ in range(4)]

    assert curve(0) == curve(0)
    assert curve(0)[0].loss != curve(1)[0].loss


def test_a_step_says_the_rate_it_took_and_the_gradient_before_clipping(build: Callable[..., Any], batch: Batch) -> None:
    model = build()
    before = [w.detach().clone() for w in model.parameters()]
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    result = train_step(model, [batch], optimizer, schedule, clip=0.01, parts=component_parameters(model))
    change = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before, strict=True)])
    assert change.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert result.grad_norm > 0.1
    assert sum(norm**2 for norm in result.grad_norm_by_part.values()) == pytest.approx(result.grad_norm**2, rel=1e-4)
    assert (result.lr, result.lr_by_group, optimizer.param_groups[0]["lr"]) == (0.5, {"0": 0.5}, 0.25)
    assert result.supervised_tokens == 7 + 13 + 7 + 6  # the four answers, each with two tokens of an end


def broken(batch: Batch) -> Batch:
    """The batch with the dMRI volume of "three" at infinity: its sample's likelihood is NaN."""
    group = batch.pixel_values["dMRI"]
    absurd = VolumeGroup(torch.full_like(group.voxels, torch.inf), group.run)
    return replace(batch, pixel_values=batch.pixel_values | {"dMRI": absurd})


def refusal(model: Any, batches: list[Batch], **options: Any) -> Diverged:
    """The refusal of a step, which has changed nothing."""
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, OPTIM)
    schedule = build_schedule(optimizer, OPTIM, 100)
    with pytest.raises(Diverged) as caught:
        train_step(model, batches, optimizer, schedule, 1.0, component_parameters(model), **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert (len(optimizer.state), schedule.last_epoch) == (0, 0)
    assert all(w.grad is None for w in model.parameters())
    return caught.value


@pytest.mark.parametrize("pack", [0, 10_000])
def test_what_is_not_finite_changes_nothing_and_names_the_samples_that_are_so_alone(
    build: Callable[..., Any], batch_of: Callable[..., Batch], pack: int
) -> None:
    batches = [batch_of("two", "none", pack=pack), broken(batch_of("two", "three", "none", pack=pack))]
    assert (pack == 0) or len(batches[1].input_ids) == 1  # in one row with the others, all of whose likelihoods are NaN
    error = refusal(build(), batches)
    assert error.samples == ("three",)
    assert str(error) == "the loss is nan and the norm of its gradient nan; samples concerned: three"


def test_a_gradient_that_is_not_finite_names_its_samples_too(build: Callable[..., Any], batch: Batch) -> None:
    model = build()
    embedder = model.embedder.by_modality["dMRI"].projection.weight
    embedder.register_hook(lambda gradient: torch.where(gradient != 0, torch.inf, gradient))
    error = refusal(model, [batch])
    assert error.samples == ("three",)
    assert str(error).startswith("the loss is 5.5")


def test_a_loss_over_its_limit_names_the_samples_over_it(build: Callable[..., Any], batch: Batch) -> None:
    model = build()
    each = {sample.task_ids[0]: stepper(copy.deepcopy(model))(sample).loss for sample in batch}
    low, middle, high = sorted(each, key=each.__getitem__)
    limit = (each[middle] + each[low]) / 2
    error = refusal(model, [batch], limit=limit)
    assert set(error.samples) == {middle, high}
    assert f"over the {limit:.4g} that train.max_loss_ratio allows" in str(error)
    optimizer = build_optimizer(model, OPTIM)
    schedule = build_schedule(optimizer, OPTIM, 100)
    # No gradient exceeds the limit.
    train_step(model, [batch], optimizer, schedule, 1.0, component_parameters(model), limit=each[high])


def test_a_refusal_survives_the_way_to_another_process_and_names_ten_samples_at_most() -> None:
    error = pickle.loads(pickle.dumps(Diverged("the loss is nan", [f"s{i}" for i in range(12)])))
    assert error.samples == tuple(f"s{i}" for i in range(12))
    assert str(error) == "the loss is nan; samples concerned: s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 and 2 more"
    assert str(Diverged("the loss is nan")) == "the loss is nan; samples concerned: none of this worker"


def refuse(rank: int, folder: Path, batches: list[list[Batch]], made_of: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder / 'meeting'}", timeout=timedelta(minutes=10), rank=rank, world_size=2
    )
    for shard in (False, True):
        torch.manual_seed(0)
        model = build_model(*made_of).train()
        parallel = parallelise(model, TrainSettings(shard=shard), torch.device("cpu"), 2)
        optimizer = build_optimizer(model, OPTIM)
        schedule = build_schedule(optimizer, OPTIM, 100)
        try:
            train_step(parallel, batches[rank], optimizer, schedule, 1.0, component_parameters(model))
        except Diverged as error:
            (folder / f"{shard} {rank}.txt").write_text(str(error), encoding="utf-8")
        assert all(weight.grad is None for weight in model.parameters())
    distributed.destroy_process_group()


def test_each_of_two_workers_refuses_and_names_its_own_samples(
    build: Callable[..., Any], batch_of: Callable[..., Batch], tokenizer: Any, tmp_path: Path
) -> None:
    config = build().config
    made_of = (ModelSettings(width=16, heads=2), config.modalities, len(tokenizer), config.image_token_id)
    batches = [[batch_of("two"), batch_of("none")], [broken(batch_of("three")), batch_of("two", "none")]]
    run_workers(refuse, (tmp_path, batches, made_of), 2)
    for shard in (False, True):
        told = [(tmp_path / f"{shard} {rank}.txt").read_text(encoding="utf-8").split("; ") for rank in range(2)]
        assert told[0][0] == told[1][0] == "the loss is nan and the norm of its gradient nan"
        assert [named for _, named in told] == ["samples concerned: none of this worker", "samples concerned: three"]


def test_a_loss_may_be_ten_times_the_median_of_the_last_and_ten_nats_in_any_case() -> None:
    watch = LossWatch(10, window=4, first=3)
    limits = []
    for loss in (50.0, 3.0, 2.0, 4.0, 0.1, 0.1, 0.1, 0.1):
        limits.append(watch.limit)
        watch.add(loss)
    assert limits == pytest.approx([inf, inf, inf, 30, 35, 25, 10.5, 10])


def test_a_ratio_of_zero_sets_no_limit_to_the_loss() -> None:
    watch = LossWatch(0, first=1)
    watch.add(1.0)
    assert watch.limit == inf


def test_on_a_cpu_batches_pass_as_they_are_and_when_they_are_asked_for(batch: Batch) -> None:
    given = [batch, batch[0]]
    waiting = iter(given)
    stream = to_device(waiting, "cpu")
    for i, expected in enumerate(given, 1):
        found = next(stream)
        assert found.input_ids is expected.input_ids
        assert found.pixel_values["fMRI"].voxels is expected.pixel_values["fMRI"].voxels
        assert waiting.__length_hint__() == len(given) - i
    assert next(stream, None) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_copied_ahead_are_whole_and_in_order_however_busy_the_gpu_is(batch: Batch) -> None:
    def large(number: int) -> Batch:
        voxels = torch.full((8, 96, 96, 96), number, dtype=torch.float16)
        return replace(batch, pixel_values={"sMRI": VolumeGroup(voxels, torch.arange(8))})

    work = torch.randn(4096, 4096, device="cuda")
    sums = []
    for moved in to_device((large(number) for number in range(12)), "cuda"):
        assert {moved.input_ids.device.type, moved.pixel_values["sMRI"].run.device.type} == {"cuda"}
        for _ in range(20):  # the copy of a later batch must not land in memory that this work still reads
            work = torch.tanh(work @ work)
        voxels = moved.pixel_values["sMRI"].voxels
        sums.append(torch.stack([voxels.min(), voxels.max()]))
        del moved, voxels
    assert [one.tolist() for one in sums] == [[number, number] for number in range(12)]

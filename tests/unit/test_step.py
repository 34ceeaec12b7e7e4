"""One optimizer step: what it changes and reports, and what it refuses."""

import copy
import re
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from tests.unit.steps import CPU, Make, Training, join_group, run_workers
from umbrella.data.batching import Batch, VolumeGroup
from umbrella.models.build import component_parameters
from umbrella.training.distributed import parallelise
from umbrella.training.settings import OptimSettings
from umbrella.training.step import max_loss, train_step
from umbrella.training.trainer import to_device

OPTIM = OptimSettings(lr=1e-2, warmup=0, schedule="constant")


@pytest.fixture
def batch(batch_of: Make) -> Batch:
    return batch_of("two", "none", "three")


def test_steps_on_one_batch_learn_it_with_the_same_losses_for_the_same_seed(build: Make, batch: Batch) -> None:
    training = Training(build(), OPTIM)
    results = [training.step(batch) for _ in range(20)]
    assert results[-1]["train/loss"] < 0.5 * results[0]["train/loss"]
    assert results[0]["train/loss"] == pytest.approx(5.56, abs=0.3)  # ln 260: at first, every word is as likely
    assert all(result["train/grad_norm/embedder"] > 0 for result in results)
    again = Training(build(), OPTIM)
    assert [again.step(batch) for _ in range(4)] == results[:4]
    assert Training(build(1), OPTIM).losses([batch]) != [results[0]["train/loss"]]


@pytest.mark.parametrize("train", ["embedder", "embedder+projector"])
def test_only_the_selected_weights_change(build: Make, batch: Batch, train: str) -> None:
    model = build(train=train)
    before = copy.deepcopy(component_parameters(model))
    result = Training(model, OPTIM).step(batch)
    for part, weights in component_parameters(model).items():
        changed = {not torch.equal(old, new) for old, new in zip(before[part], weights, strict=True)}
        assert changed == {part in train}
        assert (f"train/grad_norm/{part}" in result) == (part in train)


def test_a_step_reports_its_learning_rate_and_the_gradient_before_clipping(build: Make, batch: Batch) -> None:
    model = build()
    before = [w.detach().clone() for w in model.parameters()]
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    result = train_step(model, [batch], optimizer, schedule, clip=0.01, parts=component_parameters(model))
    change = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before, strict=True)])
    assert change.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert result["train/grad_norm"] > 0.1
    by_part = [norm for name, norm in result.items() if name.startswith("train/grad_norm/")]
    assert sum(norm**2 for norm in by_part) == pytest.approx(result["train/grad_norm"] ** 2, rel=1e-4)
    assert (result["train/lr"], optimizer.param_groups[0]["lr"]) == (0.5, 0.25)
    assert result["train/supervised_tokens"] == 7 + 13 + 7 + 6  # the four answers, each with two tokens of an end


def broken(batch: Batch) -> Batch:
    """The batch with infinite dMRI volumes, which only "three" has: its likelihood is NaN."""
    group = batch.pixel_values["dMRI"]
    infinite = replace(group, voxels=torch.full_like(group.voxels, torch.inf))
    return replace(batch, pixel_values=batch.pixel_values | {"dMRI": infinite})


def refusal(model: Any, *batches: Batch, **options: Any) -> str:
    """The error of a step, which has changed nothing."""
    before = copy.deepcopy(model.state_dict())
    training = Training(model, OPTIM, **options)
    with pytest.raises(FloatingPointError) as caught:
        training.step(*batches)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert (len(training.optimizer.state), training.schedule.last_epoch) == (0, 0)
    assert all(w.grad is None for w in model.parameters())
    return str(caught.value)


@pytest.mark.parametrize("pack", [0, 10_000])
def test_a_loss_that_is_not_finite_changes_nothing_and_names_its_samples(
    build: Make, batch_of: Make, pack: int
) -> None:
    batches = [batch_of("two", "none", pack=pack), broken(batch_of("two", "three", "none", pack=pack))]
    assert (pack == 0) or len(batches[1].input_ids) == 1  # in one row with the others, all of whose likelihoods are NaN
    expected = "the loss is nan and the norm of its gradient nan; samples concerned: three"
    assert refusal(build(), *batches) == expected


def test_an_error_names_ten_samples_and_counts_the_others(build: Make, batch_of: Make) -> None:
    batch = replace(broken(batch_of(*["three"] * 12)), task_ids=tuple(f"s{i}" for i in range(12)))
    names = "s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 and 2 more"
    assert refusal(build(), batch).endswith(f"; samples concerned: {names}")


def test_a_gradient_that_is_not_finite_names_its_samples(build: Make, batch: Batch) -> None:
    model = build()
    embedder = model.embedder.by_modality["dMRI"].projection.weight
    embedder.register_hook(lambda gradient: torch.where(gradient != 0, torch.inf, gradient))
    assert re.fullmatch("the loss is 5.5.* gradient inf; samples concerned: three", refusal(model, batch))


def test_a_loss_over_its_limit_names_the_samples_over_it(build: Make, batch: Batch) -> None:
    model = build()
    each = {sample.task_ids[0]: Training(copy.deepcopy(model)).losses([sample])[0] for sample in batch}
    low, middle, high = sorted(each, key=each.__getitem__)
    limit = (each[middle] + each[low]) / 2
    error = refusal(model, batch, limit=limit)
    assert set(error.split("concerned: ")[1].split(", ")) == {middle, high}
    assert f"over the {limit:.4g} that train.max_loss_ratio allows" in error
    Training(model, limit=each[high]).step(batch)  # no gradient exceeds the limit


def refuse(rank: int, folder: Path, model: Any, batches: list[list[Batch]]) -> None:
    join_group(rank, 2, folder)
    for shard in (False, True):
        own = copy.deepcopy(model)
        parallel = parallelise(own, CPU, 2, shard)
        with pytest.raises(FloatingPointError, match=r"is nan and the norm of its gradient nan; .* concerned: three$"):
            Training(own, OPTIM, parallel).step(*batches[rank])
        assert all(weight.grad is None for weight in own.parameters())
    distributed.destroy_process_group()


def test_each_of_two_workers_raises_the_error_with_the_samples_of_both(
    build: Make, batch_of: Make, tmp_path: Path
) -> None:
    batches = [[batch_of("two"), batch_of("none")], [broken(batch_of("three")), batch_of("two", "none")]]
    run_workers(refuse, (tmp_path, build(), batches), 2)


@pytest.mark.parametrize(
    ("losses", "ratio", "expected"),
    [
        ([50.0, *[3.0] * 8], 10, inf),  # too few steps
        ([50.0, *[3.0] * 9], 10, 30),
        ([0.1] * 10, 10, 10),  # at least the ratio in nats
        ([3.0] * 10, 0, inf),
    ],
)
def test_a_loss_may_be_a_multiple_of_the_median_of_the_last_losses(
    losses: list[float], ratio: float, expected: float
) -> None:
    assert max_loss(losses, ratio) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_copied_ahead_to_a_busy_gpu_are_whole_and_in_order(batch: Batch) -> None:
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

"""One optimizer step: it learns, moves what it may, says what it did, and refuses what is not finite."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from umbrella.data.batching import Batch, VolumeGroup
from umbrella.model.selection import parts
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings
from umbrella.training.step import StepResult, train_step

OPTIM = OptimSettings(lr=1e-2, warmup=0, schedule="constant")


def stepper(model: Any, settings: OptimSettings = OPTIM) -> Callable[[Batch], StepResult]:
    optimizer = build_optimizer(model, settings)
    schedule = build_schedule(optimizer, settings, 100)
    return lambda batch: train_step(model, [batch], optimizer, schedule, settings.clip, parts(model))


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
    before = copy.deepcopy(parts(model))
    result = stepper(model)(batch)
    for part, weights in parts(model).items():
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
    result = train_step(model, [batch], optimizer, schedule, clip=0.01, parts=parts(model))
    change = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before, strict=True)])
    assert change.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert result.grad_norm > 0.1
    assert sum(norm**2 for norm in result.grad_norm_by_part.values()) == pytest.approx(result.grad_norm**2, rel=1e-4)
    assert (result.lr, optimizer.param_groups[0]["lr"]) == (0.5, 0.25)
    assert result.supervised_tokens == 7 + 13 + 7 + 6  # the four answers, each with two tokens of an end


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_raises_and_changes_nothing(build: Callable[..., Any], batch: Batch, broken: str) -> None:
    model = build()
    if broken == "loss":
        group = batch.pixel_values["dMRI"]
        absurd = VolumeGroup(torch.full_like(group.voxels, torch.inf), group.run)
        batch = replace(batch, pixel_values=batch.pixel_values | {"dMRI": absurd})
    else:
        model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, OPTIM)
    schedule = build_schedule(optimizer, OPTIM, 100)
    with pytest.raises(FloatingPointError, match="the loss is"):
        train_step(model, [batch], optimizer, schedule, 1.0, parts(model))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert (len(optimizer.state), schedule.last_epoch) == (0, 0)
    assert all(w.grad is None for w in model.parameters())

"""A checkpoint that is restored under other settings of the optimizer: they act, and what it had gathered is kept."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from umbrella.config import load_settings
from umbrella.training.checkpoint import restore
from umbrella.training.optimizer import build_optimizer, build_schedule, rate_factor


def test_a_training_that_goes_on_under_another_rate_has_it(
    build: Callable[..., Any], save_step: Callable[..., Any], tmp_path: Any
) -> None:
    class Training:
        def __init__(self, rate: float) -> None:
            self.settings = load_settings(overrides={"optim.lr": rate, "optim.warmup": 1}).optim
            self.model = build(train="embedder")
            self.optimizer = build_optimizer(self.model, self.settings)
            self.schedule = build_schedule(self.optimizer, self.settings, 6)

    one = Training(1e-2)
    for _ in range(3):
        one.optimizer.step()
        one.schedule.step()
    step = save_step(tmp_path, one, 3)
    other = Training(5e-3)
    restore(step, other.model, [name for name, _ in other.model.named_parameters()], other.optimizer, other.schedule)
    for ahead in (3, 4):
        rates = {group["lr"] for group in other.optimizer.param_groups}
        assert rates == {5e-3 * rate_factor(ahead, other.settings, 6)}
        other.optimizer.step()
        other.schedule.step()


def test_a_training_that_goes_on_under_other_settings_keeps_its_moments_and_has_their_decay(
    build: Callable[..., Any], save_step: Callable[..., Any], tmp_path: Any
) -> None:
    def training(**values: float) -> Any:
        settings = load_settings(overrides={f"optim.{name}": value for name, value in values.items()}).optim
        model = build(train="embedder+projector")
        optimizer = build_optimizer(model, settings)
        return SimpleNamespace(model=model, optimizer=optimizer, schedule=build_schedule(optimizer, settings, 6))

    one = training(lr=1e-2, weight_decay=0.1)
    for weight in one.model.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    one.optimizer.step()
    one.schedule.step()
    other = training(lr=1e-3, embedder_lr=5e-3, weight_decay=0.3)
    step = save_step(tmp_path, one, 1)
    restore(step, other.model, [name for name, _ in other.model.named_parameters()], other.optimizer, other.schedule)
    for group in other.optimizer.param_groups:
        assert group["weight_decay"] == (0.3 if group["name"].endswith(".decayed") else 0)
        assert group["initial_lr"] == (5e-3 if group["name"].startswith("embedder.") else 1e-3)
    moments = one.optimizer.state_dict()["state"]
    assert moments
    torch.testing.assert_close(other.optimizer.state_dict()["state"], moments, rtol=0, atol=0)

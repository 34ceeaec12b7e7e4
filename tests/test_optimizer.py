"""What decays and what does not, and the rate of every step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings


@pytest.mark.parametrize("train", ["embedder", "all"])
def test_norms_biases_and_positions_do_not_decay_and_the_rest_does(build: Callable[..., Any], train: str) -> None:
    model = build(train=train)
    name_of = {weight: name for name, weight in model.named_parameters()}
    decayed, kept = build_optimizer(model, OptimSettings(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    moving = {name for name, weight in model.named_parameters() if weight.requires_grad}
    spared = {n for n in moving if "norm" in n or n.endswith(".bias") or ".positions." in n}
    assert {name_of[w] for w in kept["params"]} == spared
    assert {name_of[w] for w in decayed["params"]} == moving - spared
    assert {"positions.0", "projection.bias"} <= {n.split(".fMRI.")[-1] for n in spared}


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "expected"),
    [
        # After warm-up the cosine falls over four steps: 0.1 + 0.45 (1 + cos 0, π/4, π/2, 3π/4).
        ("cosine", 2, 6, [0.5, 1, 1, 0.868198, 0.55, 0.231802]),
        ("linear", 2, 6, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("constant", 4, 8, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", 0, 2, [1, 0.5]),
        ("linear", 20, 4, [0.5, 1, 1, 0.5]),  # warm-up takes half of a short training at most
        ("cosine", 20, 1, [1]),
    ],
)
def test_the_rate_of_every_step(schedule: Any, warmup: int, steps: int, expected: list[float]) -> None:
    settings = OptimSettings(lr=0.2, warmup=warmup, schedule=schedule)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), settings)
    rates = []
    running = build_schedule(optimizer, settings, steps)
    for _ in range(steps):
        rates.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        running.step()
    assert all(len(rate) == 1 for rate in rates)
    assert [rate.pop() / 0.2 for rate in rates] == pytest.approx(expected, abs=1e-6)

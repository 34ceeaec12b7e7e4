"""What decays and what does not, and the rate of every step in every group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umbrella.training.optimizer import build_optimizer, build_schedule, lr_by_group, main_lr
from umbrella.training.settings import OptimSettings


def names(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, set[str]]:
    """The weights of each group."""
    name_of = {weight: name for name, weight in model.named_parameters()}
    return {group["name"]: {name_of[w] for w in group["params"]} for group in optimizer.param_groups}


@pytest.mark.parametrize("train", ["embedder", "all", "embedder+lora"])
def test_norms_biases_and_positions_do_not_decay_and_the_rest_does(build: Callable[..., Any], train: str) -> None:
    model = build(train=train)
    optimizer = build_optimizer(model, OptimSettings(weight_decay=0.3))
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {name: 0.3 if name.endswith(".decayed") else 0.0 for name in decay}
    groups = names(model, optimizer)
    decayed, kept = (set().union(*(w for n, w in groups.items() if n.endswith(end))) for end in (".decayed", ".kept"))
    moving = {name for name, weight in model.named_parameters() if weight.requires_grad}
    spared = {n for n in moving if "norm" in n or n.endswith(".bias") or ".positions." in n}
    assert (kept, decayed) == (spared, moving - spared)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(moving)
    assert {"positions.0", "projection.bias"} <= {n.split(".fMRI.")[-1] for n in spared}
    assert any(".lora_" in name for name in decayed) == ("lora" in train)


def test_a_class_token_does_not_decay(
    build: Callable[..., Any], save_llava: Callable[..., Any], tmp_path: Path
) -> None:
    save_llava(tmp_path, "clip")
    model = build(checkpoint=str(tmp_path))
    groups = names(model, build_optimizer(model, OptimSettings()))
    assert "model.vision_tower.embeddings.class_embedding" in groups["embedder.kept"]


@pytest.mark.parametrize(("train", "rest"), [("embedder", set()), ("all", {"rest"}), ("lora", {"rest"})])
def test_the_embedder_has_groups_of_its_own(build: Callable[..., Any], train: str, rest: set[str]) -> None:
    model = build(train=train)
    for name, weights in names(model, build_optimizer(model, OptimSettings())).items():
        of_embedder = {"vision_tower.embeddings." in weight for weight in weights}
        assert of_embedder == {name.startswith("embedder.")}, name
        assert name.split(".")[0] in {"embedder"} | rest


@pytest.mark.parametrize(
    ("train", "own", "main"), [("all", 0.5, 0.2), ("all", None, 0.2), ("embedder", 0.5, 0.5), ("lora", 0.5, 0.2)]
)
def test_the_embedder_has_a_rate_of_its_own_that_one_schedule_scales(
    build: Callable[..., Any], train: str, own: float | None, main: float
) -> None:
    settings = OptimSettings(lr=0.2, embedder_lr=own, warmup=2, schedule="linear")
    optimizer = build_optimizer(build(train=train), settings)
    running = build_schedule(optimizer, settings, 6)
    for share in [0.5, 1, 1, 0.75, 0.5, 0.25]:
        by_group = lr_by_group(optimizer)
        assert by_group == {name: share * (own or 0.2 if "embedder" in name else 0.2) for name in by_group}
        assert main_lr(optimizer) == share * main
        optimizer.step()
        running.step()
    peaks = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert peaks == {name: own or 0.2 if "embedder" in name else 0.2 for name in peaks}


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
def test_the_rate_of_every_step(
    build: Callable[..., Any], schedule: Any, warmup: int, steps: int, expected: list[float]
) -> None:
    settings = OptimSettings(lr=0.2, warmup=warmup, schedule=schedule)
    optimizer = build_optimizer(build(), settings)
    found = []
    running = build_schedule(optimizer, settings, steps)
    for _ in range(steps):
        found.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        running.step()
    assert all(len(rate) == 1 for rate in found)
    assert [rate.pop() / 0.2 for rate in found] == pytest.approx(expected, abs=1e-6)


def test_on_a_cpu_the_steps_are_those_of_plain_adamw_to_the_last_bit() -> None:
    """The fused ones are not, on a CPU."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedder = torch.nn.Linear(64, 260)

    ours, plain = Model(), Model()
    decayed, kept = plain.embedder.weight, plain.embedder.bias
    settings = OptimSettings(lr=1e-3, weight_decay=0.01)
    groups = [{"params": [decayed], "weight_decay": 0.01}, {"params": [kept], "weight_decay": 0.0}]
    optimizers = build_optimizer(ours, settings), torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))  # type: ignore[arg-type]
    for _ in range(5):
        for weights in zip(ours.parameters(), plain.parameters(), strict=True):
            gradient = torch.randn(weights[0].shape)
            for weight in weights:
                weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours.embedder.weight, plain.embedder.weight)
    assert torch.equal(ours.embedder.bias, plain.embedder.bias)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_one_kernel_takes_the_step_of_plain_adamw(build: Callable[..., Any]) -> None:
    settings = OptimSettings(lr=1e-2, embedder_lr=1e-3)
    fused, plain = build().cuda(), build()
    optimizers = build_optimizer(fused, settings), build_optimizer(plain, settings)
    assert [{bool(group["fused"]) for group in o.param_groups} for o in optimizers] == [{True}, {False}]
    for _ in range(3):
        for there, here in zip(fused.parameters(), plain.parameters(), strict=True):
            if here.requires_grad:
                here.grad = torch.randn(here.shape)
                there.grad = here.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    on_cpu = {name: weight.cpu() for name, weight in fused.state_dict().items()}
    torch.testing.assert_close(on_cpu, dict(plain.state_dict()), rtol=1e-5, atol=1e-6)

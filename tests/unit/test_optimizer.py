"""Parameter groups of the optimizer, and the learning rate of every step in every group."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.steps import Make
from umbrella.training.optimizer import build_optimizer, build_schedule, main_lr
from umbrella.training.settings import OptimSettings


def names(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, set[str]]:
    """The weights of each group."""
    name_of = {weight: name for name, weight in model.named_parameters()}
    return {group["name"]: {name_of[w] for w in group["params"]} for group in optimizer.param_groups}


@pytest.mark.parametrize("train", ["embedder", "all", "embedder+lora"])
def test_groups_are_embedder_and_rest_and_only_matrices_decay(build: Make, train: str) -> None:
    model = build(train=train)
    optimizer = build_optimizer(model, OptimSettings(weight_decay=0.3))
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {name: 0.3 if name.endswith(".decayed") else 0.0 for name in decay}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    kept = {n for n in trained if "norm" in n or n.endswith(".bias") or ".positions." in n}
    embedder = {n for n in trained if "vision_tower.embeddings." in n}
    expected = {
        "embedder.decayed": embedder - kept,
        "rest.decayed": trained - embedder - kept,
        "embedder.kept": embedder & kept,
        "rest.kept": kept - embedder,
    }
    assert names(model, optimizer) == {name: weights for name, weights in expected.items() if weights}
    assert {"positions.0", "projection.bias"} <= {n.split(".fMRI.")[-1] for n in kept}
    assert any(".lora_" in name for name in trained - kept) == ("lora" in train)


def test_a_class_token_does_not_decay(build: Make, save_llava: Make, tmp_path: Path) -> None:
    save_llava(tmp_path, "clip")
    model = build(checkpoint=str(tmp_path))
    groups = names(model, build_optimizer(model, OptimSettings()))
    assert "model.vision_tower.embeddings.class_embedding" in groups["embedder.kept"]


@pytest.mark.parametrize(
    ("train", "own", "main"), [("all", 0.5, 0.2), ("all", None, 0.2), ("embedder", 0.5, 0.5), ("lora", 0.5, 0.2)]
)
def test_the_embedder_has_a_learning_rate_of_its_own_that_one_schedule_scales(
    build: Make, train: str, own: float | None, main: float
) -> None:
    settings = OptimSettings(lr=0.2, embedder_lr=own, warmup=2, schedule="linear")
    optimizer = build_optimizer(build(train=train), settings)
    schedule = build_schedule(optimizer, settings, 6)
    for share in [0.5, 1, 1, 0.75, 0.5, 0.25]:
        for group in optimizer.param_groups:
            peak = own or 0.2 if "embedder" in group["name"] else 0.2
            assert (group["lr"], group["initial_lr"]) == (share * peak, peak)
        assert main_lr(optimizer) == share * main
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("kind", "warmup", "steps", "expected"),
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
def test_the_learning_rate_of_every_step(kind: Any, warmup: int, steps: int, expected: list[float]) -> None:
    settings = OptimSettings(lr=0.2, warmup=warmup, schedule=kind)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    schedule, found = build_schedule(optimizer, settings, steps), []
    for _ in range(steps):
        found.append(main_lr(optimizer) / 0.2)
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_steps_are_those_of_plain_adamw_to_the_last_bit_on_a_cpu_and_fused_on_a_gpu(device: str) -> None:
    torch.manual_seed(0)
    weights = {"weight": torch.randn(260, 64), "bias": torch.randn(260)}
    ours, plain = ({n: torch.nn.Parameter(w.to(d)) for n, w in weights.items()} for d in (device, "cpu"))
    model: Any = SimpleNamespace(embedder=SimpleNamespace(parameters=ours.values), named_parameters=ours.items)
    optimizer = build_optimizer(model, OptimSettings(lr=1e-3, weight_decay=0.01))
    groups = [{"params": [plain["weight"]], "weight_decay": 0.01}, {"params": [plain["bias"]], "weight_decay": 0.0}]
    expected = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    assert {bool(group["fused"]) for group in optimizer.param_groups} == {device == "cuda"}
    for _ in range(5):
        for name, weight in plain.items():
            weight.grad = torch.randn(weight.shape)
            ours[name].grad = weight.grad.to(device)
        optimizer.step()
        expected.step()
    close = 0 if device == "cpu" else 1e-6
    for name, weight in plain.items():
        torch.testing.assert_close(ours[name].cpu(), weight, rtol=close, atol=close)

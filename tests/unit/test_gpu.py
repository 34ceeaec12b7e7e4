"""On a GPU: from volume to loss in bfloat16, the attention of packed rows, and the shapes of a published model."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.unit.test_real_shapes import CHECKPOINTS, MODALITIES
from umbrella.data.batching import Batch, VolumeGroup
from umbrella.models.build import from_llava
from umbrella.models.trainable_parameters import component_parameters, select_trainable
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings
from umbrella.training.step import StepResult, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ("two", "none", "three", "two")


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 means float32: no TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def step(model: Any, batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """One step of rate 0: what it says, and its gradients."""
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.0)
    seen: dict[str, torch.Tensor] = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: w.grad.clone().cpu() for n, w in model.named_parameters() if w.grad is not None})
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return train_step(model, [batch.to("cuda")], optimizer, schedule, 1e9, component_parameters(model), dtype), seen


def test_a_step_in_bfloat16_has_the_loss_and_gradients_of_float32(
    build: Callable[..., Any], batch_of: Callable[..., Batch]
) -> None:
    batch, model = batch_of(*NAMES), build().cuda()
    exact, exact_gradients = step(model, batch)
    rough, rough_gradients = step(model, batch, torch.bfloat16)
    assert rough.loss == pytest.approx(exact.loss, rel=1e-2)
    for name, gradient in exact_gradients.items():
        assert rough_gradients[name].dtype == torch.float32
        error = (rough_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert error < 0.1, f"{name}: {error}"


def test_a_gpu_and_a_cpu_agree(build: Callable[..., Any], batch_of: Callable[..., Batch]) -> None:
    batch = batch_of(*NAMES)
    with torch.no_grad():
        here = build()(**batch.model_inputs()).token_nll
        there = build().cuda()(**batch.to("cuda").model_inputs()).token_nll.cpu()
    torch.testing.assert_close(there, here, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(
    build: Callable[..., Any], batch_of: Callable[..., Batch], attention: str
) -> None:
    model = build(width=64, heads=4).cuda()
    padded, expected = step(model, batch_of(*NAMES))
    model.set_attn_implementation({"text_config": attention})
    packed, found = step(model, batch_of(*NAMES, pack=10_000))
    assert packed.loss == pytest.approx(padded.loss, abs=1e-4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_shapes_of_a_published_model_learn_a_batch_in_bfloat16() -> None:
    """llava-interleave-qwen-0.5b's shapes, random weights: the volume embedder moves, all else stands still."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        plain = LlavaForConditionalGeneration(LlavaConfig(**CHECKPOINTS["llava-interleave-qwen-0.5b"]))
        kinds = {name: modality.model_dump(mode="json") for name, modality in MODALITIES.items()}
        model = from_llava(plain, kinds, "inflated").train()
    select_trainable(model, "embedder")
    image = model.config.image_token_id
    row = [1, *[image] * 216, 2, *[image] * 1728, 3, 4, 5, 6]
    ids = torch.tensor([row, [7, *row[1:-4], 6, 5, 4, 3]])
    weights = torch.zeros(ids.shape)
    weights[:, -3:] = 1
    volumes = {
        "sMRI": VolumeGroup(torch.randn(2, 96, 96, 96, dtype=torch.float16), torch.tensor([0, 2])),
        "fMRI": VolumeGroup(torch.randn(2, 96, 96, 96, 24, dtype=torch.float16), torch.tensor([1, 3])),
    }
    batch = Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        loss_weights=weights,
        image_mask=ids == image,
        pixel_values=volumes,
        num_images_per_sample=torch.tensor([2, 2]),
        task_ids=("a", "b"),
        task_types=("T2", "T2"),
        sample_indices=torch.arange(2),
        metadata=({}, {}),
    ).to("cuda")
    optimizer = build_optimizer(model, OptimSettings(lr=1e-3, warmup=0, schedule="constant"))
    schedule = build_schedule(optimizer, OptimSettings(warmup=0, schedule="constant"), 10)
    results = [
        train_step(model, [batch], optimizer, schedule, 1.0, component_parameters(model), torch.bfloat16)
        for _ in range(8)
    ]
    assert results[-1].loss < results[0].loss
    assert set(results[0].grad_norm_by_part) == {"embedder"}
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, losses {[round(r.loss, 3) for r in results]}")

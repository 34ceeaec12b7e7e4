"""On a GPU: the numbers of a CPU, in bfloat16, packed and compiled."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.steps import Make, Training, measure
from umbrella.training.language_model import COMPILE_OPTIONS, apply_options
from umbrella.training.settings import TrainSettings

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


def assert_close(found: Any, expected: Any, close: float) -> None:
    assert found[0]["train/loss"] == pytest.approx(expected[0]["train/loss"], rel=min(close, 1e-2))
    for name, gradient in expected[1].items():
        assert found[1][name].dtype == torch.float32
        error = (found[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert error < close, f"{name}: {error}"


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("train", ["embedder+projector", "lora", "all"])
def test_a_gpu_has_the_loss_and_gradients_of_a_cpu_in_float32(
    build: Make, batch_of: Make, train: str, dtype: str, close: float
) -> None:
    batch, model = batch_of(*NAMES), build(train=train, dtype=dtype).cuda()
    found = measure(model, batch.to("cuda"), dtype=getattr(torch, dtype))
    assert_close(found, measure(build(train=train), batch), close)
    training = Training(model, dtype=getattr(torch, dtype))
    losses = training.losses([batch.to("cuda")] * 6)
    assert losses[-1] < losses[0]
    assert {state["exp_avg"].dtype for state in training.optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("prefixes", [False, True])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(build: Make, batch_of: Make, prefixes: bool) -> None:
    model = build(width=64, heads=4).cuda()
    padded, expected = measure(model, batch_of(*NAMES).to("cuda"))
    packed, found = measure(model, batch_of(*NAMES, pack=10_000, pack_prefixes=prefixes).to("cuda"))
    assert packed["train/loss"] == pytest.approx(padded["train/loss"], abs=1e-4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefixes", [False, True])
def test_rows_as_sequences_have_the_loss_and_gradients_of_padded_ones(
    build: Make, batch_of: Make, prefixes: bool
) -> None:
    model = build(width=64, heads=4).cuda()
    expected = measure(model, batch_of(*NAMES).to("cuda"))
    model.use_attention("varlen")
    packed = batch_of(*NAMES, pack=10_000, pack_prefixes=prefixes).to("cuda")
    assert_close(measure(model, packed, dtype=torch.bfloat16), expected, 0.1)


@pytest.mark.parametrize("options", [{}, {"compile": True}, {"checkpoint_activations": True}])
def test_rows_as_sequences_with_repeated_heads_and_adapters_have_the_loss_and_gradients_of_padded_ones(
    build: Make, batch_of: Make, save_llava: Make, tmp_path: Path, options: dict[str, bool]
) -> None:
    save_llava(tmp_path)  # with more heads of queries than of keys
    model = build(checkpoint=str(tmp_path), train="embedder+lora", dtype="bfloat16").cuda()
    expected = measure(model, batch_of(*NAMES).to("cuda"), dtype=torch.bfloat16)
    model.use_attention("varlen")
    apply_options(model, TrainSettings(**options))
    packed = batch_of(*NAMES, pack=10_000, pack_prefixes=True).to("cuda")
    assert_close(measure(model, packed, dtype=torch.bfloat16), expected, 0.15)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-4), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_layers_give_the_same_in_training_and_evaluation(
    build: Make, batch_of: Make, dtype: str, close: float, checkpoint: bool
) -> None:
    batches = [batch_of("two", "three").to("cuda"), batch_of(*NAMES).to("cuda")]
    model = build(train="embedder+projector", dtype=dtype, width=64, heads=4).cuda()
    arithmetic = getattr(torch, dtype)
    plain = [measure(model, batch, dtype=arithmetic) for batch in batches]
    apply_options(model, TrainSettings(compile=True, checkpoint_activations=checkpoint))
    for batch, expected in zip(batches, plain, strict=True):
        assert_close(measure(model, batch, dtype=arithmetic), expected, close)
        with torch.no_grad(), torch.autocast("cuda", arithmetic, enabled=dtype != "float32"):
            nll = model.eval()(**batch.model_inputs()).token_nll
        model.train()
        evaluated = (nll * batch.loss_weights).sum() / batch.loss_weights.sum()
        assert evaluated.item() == pytest.approx(expected[0]["train/loss"], rel=close)


def test_a_compiled_norm_reads_its_rows_once() -> None:
    norm = torch.compile(torch.nn.LayerNorm(1152).cuda(), options=COMPILE_OPTIONS)
    x = torch.randn(64, 1152, device="cuda")
    norm(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        norm(x)
    (kernel,) = [event.key for event in seen.key_averages() if event.key.startswith("triton_")]
    assert kernel.startswith("triton_per_")  # a persistent reduction: the row stays in registers

"""What saves memory or time and leaves the numbers: frozen weights in bfloat16, activations made again, compilation."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from umbrella.data.batching import Batch
from umbrella.models.token_nll import token_nll
from umbrella.models.trainable_parameters import component_parameters
from umbrella.training.checkpoint import restore
from umbrella.training.language_model import apply_options, load_weights
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings, TrainSettings
from umbrella.training.step import StepResult, train_step

NAMES = ("two", "none", "three", "two")
OPTIM = OptimSettings(lr=1e-2, warmup=0)
SELECTIONS = ["embedder", "projector", "embedder+lora", "embedder+projector+tower", "all"]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Build = Callable[..., Any]
MakeBatch = Callable[..., Batch]


def measure(model: Any, batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch and its gradients, by weight."""
    model.zero_grad()
    with torch.autocast(batch.input_ids.device.type, dtype, enabled=dtype != torch.float32):
        nll = model(**batch.model_inputs()).token_nll
    loss = (nll * batch.loss_weights).sum() / batch.loss_weights.sum()
    loss.backward()
    return loss.item(), {n: w.grad.clone().cpu() for n, w in model.named_parameters() if w.grad is not None}


class Training:
    """Steps with arithmetic in bfloat16."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, OPTIM)
        self.schedule = build_schedule(self.optimizer, OPTIM, 6)

    def steps(self, *batches: Batch) -> list[StepResult]:
        weights = component_parameters(self.model)
        return [
            train_step(self.model, [batch], self.optimizer, self.schedule, 1.0, weights, torch.bfloat16)
            for batch in batches
        ]


@pytest.fixture
def adapted(build: Build) -> Build:
    """A model whose adapters, if it has any, do something."""

    def make(train: str, **options: Any) -> Any:
        model = build(train=train, **options)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        return model

    return make


@pytest.mark.parametrize("train", SELECTIONS)
def test_matrices_that_stand_still_are_bfloat16_and_all_else_is_float32(build: Build, train: str) -> None:
    exact, model = build(train=train), build(train=train, dtype="bfloat16")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        expected = exact.get_parameter(name)
        if expected.ndim > 1 and not expected.requires_grad:
            expected = expected.bfloat16()
        assert weight.dtype == expected.dtype, name
        assert torch.equal(weight, expected), name
        assert weight.requires_grad == exact.get_parameter(name).requires_grad
    assert {weight.dtype for weight in exact.parameters()} == {torch.float32}
    assert all(torch.equal(b, model.get_buffer(n)) for n, b in exact.named_buffers())


@pytest.mark.parametrize("train", SELECTIONS)
def test_frozen_weights_in_bfloat16_have_the_loss_and_gradients_of_float32(
    adapted: Build, batch_of: MakeBatch, train: str
) -> None:
    batch = batch_of(*NAMES)
    loss, gradients = measure(adapted(train), batch)
    rough, rough_gradients = measure(adapted(train, dtype="bfloat16"), batch, torch.bfloat16)
    assert rough == pytest.approx(loss, rel=1e-3)
    assert rough_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert rough_gradients[name].dtype == torch.float32
        error = (rough_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert error < 0.05, f"{name}: {error}"


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_a_tower_read_before_its_end_works_although_its_last_layers_are_frozen(
    build: Build, save_llava: Build, batch_of: MakeBatch, tmp_path: Path, tower: str
) -> None:
    save_llava(tmp_path, tower, vision_feature_layer=-2)
    model = build(checkpoint=str(tmp_path), dtype="bfloat16")
    assert {w.dtype for w in model.model.vision_tower.parameters()} == {torch.float32, torch.bfloat16}
    losses = [result.loss for result in Training(model).steps(*[batch_of(*NAMES)] * 5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("init", ["random", "inflated"])
def test_what_moves_keeps_every_digit_of_a_checkpoint_in_half_precision(
    build: Build, save_llava: Build, tmp_path: Path, init: str
) -> None:
    save_llava(tmp_path, "clip").half().save_pretrained(tmp_path)
    options = {"checkpoint": str(tmp_path), "embedder_init": init, "train": "embedder+projector"}
    exact, model = build(**options), build(**options, dtype="bfloat16")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, exact.get_parameter(name).to(weight.dtype)), name
    trained = [weight for part in ("embedder", "projector") for weight in component_parameters(model)[part]]
    assert {weight.dtype for weight in trained} == {torch.float32}


def test_likelihoods_and_gradients_are_float32_products_of_frozen_words_in_bfloat16() -> None:
    torch.manual_seed(0)
    hidden, words = torch.randn(1, 5, 8, requires_grad=True), torch.randn(260, 8).bfloat16()
    ids, weights = torch.randint(260, (1, 5)), torch.ones(1, 5)
    logits = (hidden @ words.float().T)[:, :-1]
    exact = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    found = token_nll(hidden, words, ids, weights)
    torch.testing.assert_close(found[:, 1:], exact)
    gradients = [torch.autograd.grad(nll.sum(), hidden)[0] for nll in (exact, found)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("train", ["embedder", "embedder+lora"])
def test_a_checkpoint_of_two_dtypes_is_put_back_to_the_last_bit(
    build: Build, batch_of: MakeBatch, save_step: Callable[..., Path], tmp_path: Path, train: str
) -> None:
    batches = [batch_of(name) for name in ("two", "three", "none", "two")]
    one = Training(build(train=train, dtype="bfloat16"))
    one.steps(*batches[:2])
    step = save_step(tmp_path, one, 2)
    rest = one.steps(*batches[2:])
    other = Training(build(seed=1, train=train, dtype="bfloat16"))
    load_weights(step, other.model, [])
    restore(step, other.optimizer, other.schedule)
    assert other.steps(*batches[2:]) == rest
    for name, weight in one.model.named_parameters():
        found = other.model.get_parameter(name)
        assert found.dtype == weight.dtype, name
        assert torch.equal(found, weight), name


def test_a_run_goes_on_from_the_model_that_another_saved_in_two_dtypes(build: Build, tmp_path: Path) -> None:
    saved = build(train="projector", dtype="bfloat16")
    saved.save_pretrained(tmp_path)
    model = build(checkpoint=str(tmp_path), train="embedder+projector", dtype="bfloat16")
    for name, weight in saved.named_parameters():
        assert torch.equal(model.get_parameter(name).float(), weight.float()), name


def test_a_model_of_two_dtypes_answers_under_autocast(build: Build, batch_of: MakeBatch) -> None:
    model, batch = build(dtype="bfloat16", train="embedder").eval(), batch_of("two")
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    options = {"max_new_tokens": 3, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    with torch.autocast("cpu", torch.bfloat16):
        answer = model.generate(**prompt, **options)
    exact = build(train="embedder").eval().generate(**prompt, **options)
    assert answer.sequences.shape == exact.sequences.shape
    torch.testing.assert_close(answer.logits[0].float(), exact.logits[0], rtol=0, atol=0.02)


def saved_bytes(model: Any, batch: Batch) -> int:
    """What the forward pass keeps for the backward pass, beside weights."""
    kept: dict[int, int] = {}
    weights = {weight.data_ptr() for weight in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch.model_inputs())
    del output
    return sum(kept.values())


@pytest.mark.parametrize("train", [*SELECTIONS, "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_computed_again_give_the_same_loss_and_gradients(
    adapted: Build, batch_of: MakeBatch, train: str, dtype: str
) -> None:
    batch, arithmetic = batch_of(*NAMES), getattr(torch, dtype)
    model = adapted(train, dtype=dtype, tower_layers=2, lora_dropout=0.1)
    again = copy.deepcopy(model)
    apply_options(again, TrainSettings(checkpoint_activations=True))
    found = []
    for one in (model, again):
        torch.manual_seed(2)  # of the dropout
        found.append(measure(one, batch, arithmetic))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-6)
    assert list(again.state_dict()) == list(model.state_dict())


def test_activations_computed_again_are_not_kept(build: Build, batch_of: MakeBatch) -> None:
    batch = batch_of(*NAMES)
    model = build(tower_layers=2)
    before = saved_bytes(model, batch)
    apply_options(model, TrainSettings(checkpoint_activations=True))
    assert saved_bytes(model, batch) < 0.5 * before
    assert not model.get_input_embeddings()._forward_hooks


def test_without_options_a_model_stays_as_it_is(build: Build) -> None:
    model = build()
    apply_options(model, TrainSettings())
    layers = [*model.model.vision_tower.encoder.layers, *model.model.language_model.layers]
    assert [layer for layer in layers if layer.gradient_checkpointing or layer._compiled_call_impl] == []


@pytest.fixture
def traced() -> Iterator[Any]:
    """Compilation as far as the graphs, which then run uncompiled: the compiler itself would take a minute here."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_layers_give_the_same_and_share_their_graphs_whatever_the_length(
    build: Build, batch_of: MakeBatch, traced: Any, checkpoint: bool
) -> None:
    batches = [batch_of("two", "three"), batch_of("two", "none", "two"), batch_of("two", "three", "three", pack=300)]
    model = build(train="embedder", tower_layers=3, language_layers=4)
    expected = [measure(model, batch) for batch in batches]
    names = list(model.state_dict())
    apply_options(model, TrainSettings(compile=True, checkpoint_activations=checkpoint))
    for batch, (loss, gradients) in zip(batches, expected, strict=True):
        found = measure(model, batch)
        assert found[0] == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(found[1], gradients, rtol=0, atol=1e-6)
    assert list(model.state_dict()) == names
    assert 0 < traced["unique_graphs"] <= 12


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("train", [*SELECTIONS, "lora"])
    def test_frozen_weights_in_bfloat16_learn_and_take_half_the_room(
        self, build: Build, batch_of: MakeBatch, train: str
    ) -> None:
        model = build(train=train, dtype="bfloat16", width=64, heads=4).cuda()
        training = Training(model)
        losses = [result.loss for result in training.steps(*[batch_of(*NAMES).to("cuda")] * 6)]
        assert losses[-1] < losses[0]
        assert {state["exp_avg"].dtype for state in training.optimizer.state.values()} == {torch.float32}
        still = [w for w in model.parameters() if not w.requires_grad]
        taken = sum(w.numel() * w.element_size() for w in still)
        assert train == "all" or taken < 2.1 * sum(w.numel() for w in still)

    def test_frozen_weights_in_bfloat16_have_the_loss_and_gradients_of_a_cpu_in_float32(
        self, build: Build, batch_of: MakeBatch
    ) -> None:
        batch = batch_of(*NAMES)
        loss, gradients = measure(build(train="embedder+projector"), batch)
        model = build(train="embedder+projector", dtype="bfloat16").cuda()
        rough, rough_gradients = measure(model, batch.to("cuda"), torch.bfloat16)
        assert rough == pytest.approx(loss, rel=1e-3)
        for name, gradient in gradients.items():
            error = (rough_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
            assert error < 0.05, f"{name}: {error}"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_compiled_layers_give_the_same_in_training_and_evaluation(
        self, build: Build, batch_of: MakeBatch, dtype: str, checkpoint: bool
    ) -> None:
        batches = [batch_of("two", "three").to("cuda"), batch_of(*NAMES).to("cuda")]
        model = build(train="embedder+projector", dtype=dtype, width=64, heads=4).cuda()
        arithmetic = getattr(torch, dtype)
        plain = [measure(model, batch, arithmetic) for batch in batches]
        apply_options(model, TrainSettings(compile=True, checkpoint_activations=checkpoint))
        close = 1e-4 if dtype == "float32" else 3e-2
        for batch, (loss, gradients) in zip(batches, plain, strict=True):
            found = measure(model, batch, arithmetic)
            assert found[0] == pytest.approx(loss, rel=close)
            for name, gradient in gradients.items():
                error = (found[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
                assert error < close, f"{name}: {error}"
            with torch.no_grad(), torch.autocast("cuda", arithmetic, enabled=dtype != "float32"):
                nll = model.eval()(**batch.model_inputs()).token_nll
            model.train()
            evaluated = (nll * batch.loss_weights).sum() / batch.loss_weights.sum()
            assert evaluated.item() == pytest.approx(loss, rel=close)

    def test_activations_computed_again_take_less_memory(self, build: Build, batch_of: MakeBatch) -> None:
        model = build(width=256, heads=4, language_layers=8).cuda()
        batch = batch_of(*NAMES * 8).to("cuda")
        peaks = []
        for options in (TrainSettings(), TrainSettings(checkpoint_activations=True)):
            apply_options(model, options)
            measure(model, batch)  # what is made once, is made
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            measure(model, batch)
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[1] < 0.6 * peaks[0]

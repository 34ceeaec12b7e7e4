"""What saves memory or time keeps the numbers: frozen weights in bfloat16, recomputed activations, compilation."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.steps import Make, Training, measure
from umbrella.data.batching import Batch
from umbrella.training.language_model import apply_options
from umbrella.training.settings import TrainSettings

NAMES = ("two", "none", "three", "two")


@pytest.fixture
def adapted(build: Make) -> Make:
    """A model whose adapters, if it has any, do something."""

    def make(train: str, **options: Any) -> Any:
        model = build(train=train, **options)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        return model

    return make


@pytest.mark.parametrize("train", ["embedder", "projector", "embedder+lora", "embedder+projector+tower", "all"])
def test_frozen_matrices_are_bfloat16_with_the_loss_and_gradients_of_float32(
    adapted: Make, batch_of: Make, train: str
) -> None:
    exact, model, batch = adapted(train), adapted(train, dtype="bfloat16"), batch_of(*NAMES)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        expected = exact.get_parameter(name)
        dtype = torch.bfloat16 if weight.ndim > 1 and not weight.requires_grad else torch.float32
        assert (weight.dtype, expected.dtype) == (dtype, torch.float32), name
        assert torch.equal(weight, expected.to(dtype)), name
        assert weight.requires_grad == expected.requires_grad
    metrics, gradients = measure(exact, batch)
    rough, rough_gradients = measure(model, batch, dtype=torch.bfloat16)
    assert rough["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-3)
    assert rough_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert rough_gradients[name].dtype == torch.float32
        error = (rough_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert error < 0.05, f"{name}: {error}"


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_a_tower_read_before_its_end_trains_although_its_last_layers_are_frozen(
    build: Make, save_llava: Make, batch_of: Make, tmp_path: Path, tower: str
) -> None:
    save_llava(tmp_path, tower, vision_feature_layer=-2)
    model = build(checkpoint=str(tmp_path), dtype="bfloat16")
    assert {w.dtype for w in model.model.vision_tower.parameters()} == {torch.float32, torch.bfloat16}
    losses = Training(model, dtype=torch.bfloat16).losses([batch_of(*NAMES)] * 5)
    assert losses[-1] < losses[0]


def test_a_model_of_two_dtypes_is_saved_loaded_and_answers_under_autocast(
    build: Make, batch_of: Make, tmp_path: Path
) -> None:
    model, batch = build(dtype="bfloat16", train="embedder").eval(), batch_of("two")
    prompt = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "pixel_values")}
    options = {"max_new_tokens": 3, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    with torch.autocast("cpu", torch.bfloat16):
        answer = model.generate(**prompt, **options)
    exact = build(train="embedder").eval().generate(**prompt, **options)
    assert answer.sequences.shape == exact.sequences.shape
    torch.testing.assert_close(answer.logits[0].float(), exact.logits[0], rtol=0, atol=0.02)
    model.save_pretrained(tmp_path)
    again = build(checkpoint=str(tmp_path), train="embedder+projector", dtype="bfloat16")
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name).float(), weight.float()), name


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


@pytest.mark.parametrize(
    ("train", "dtype"),
    [("all", "float32"), ("embedder+lora", "bfloat16"), ("lora", "float32")],
)
def test_recomputed_activations_give_the_same_loss_and_gradients_and_are_not_kept(
    adapted: Make, batch_of: Make, train: str, dtype: str
) -> None:
    batch = batch_of(*NAMES)
    model = adapted(train, dtype=dtype, tower_layers=2, lora_dropout=0.1)
    again = copy.deepcopy(model)
    apply_options(again, TrainSettings(checkpoint_activations=True))
    found = []
    for one in (model, again):
        torch.manual_seed(2)  # of the dropout
        found.append(measure(one, batch, dtype=getattr(torch, dtype)))
    assert found[1][0]["train/loss"] == pytest.approx(found[0][0]["train/loss"], abs=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-6)
    assert list(again.state_dict()) == list(model.state_dict())
    assert train != "all" or saved_bytes(again, batch) < 0.5 * saved_bytes(model, batch)
    assert not again.get_input_embeddings()._forward_hooks


@pytest.fixture
def traced() -> Iterator[Any]:
    """Compilation as far as the graphs, which then run uncompiled: the compiler itself would take a minute here."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def test_compiled_and_recomputed_layers_give_the_same_and_share_their_graphs_whatever_the_length(
    build: Make, batch_of: Make, traced: Any
) -> None:
    batches = [batch_of("two", "three"), batch_of("two", "none", "two"), batch_of("two", "three", "three", pack=300)]
    model = build(train="embedder", tower_layers=2, language_layers=3)
    expected = [measure(model, batch) for batch in batches]
    names = list(model.state_dict())
    apply_options(model, TrainSettings(compile=True, checkpoint_activations=True))
    for batch, (metrics, gradients) in zip(batches, expected, strict=True):
        found = measure(model, batch)
        assert found[0]["train/loss"] == pytest.approx(metrics["train/loss"], abs=1e-6)
        torch.testing.assert_close(found[1], gradients, rtol=0, atol=1e-6)
    assert list(model.state_dict()) == names
    assert 0 < traced["unique_graphs"] <= 5

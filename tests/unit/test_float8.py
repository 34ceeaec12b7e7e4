"""Products with frozen weights in float8: close to the exact ones, only in training, and with the same checkpoints."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional
from transformers import LlamaConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP
from transformers.models.siglip.modeling_siglip import SiglipMLP

from tests.unit.steps import Make, measure
from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.models.float8 import (
    LINEARS,
    Float8Attention,
    Float8Layers,
    apply_frozen_dtype,
    quantise_frozen_linears,
    replace_frozen,
)
from umbrella.models.float8_operators import quantise, quantise_joined
from umbrella.training.language_model import apply_options
from umbrella.training.run import check_model
from umbrella.training.settings import TrainSettings


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return functional.cosine_similarity(one.detach().flatten().double(), other.detach().flatten().double(), 0).item()


def rounded(values: torch.Tensor) -> torch.Tensor:
    """The values as float8 has them, with a scale for each row."""
    scale = values.abs().amax(1, keepdim=True) / 448
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def test_a_linear_layer_multiplies_rows_rounded_to_float8_forward_and_backward() -> None:
    layer = nn.Linear(48, 32).requires_grad_(False)
    x, grad = torch.randn(5, 48).bfloat16().requires_grad_(), torch.randn(5, 32).bfloat16()
    output = Float8Layers(layer, "")(x)
    output.backward(grad)
    expected = rounded(x.detach().float()) @ rounded(layer.weight).T + layer.bias
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(x.grad.float(), rounded(grad.float()) @ rounded(layer.weight.T).T, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("activation", list(LINEARS))
def test_output_and_input_gradient_are_close_to_the_exact_layers(activation: str) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 176}
    mlps = {"gelu_pytorch_tanh": SiglipMLP(SiglipVisionConfig(**size)), "silu": Qwen2MLP(Qwen2Config(**size))}
    layer = mlps.get(activation, nn.Linear(64, 64, bias=False)).requires_grad_(False)
    x, grad = torch.randn(3, 40, 64), 1e-7 * torch.randn(3, 40, 64)  # gradients are small
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(leaf) for module, leaf in zip((layer, Float8Layers(layer, activation)), leaves, strict=True)]
    for output in outputs:
        output.backward(grad.to(output.dtype))
    assert 0.99 < cosine(*outputs) < 0.99999
    assert 0.99 < cosine(*(leaf.grad for leaf in leaves)) < 0.99999
    assert torch.equal(Float8Layers(layer, activation).eval()(x), layer(x))


class Attention(nn.Module):
    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.scaling = 2.0
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, n, bias=biased) for n in (64, 32, 32))
        self.requires_grad_(False)

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
        projected = [layer(hidden_states) for layer in (self.v_proj, self.q_proj, self.k_proj)]
        return [scale * self.scaling * one for one in projected]


@pytest.mark.parametrize("biased", [False, True])
def test_attention_projects_as_the_layers_alone_and_adds_their_gradients(biased: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(biased)
    parent, linears = nn.Sequential(attention), [attention.v_proj, attention.q_proj, attention.k_proj]
    alone = [Float8Layers(linear, "") for linear in linears]
    names = list(parent.state_dict())
    replace_frozen(parent)
    assert isinstance(parent[0], Float8Attention)
    assert list(parent.state_dict()) == names
    leaves = [torch.randn(3, 40, 64).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    expected, found = [6 * one(leaves[0]) for one in alone], parent[0](hidden_states=leaves[1], scale=3.0)
    grads = [torch.randn_like(output) for output in expected]
    gradients = [torch.autograd.grad(*of, grads)[0] for of in ((expected, leaves[0]), (found, leaves[1]))]
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert cosine(*gradients) > 0.998  # one scale for three gradients
    assert torch.equal(parent.eval()[0](leaves[0])[0], 2 * linears[0](leaves[0]))


def test_a_projection_of_another_input_is_the_layer_itself() -> None:
    class Doubled(Attention):
        def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
            return [scale * layer(2 * hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj)]

    attention, x = Doubled(), torch.randn(3, 40, 64)
    expected = attention(x)
    assert all(torch.equal(one, other) for one, other in zip(expected, Float8Attention(attention)(x), strict=True))


@pytest.mark.parametrize("checkpoint", [(), ("siglip", "qwen2"), ("clip", "llama")])
@pytest.mark.parametrize("train", ["embedder", "embedder+projector", "embedder+lora"])
def test_a_model_has_close_gradients_the_same_weights_and_the_same_evaluation(
    build: Make, batch_of: Make, save_llava: Make, tmp_path: Path, train: str, checkpoint: tuple[str, ...]
) -> None:
    if checkpoint:
        save_llava(tmp_path, *checkpoint)
    model = build(train=train, dtype="bfloat16", width=64, checkpoint=str(tmp_path) if checkpoint else "")
    batch = batch_of("two", "none", "three", "two")

    def evaluate() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model.eval()(**batch.model_inputs()).token_nll

    evaluated, before = evaluate(), {name: weight.clone() for name, weight in model.state_dict().items()}
    exact, gradients = measure(model.train(), batch, dtype=torch.bfloat16)
    quantise_frozen_linears(model)
    rough, found = measure(model, batch, dtype=torch.bfloat16)
    assert rough["train/loss"] == pytest.approx(exact["train/loss"], rel=0.03)
    assert found.keys() == gradients.keys()
    assert 0.95 < cosine(*(torch.cat([g.flatten() for g in of.values()]) for of in (gradients, found))) < 1 - 1e-6
    assert torch.equal(evaluate(), evaluated)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # attention with three projections, its output, and the MLP as one, in a tower of one layer
        ({"train": "embedder"}, 3 + 2 * 3 + 2),
        ({"train": "embedder+tower"}, 2 * 3 + 2),
        ({"train": "embedder+lora"}, 3 + 2 * 7 + 2),  # layers with adapters, one by one
        ({"train": "embedder", "width": 24, "heads": 1}, 0),  # no multiple of 16
    ],
)
def test_frozen_linear_layers_use_float8_and_no_others(build: Make, options: dict[str, Any], expected: int) -> None:
    model = build(dtype="bfloat16", **options)
    quantise_frozen_linears(model)
    assert sum(isinstance(module, (Float8Layers, Float8Attention)) for module in model.modules()) == expected


def test_quantisation_is_joined_with_the_norms_beside_it_only(build: Make, save_llava: Make, tmp_path: Path) -> None:
    save_llava(tmp_path, "clip", "llama")
    found = {}
    for checkpoint, train in (("", "embedder"), (str(tmp_path), "embedder+lora")):
        model = build(train=train, dtype="bfloat16", width=64, checkpoint=checkpoint)
        quantise_frozen_linears(model)
        found |= {n: m.norm for n, m in model.named_modules() if isinstance(m, Float8Layers)}
    short = {name.removesuffix(".base_layer").rpartition(".")[2]: norm for name, norm in found.items()}
    # keys and values of this model are too narrow for float8
    inputs = dict.fromkeys(("q_proj", "fc1", "gate_proj", "up_proj", "mlp"), "input")
    gradients = dict.fromkeys(("out_proj", "o_proj"), "gradient")
    assert short == inputs | gradients | dict.fromkeys(("fc2", "down_proj", "linear_1", "linear_2"), "none")


@pytest.mark.parametrize("kind", [Qwen2Attention, LlamaAttention])
def test_attention_with_fewer_heads_of_keys_is_close_to_the_exact_one(kind: Any) -> None:
    torch.manual_seed(0)
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    config: Any = {Qwen2Attention: Qwen2Config, LlamaAttention: LlamaConfig}[kind](hidden_size=64, **heads)
    parent = nn.Sequential(kind(config, 0).requires_grad_(False))
    x = torch.randn(3, 40, 64)
    cosines, sines = torch.ones(3, 40, 16).bfloat16(), torch.zeros(3, 40, 16).bfloat16()
    given = (cosines, sines), None  # of positions, and no mask
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [parent[0](leaves[0], *given)[0]]
    outputs[0].sum().backward()
    replace_frozen(parent)
    assert isinstance(parent[0], Float8Attention)
    outputs.append(parent[0](leaves[1].bfloat16(), *given)[0])
    outputs[1].sum().backward()
    assert 0.99 < cosine(*outputs) < 0.99999
    assert 0.99 < cosine(*(leaf.grad for leaf in leaves)) < 0.99999


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
@pytest.mark.parametrize(
    "other", [nn.Linear(32, 32, bias=False), nn.Linear(64, 48, bias=False), nn.Linear(64, 32), nn.Identity()]
)
def test_projections_that_do_not_fit_together_stay_apart(name: str, other: nn.Module) -> None:
    attention = Attention()
    setattr(attention, name, other.requires_grad_(False))
    parent = nn.Sequential(attention)
    replace_frozen(parent)
    fits = name == "q_proj" and getattr(other, "out_features", 0) == 48
    assert isinstance(parent[0], Float8Attention) is fits
    assert fits or isinstance(parent[0].k_proj, Float8Layers)


def test_projections_are_freed_without_garbage_collection() -> None:
    projected = []

    class Remembering(Attention):
        def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
            projected.append(weakref.ref(self.q_proj(hidden_states)))
            return []

    attention = Float8Attention(Remembering())
    gc.disable()
    try:
        attention(torch.randn(3, 40, 64))
        assert [one() for one in projected] == [None]
    finally:
        gc.enable()


def test_quantised_again_it_has_the_loaded_weights(build: Make) -> None:
    models, x = [build(seed, train="embedder", dtype="bfloat16") for seed in (0, 1)], torch.randn(4, 16)
    for model in models:
        quantise_frozen_linears(model)
    one, other = (model.model.multi_modal_projector.linear_1 for model in models)
    attentions = [model.model.language_model.layers[0].self_attn for model in models]
    models[0].load_state_dict(models[1].state_dict())
    assert not torch.equal(one(x), other(x))
    assert not all(map(torch.equal, *(attention.weights[:2] for attention in attentions)))
    quantise_frozen_linears(models[0])
    assert torch.equal(one(x), other(x))
    assert all(torch.equal(*pair) for pair in zip(*(a.weights for a in attentions), strict=True) if None not in pair)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_layers_have_one_graph_and_quantise_a_common_input_once(
    build: Make, batch_of: Make, checkpoint: bool
) -> None:
    graphs: dict[str, list[Any]] = {"fw_compiler": [], "bw_compiler": []}
    compilers: Any = {
        name: lambda graph, inputs, of=of: of.append(graph) or make_boxed_func(graph.forward)
        for name, of in graphs.items()
    }
    backend = aot_autograd(**compilers, partition_fn=min_cut_rematerialization_partition)
    model = build(train="embedder", dtype="bfloat16", tower_layers=2, language_layers=3)
    quantise_frozen_linears(model)
    batch = batch_of("two", "none", "three", "two")
    expected, _ = measure(model, batch, dtype=torch.bfloat16)
    apply_options(model, TrainSettings(compile=True, checkpoint_activations=checkpoint))
    with torch.compiler.set_stance("default", force_backend=backend):
        found, _ = measure(model, batch, dtype=torch.bfloat16)
    torch._dynamo.reset()
    assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-3)
    calls = {
        w: {
            tuple(g.code.count(kind) for kind in ("float8_e4m3fn", "float8_quantise.", "float8_quantise_joined."))
            for g in of
        }
        for w, of in graphs.items()
    }
    # After norms, attention's inputs, which they share, and the MLP's; attention's output and the MLP's activation.
    # Backward: the gradient of attention's output; of its inputs together, of the MLP's output, and of its activation.
    # With checkpoints, the backward pass computes the forward pass again, but for the last product.
    assert calls == {"fw_compiler": {(2, 2, 0)}, "bw_compiler": {(3, 3, 1) if checkpoint else (1, 2, 1)}}


def test_it_is_refused_without_a_gpu_without_frozen_weights_and_in_float32() -> None:
    settings = {"model.frozen_dtype": "float8", "model.dtype": "bfloat16", "model.train": "embedder"}
    with pytest.raises(UserError, match=r"frozen_dtype=float8: needs a GPU of compute capability 8\.9 or higher, "):
        apply_frozen_dtype(nn.Linear(1, 1), load_settings(overrides=settings).model)
    with pytest.raises(UserError, match=r"frozen_dtype=float8: needs a GPU; set resources\.gpus_per_worker=1"):
        check_model(load_settings(overrides=settings))
    sharded = {"resources.gpus_per_worker": 1, "resources.workers": 2, "train.shard": True}
    with pytest.raises(UserError, match=r"frozen_dtype=float8: cannot quantise sharded weights"):
        check_model(load_settings(overrides=settings | sharded))
    for wrong in ({"model.train": "all"}, {"model.dtype": "float32"}):
        with pytest.raises(UserError, match=r"^model: frozen_dtype=float8 needs dtype=bfloat16 and frozen weights"):
            load_settings(overrides=settings | wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("activation", list(LINEARS))
def test_kernels_round_as_the_reference(activation: str) -> None:
    x, grad = torch.randn(9, 176).bfloat16(), 1e-7 * torch.randn(9, 88 if activation == "silu" else 176).bfloat16()
    for above in (None, grad):
        values, scale = quantise(x, activation, above)
        found, found_scale = quantise(x.cuda(), activation, above if above is None else above.cuda())
        torch.testing.assert_close(found_scale.cpu(), scale, rtol=1e-5, atol=0)
        assert (found.cpu().float() == values.float()).float().mean() > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("widths", [(176, 176, 176), (1152, 1152, 1152), (256, 64, 64)])
def test_the_kernel_for_three_parts_rounds_as_the_reference(widths: tuple[int, ...]) -> None:
    parts = [1e-7 * torch.randn(9, width).bfloat16() for width in widths]
    values, scale = quantise_joined(parts)
    found, found_scale = quantise_joined([part.cuda() for part in parts])
    torch.testing.assert_close(found_scale.cpu(), scale, rtol=1e-5, atol=0)
    assert (found.cpu().float() == values.float()).float().mean() > 0.99

"""Products with frozen weights in float8 (e4m3), in training: ``model.frozen_dtype``.

Weights are quantised once, with a scale for each row: as they are for the forward pass, and transposed for the gradient
of the input. Activations and gradients are quantised before each product, with a scale for each row (token). Modules
keep their original weights for checkpoints and evaluation.

The implementation for CPUs is the reference for the kernels.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from umbrella.base import UserError
from umbrella.models.settings import ModelSettings

CACHEABLE = dict.fromkeys(
    ("umbrella.models.float8.multiply_in_float8", "umbrella.models.float8.project_in_float8"),
    hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
)
"""Functions that compilation does not trace, with their key in the cache of compiled code: a hash of this file."""
LARGEST = 448.0
"""Largest value of e4m3."""
Norm = Literal["input", "gradient", "none"]
AFTER_NORM, BEFORE_NORM = ("q_proj", "k_proj", "v_proj", "fc1", "gate_proj", "up_proj", "mlp"), ("out_proj", "o_proj")
"""Names of modules whose input comes from a norm, and of those whose gradient comes from one in the backward pass."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Names of the linear layers of attention that have the same input."""
LINEARS = {
    "": (("",), ()),
    "gelu_pytorch_tanh": (("fc1",), ("fc2",)),
    "silu": (("gate_proj", "up_proj"), ("down_proj",)),
}
"""Linear layers before and after the activation of an MLP, and the linear layer itself, which has no activation."""


def activate(x: torch.Tensor, activation: str, grad: torch.Tensor | None = None) -> torch.Tensor:
    """Apply an activation, or multiply a gradient by its derivative, in float32.

    Args:
        x: (M, K). For "silu", gate and up (M, 2F), beside each other.
        activation: "" for none, "gelu_pytorch_tanh", or "silu" for silu(gate) * up.
        grad: None, or the gradient of the result.

    Returns:
        The result, (M, K) or (M, F); with ``grad`` the gradient of ``x``.
    """
    x, grad = x.float(), None if grad is None else grad.float()
    if activation == "gelu_pytorch_tanh":
        if grad is None:
            return functional.gelu(x, approximate="tanh")
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    if activation == "silu":
        gate, up = x.chunk(2, 1)
        if grad is None:
            return functional.silu(gate) * up
        sigmoid = gate.sigmoid()
        return torch.cat([grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid], 1)
    return x


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``x`` (M, N) with a scale for each row, by operations that compilation joins with a norm before them.

    Returns:
        Quantised values (M, N), float8_e4m3fn, and scales (M,), float32. Their product is the value.
    """
    values = x.float().contiguous()  # products need rows
    largest = values.abs().amax(1).clamp_min(1e-30)
    return (values * (LARGEST / largest)[:, None]).to(torch.float8_e4m3fn), largest / LARGEST


def operator(function: Callable[..., Any]) -> Any:
    """Make an operator, which compilation does not trace, of a function.

    ``torch.library.custom_op`` does it, too, but adds 80 µs of Python to each call, and a step has 900 calls.
    """
    name = f"float8_{function.__name__}"
    torch.library.define(f"umbrella::{name}", torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(f"umbrella::{name}", ("cpu", "cuda"), function)
    return getattr(torch.ops.umbrella, name).default


@operator
def quantise(
    x: torch.Tensor, activation: str = "", grad: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the rows of ``activate(x, activation, grad)``, by one kernel on a GPU. See ``quantise_rows``."""
    if x.is_cuda:
        from umbrella.models import float8_kernels  # needs Triton

        return float8_kernels.quantise(x.contiguous(), activation, None if grad is None else grad.contiguous())
    return quantise_rows(activate(x, activation, grad))


@torch.library.register_fake("umbrella::float8_quantise")
def _(x: torch.Tensor, activation: str = "", grad: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    columns = x.shape[1] // 2 if activation == "silu" and grad is None else x.shape[1]
    result = x.new_empty((x.shape[0], columns), dtype=torch.float8_e4m3fn)
    return result, x.new_empty(x.shape[0], dtype=torch.float32)


@operator
def quantise_beside(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the rows of three matrices (M, N₁), (M, N₂), (M, N₂) beside each other. See ``quantise_rows``."""
    if parts[0].is_cuda:
        from umbrella.models import float8_kernels  # needs Triton

        return float8_kernels.quantise_beside([part.contiguous() for part in parts])
    return quantise_rows(torch.cat(parts, 1))


@torch.library.register_fake("umbrella::float8_quantise_beside")
def _(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = parts[0].shape[0], sum(part.shape[1] for part in parts)
    result = parts[0].new_empty((rows, columns), dtype=torch.float8_e4m3fn)
    return result, parts[0].new_empty(rows, dtype=torch.float32)


@operator
def multiply(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x wᵀ + bias (M, N), bfloat16, of quantised rows ``x`` (M, K) and ``w`` (N, K) with their scales."""
    if not x.is_cuda:
        product = (x.float() * x_scale[:, None]) @ (w.float() * w_scale[:, None]).T
        return (product if bias is None else product + bias).bfloat16()
    by_row = functional.ScalingType.RowWise
    return functional.scaled_mm(
        x, w.t(), x_scale[:, None], by_row, w_scale[None], by_row, bias=bias, use_fast_accum=True
    )  # fmt: skip


@torch.library.register_fake("umbrella::float8_multiply")
def _(x: torch.Tensor, x_scale: Any, w: torch.Tensor, w_scale: Any, bias: Any = None) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=torch.bfloat16)


class Float8Products(torch.autograd.Function):
    """A product with a frozen weight, or two with an activation between them.

    The result of the activation exists only quantised, and so does the gradient of its input.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, activation: str, norm: Norm, *weights: torch.Tensor | None) -> torch.Tensor:
        """Return the product (M, N), bfloat16.

        Args:
            x: input (M, K), bfloat16.
            activation: see ``activate``.
            norm: see ``Float8Layers``.
            weights: see ``quantise_weight``; those of the second product after those of the first.
        """
        first, second = weights[:5], weights[5:]
        ctx.activation, ctx.norm = activation, norm
        output = multiply(*(quantise_rows if norm == "input" else quantise)(x), *first[:2], first[4])
        ctx.save_for_backward(*first[2:4], *second[2:4], *([output] if second else []))
        return multiply(*quantise(output, activation), *second[:2], second[4]) if second else output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of ``x``, bfloat16."""
        weight, scale, *second = ctx.saved_tensors
        quantised = (quantise_rows if ctx.norm == "gradient" else quantise)(grad)
        if second:
            quantised = quantise(second[2], ctx.activation, multiply(*quantised, *second[:2]))
        return multiply(*quantised, weight, scale), *[None] * (12 if second else 7)


def quantise_weight(linears: Sequence[Any]) -> tuple[torch.Tensor | None, ...]:
    """Quantise the weights of linear layers with the same input, as one matrix (N, K).

    Returns:
        The matrix and the scales of its rows, its transpose (K, N) and the scales of its rows, and the bias (N,),
        bfloat16, or None. Without layers: nothing.
    """
    if not linears:
        return ()
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach().bfloat16() for linear in linears if linear.bias is not None]
    return *quantise(weight), *quantise(weight.t()), torch.cat(biases) if biases else None


@torch.compiler.allow_in_graph  # as one call: torch.compile fails to trace a second use in a layer
def multiply_in_float8(x: torch.Tensor, activation: str, norm: Norm, *weights: torch.Tensor | None) -> torch.Tensor:
    """See ``Float8Products``."""
    output: torch.Tensor = Float8Products.apply(x, activation, norm, *weights)
    return output


class Float8Layers(nn.Module):
    """A frozen linear layer or MLP, whose products are in float8 in training.

    It has the parameters and submodules of the original, under the same names.

    Args:
        original: the module.
        activation: key in ``LINEARS``.
        norm: what the norm beside it computes, and compilation joins with its quantisation: the input of the module,
            the gradient of its output, or neither.
    """

    def __init__(self, original: Any, activation: str, norm: Norm = "none") -> None:
        super().__init__()
        if isinstance(original, nn.Linear):
            self.weight, self.bias = original.weight, original.bias
        for name, child in original.named_children():
            self.add_module(name, child)
        self.evaluate, self.activation, self.norm = type(original).forward, activation, norm
        self.train(original.training)
        self.quantise()

    def quantise(self) -> None:
        """Quantise the weights, which may have been loaded anew."""
        first, second = ([self.get_submodule(name) for name in names] for names in LINEARS[self.activation])
        self.weights = (*quantise_weight(first), *quantise_weight(second))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output (..., N) for an input (..., K)."""
        if not self.training:
            return self.evaluate(self, x)
        flat = x.bfloat16().flatten(0, -2)
        norm = self.norm if torch.compiler.is_compiling() else "none"  # uncompiled, nothing is joined
        output = multiply_in_float8(flat, self.activation, norm, *self.weights)
        return output.view(*x.shape[:-1], output.shape[1])


class ProjectionProducts(torch.autograd.Function):
    """Products of one input with three frozen weights. The gradient of the input is one product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm, *weights: Any) -> tuple[torch.Tensor, ...]:
        """Return the products (M, Nᵢ), bfloat16.

        Args:
            x: input (M, K), bfloat16.
            norm: see ``Float8Layers``.
            weights: transpose of all weights as one matrix (K, N) and the scales of its rows, both for the gradient;
                then for each product the weight (Nᵢ, K), the scales of its rows, and the bias or None.
        """
        ctx.save_for_backward(*weights[:2])
        quantised = (quantise_rows if norm == "input" else quantise)(x)
        return tuple(multiply(*quantised, *of) for of in zip(weights[2::3], weights[3::3], weights[4::3], strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of ``x``, bfloat16."""
        return multiply(*quantise_beside(list(grads)), *ctx.saved_tensors), *[None] * 12


@torch.compiler.allow_in_graph
def project_in_float8(x: torch.Tensor, norm: Norm, *weights: Any) -> tuple[torch.Tensor, ...]:
    """See ``ProjectionProducts``."""
    outputs: tuple[torch.Tensor, ...] = ProjectionProducts.apply(x, norm, *weights)
    return outputs


class Projected:
    """An attention module that has the queries, keys and values of an input already."""

    def __init__(self, attention: nn.Module, x: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
        self.attention, self.input, self.outputs = attention, x, outputs
        self.q_proj, self.k_proj, self.v_proj = (partial(self.project, i) for i in range(len(PROJECTIONS)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)

    def project(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return the output of a projection."""
        if x is self.input:
            return self.outputs[index]
        layer: Any = self.attention.get_submodule(PROJECTIONS[index])  # in case a model changes its input before
        output: torch.Tensor = layer(x)
        return output


class Float8Attention(nn.Module):
    """Self-attention whose frozen projections to query, key and value are in float8 in training.

    It has the parameters and submodules of the original, under the same names.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(original).items() if not name.startswith("_")})
        for name, child in original.named_children():
            self.add_module(name, child)
        self.attend = type(original).forward
        self.quantise()

    def quantise(self) -> None:
        """See ``Float8Layers.quantise``."""
        linears: list[Any] = [self.get_submodule(name) for name in PROJECTIONS]
        weight, scale, transposed, its_scale, bias = quantise_weight(linears)
        assert weight is not None
        assert scale is not None
        sizes = [len(linear.weight) for linear in linears]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        by_layer = zip(weight.split(sizes), scale.split(sizes), biases, strict=True)
        self.weights = (transposed, its_scale, *chain.from_iterable(by_layer))

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """Return what the original returns."""
        if not self.training:
            return self.attend(self, hidden_states, *arguments, **options)
        flat = hidden_states.bfloat16().flatten(0, -2)
        norm: Norm = "input" if torch.compiler.is_compiling() else "none"  # uncompiled, nothing is joined
        products = project_in_float8(flat, norm, *self.weights)
        outputs = [product.view(*hidden_states.shape[:-1], product.shape[1]) for product in products]
        return self.attend(Projected(self, hidden_states, outputs), hidden_states, *arguments, **options)


def _has_frozen_projections(module: nn.Module) -> bool:
    linears: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
    _, key, value = linears
    return (
        all(_activation(linear) == "" for linear in linears)
        and key.weight.shape == value.weight.shape
        and len({linear.bias is None for linear in linears}) == 1
    )


def _activation(module: Any) -> str | None:
    """Return the key of a frozen linear layer or MLP in ``LINEARS``, or None for another module."""
    key = "" if type(module) is nn.Linear else getattr(getattr(module, "config", None), "hidden_act", "none")
    first, second = LINEARS.get(key, ((), ()))
    linears = [getattr(module, name, None) if name else module for name in (*first, *second)]
    frozen = [
        type(linear) is nn.Linear
        and not any(weight.requires_grad for weight in linear.parameters())
        and all(size % 16 == 0 for size in linear.weight.shape)  # as the products on a GPU need it
        for linear in linears
    ]
    return key if frozen and all(frozen) else None


def replace_frozen(parent: nn.Module, of_parent: str = "") -> None:
    """Replace the frozen linear layers, MLPs and attentions within a module, in place; replaced ones quantise again."""
    for name, child in parent.named_children():
        named = of_parent if name == "base_layer" else name  # of a layer with an adapter
        activation = _activation(child)
        if isinstance(child, (Float8Layers, Float8Attention)):
            child.quantise()
        elif _has_frozen_projections(child):
            setattr(parent, name, Float8Attention(child))
        elif activation is not None and not (isinstance(parent, Float8Attention) and name in PROJECTIONS):
            norm: Norm = "input" if named in AFTER_NORM else "gradient" if named in BEFORE_NORM else "none"
            setattr(parent, name, Float8Layers(child, activation, norm))
        replaced = parent.get_submodule(name)
        if not isinstance(replaced, Float8Layers):
            replace_frozen(replaced, named)


def quantise_frozen_linears(model: Any) -> None:
    """Let the frozen linear layers of vision tower, projector and language model use float8 in training. In place.

    Called again, it quantises the current weights.

    Args:
        model: an ``UmbrellaForConditionalGeneration`` on its device.
    """
    tower, language = model.model.vision_tower, model.model.language_model
    for stack in (tower.encoder.layers[: max(model.feature_layers)], language.layers):
        for layer in stack:
            replace_frozen(layer)
    replace_frozen(model.model.multi_modal_projector)


def apply_frozen_dtype(model: Any, settings: ModelSettings) -> None:
    """Apply ``model.frozen_dtype`` to a model on the device on which it is trained, in place.

    Raises:
        UserError: the device has no products in float8.
    """
    if settings.frozen_dtype == "same":
        return
    device = next(model.parameters()).device
    is_gpu = device.type == "cuda"
    if not is_gpu or torch.cuda.get_device_capability(device) < (8, 9):
        found = torch.cuda.get_device_name(device) if is_gpu else "a CPU; set resources.gpus_per_worker=1"
        raise UserError(f"model.frozen_dtype=float8: needs a GPU of compute capability 8.9 or higher, and has {found}")
    quantise_frozen_linears(model)

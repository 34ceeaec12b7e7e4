"""Products with frozen weights in float8 (e4m3), in training: ``model.frozen_dtype``.

Weights are quantised once, with a scale for each row: as they are for the forward pass, and transposed for the gradient
of the input. Activations and gradients are quantised before each product, with a scale for each row (token). Modules
keep their original weights for checkpoints and evaluation.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from umbrella.base import UserError
from umbrella.models import float8_operators
from umbrella.models.float8_operators import multiply, quantise, quantise_joined, quantise_rows
from umbrella.models.settings import ModelSettings

CACHEABLE = dict.fromkeys(
    ("umbrella.models.float8.multiply_in_float8", "umbrella.models.float8.project_in_float8"),
    hashlib.sha256(Path(__file__).read_bytes() + Path(float8_operators.__file__).read_bytes()).hexdigest(),
)
"""Functions that compilation does not trace, with their key in the cache of compiled code: a hash of their source."""
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


def quantise_weight(linears: Sequence[Any]) -> tuple[Any, ...]:
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

    It has the attributes of the original: its parameters and submodules have the same names.

    Args:
        original: the module.
        activation: key in ``LINEARS``.
        norm: what the norm beside it computes, and compilation joins with its quantisation: the input of the module,
            the gradient of its output, or neither.
    """

    def __init__(self, original: Any, activation: str, norm: Norm = "none") -> None:
        super().__init__()
        vars(self).update(vars(original))
        self.evaluate, self.activation, self.norm = type(original).forward, activation, norm
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
        return multiply(*quantise_joined(list(grads)), *ctx.saved_tensors), *[None] * 12


@torch.compiler.allow_in_graph
def project_in_float8(x: torch.Tensor, norm: Norm, *weights: Any) -> tuple[torch.Tensor, ...]:
    """See ``ProjectionProducts``."""
    outputs: tuple[torch.Tensor, ...] = ProjectionProducts.apply(x, norm, *weights)
    return outputs


def _project(x: torch.Tensor, output: torch.Tensor, layer: nn.Module, given: torch.Tensor) -> torch.Tensor:
    # Another input: attention that transforms its input first.
    return output if given is x else layer(given)


class ProjectedAttention:
    """An attention module that has the queries, keys and values of its input already.

    Args:
        attention: the module, whose other attributes it has.
        x: the input, (..., K).
        outputs: queries, keys and values, (..., Nᵢ) each.
    """

    def __init__(self, attention: nn.Module, x: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
        self.attention = attention
        # No reference to self: a cycle would keep the outputs until the next garbage collection.
        for name, output in zip(PROJECTIONS, outputs, strict=True):
            setattr(self, name, partial(_project, x, output, attention.get_submodule(name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)


class Float8Attention(nn.Module):
    """Self-attention whose frozen projections to query, key and value are in float8 in training.

    It has the attributes of the original, and calls its forward method, which uses attributes and submodules only.
    transformers does not recognise the class, so ``output_attentions`` returns nothing.

    Args:
        original: attention of transformers, with linear layers named as in ``PROJECTIONS``.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        vars(self).update(vars(original))
        self.attend = type(original).forward
        self.quantise()

    def quantise(self) -> None:
        """See ``Float8Layers.quantise``."""
        linears: list[Any] = [self.get_submodule(name) for name in PROJECTIONS]
        weight, scale, transposed, transposed_scale, bias = quantise_weight(linears)
        sizes = [len(linear.weight) for linear in linears]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        by_layer = zip(weight.split(sizes), scale.split(sizes), biases, strict=True)
        self.weights = (transposed, transposed_scale, *chain.from_iterable(by_layer))

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """Return what the original returns."""
        if not self.training:
            return self.attend(self, hidden_states, *arguments, **options)
        flat = hidden_states.bfloat16().flatten(0, -2)
        norm: Norm = "input" if torch.compiler.is_compiling() else "none"  # uncompiled, nothing is joined
        products = project_in_float8(flat, norm, *self.weights)
        outputs = [product.view(*hidden_states.shape[:-1], product.shape[1]) for product in products]
        return self.attend(ProjectedAttention(self, hidden_states, outputs), hidden_states, *arguments, **options)


def _has_frozen_projections(module: nn.Module) -> bool:
    linears: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
    _, key, value = linears
    return (
        all(_activation(linear) == "" for linear in linears)
        and key.out_features == value.out_features
        and len({(linear.in_features, linear.bias is None) for linear in linears}) == 1
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
    done = PROJECTIONS if isinstance(parent, Float8Attention) else ()
    for name, child in parent.named_children():
        if name in done:
            continue
        named = of_parent if name == "base_layer" else name  # of a layer with an adapter
        activation = _activation(child)
        if isinstance(child, (Float8Layers, Float8Attention)):
            child.quantise()
        elif _has_frozen_projections(child):
            child = Float8Attention(child)
            setattr(parent, name, child)
        elif activation is not None:
            norm: Norm = "input" if named in AFTER_NORM else "gradient" if named in BEFORE_NORM else "none"
            child = Float8Layers(child, activation, norm)
            setattr(parent, name, child)
        if not isinstance(child, Float8Layers):
            replace_frozen(child, named)


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

"""Operators of ``float8``: quantisation of rows and products. The implementation for CPUs is the reference for GPUs."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

LARGEST = 448.0
"""Largest value of e4m3."""


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


def define_operator(function: Callable[..., Any]) -> Any:
    """Define an operator of torch, which compilation does not trace.

    ``torch.library.custom_op`` does it, too, but adds much more Python to each call, and a step has 900 calls.

    Args:
        function: its implementation on CPU and GPU.

    Returns:
        The operator, which is called like the function.
    """
    name = f"float8_{function.__name__}"
    torch.library.define(f"umbrella::{name}", torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(f"umbrella::{name}", ("cpu", "cuda"), function)
    return getattr(torch.ops.umbrella, name).default


@define_operator
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


@define_operator
def quantise_joined(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the rows of three matrices (M, N₁), (M, N₂), (M, N₂), joined to (M, N₁ + 2N₂). See ``quantise_rows``."""
    if parts[0].is_cuda:
        from umbrella.models import float8_kernels  # needs Triton

        return float8_kernels.quantise_joined([part.contiguous() for part in parts])
    return quantise_rows(torch.cat(parts, 1))


@torch.library.register_fake("umbrella::float8_quantise_joined")
def _(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = parts[0].shape[0], sum(part.shape[1] for part in parts)
    result = parts[0].new_empty((rows, columns), dtype=torch.float8_e4m3fn)
    return result, parts[0].new_empty(rows, dtype=torch.float32)


@define_operator
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

"""Triton kernels that quantise rows to float8, after an activation or its derivative. They need a GPU and Triton."""
# mypy: disable-error-code=no-untyped-def

import torch
import triton
import triton.language as tl


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _values(x, grad, row, column, width, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr):
    """The values of one block of a row: those of x or of the gate, and those of the other half if there are two."""
    mask = column < width
    second = 0.0
    if ACTIVATION == "silu":
        gate = _load(x, row * 2 * width + column, mask)
        up = _load(x, row * 2 * width + width + column, mask)
        sigmoid = tl.sigmoid(gate)
        if BACKWARD:
            above = _load(grad, row * width + column, mask)
            value = above * up * sigmoid * (1 + gate * (1 - sigmoid))
            second = above * gate * sigmoid
        else:
            value = gate * sigmoid * up
    else:
        value = _load(x, row * width + column, mask)
    if ACTIVATION == "gelu_pytorch_tanh":
        # gelu(x) = x * sigmoid(2u); 2u = sqrt(8 / pi) * (x + 0.044715 x^3)
        sigmoid = tl.sigmoid(1.5957691216057308 * value * (1 + 0.044715 * value * value))
        if BACKWARD:
            slope = 1.5957691216057308 * (1 + 0.134145 * value * value)
            value = _load(grad, row * width + column, mask) * sigmoid * (1 + value * (1 - sigmoid) * slope)
        else:
            value = value * sigmoid
    return value, second


@triton.jit
def _quantise(
    x,
    grad,
    result,
    scales,
    width,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    # One row each, in two blocks: a single power of two would have up to twice the width.
    row = tl.program_id(0).to(tl.int64)
    main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    a, a2 = _values(x, grad, row, main, width, ACTIVATION, BACKWARD)
    b, b2 = _values(x, grad, row, rest, width, ACTIVATION, BACKWARD)
    largest = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
    columns = width
    if ACTIVATION == "silu" and BACKWARD:
        largest = tl.maximum(largest, tl.maximum(tl.max(tl.abs(a2), 0), tl.max(tl.abs(b2), 0)))
        columns = 2 * width
    largest = tl.maximum(largest, 1e-30)
    tl.store(scales + row, largest / 448.0)
    inverse = 448.0 / largest
    result += row * columns
    dtype = result.dtype.element_ty
    tl.store(result + main, (a * inverse).to(dtype), mask=main < width)
    tl.store(result + rest, (b * inverse).to(dtype), mask=rest < width)
    if ACTIVATION == "silu" and BACKWARD:
        tl.store(result + width + main, (a2 * inverse).to(dtype), mask=main < width)
        tl.store(result + width + rest, (b2 * inverse).to(dtype), mask=rest < width)


@triton.jit
def _quantise_joined(a, b, c, result, scales, width_a, width_b, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column_a, column_b = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B)
    mask_a, mask_b = column_a < width_a, column_b < width_b
    of_a = _load(a + row * width_a, column_a, mask_a)
    of_b, of_c = _load(b + row * width_b, column_b, mask_b), _load(c + row * width_b, column_b, mask_b)
    largest = tl.maximum(tl.max(tl.abs(of_a), 0), tl.maximum(tl.max(tl.abs(of_b), 0), tl.max(tl.abs(of_c), 0)))
    largest = tl.maximum(largest, 1e-30)
    tl.store(scales + row, largest / 448.0)
    inverse = 448.0 / largest
    result += row * (width_a + 2 * width_b)
    dtype = result.dtype.element_ty
    tl.store(result + column_a, (of_a * inverse).to(dtype), mask=mask_a)
    tl.store(result + width_a + column_b, (of_b * inverse).to(dtype), mask=mask_b)
    tl.store(result + width_a + width_b + column_b, (of_c * inverse).to(dtype), mask=mask_b)


def quantise(x: torch.Tensor, activation: str, grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``float8_operators.quantise``; ``x`` and ``grad`` are contiguous."""
    gated = activation == "silu"
    width = x.shape[1] // 2 if gated else x.shape[1]
    columns = width if grad is None else x.shape[1]
    result = x.new_empty((x.shape[0], columns), dtype=torch.float8_e4m3fn)
    scales = x.new_empty(x.shape[0], dtype=torch.float32)
    main = triton.next_power_of_2(width) // 2
    warps = (8 if width <= 8192 else 16) if gated else (2 if width <= 2048 else 4)
    blocks = (main, triton.next_power_of_2(width - main))
    above = x if grad is None else grad
    _quantise[(x.shape[0],)](x, above, result, scales, width, activation, grad is not None, *blocks, num_warps=warps)
    return result, scales


def quantise_joined(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``float8_operators.quantise_joined``; the parts are contiguous."""
    rows, widths = parts[0].shape[0], [part.shape[1] for part in parts]
    result = parts[0].new_empty((rows, sum(widths)), dtype=torch.float8_e4m3fn)
    scales = parts[0].new_empty(rows, dtype=torch.float32)
    blocks = [triton.next_power_of_2(width) for width in widths[:2]]
    _quantise_joined[(rows,)](*parts, result, scales, *widths[:2], *blocks, num_warps=4 if widths[0] <= 2048 else 8)
    return result, scales

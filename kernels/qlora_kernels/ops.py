"""Every operator once: its schema and its shape function. What each of them means is in `reference`; which code runs
it, in `backends`.

    nf4        quantize_4bit, fit_scales_4bit, encode_4bit, quantize_absmax: a weight to codes and scales
               dequantize_4bit, dequantize_4bit_into, dequantize_4bit_joined, gemv_4bit, matmul_4bit: a quantized weight
               dense, or in a product
    adapter    adapted_linear, adapted_linear_backward: a layer with LoRA or DoRA, whole
               row_norms_4bit, row_norms_4bit_all: DoRA's n;  prepare_lora_factors, columnwise_dot, matmul_tn,
               adapter_gradients: its parts;  adapted_operands, joined_gradients: those of layers of one input as one
               matmul_dense_into: a product of a frozen dense weight, the head
    step       cross_entropy_, rms_norm, swiglu, geglu, rotate and their gradients: what lies between the products of a
               layer
    attention  attention, attention_backward: causal, within the examples of a packed row
    optim      adamw_, total_norm, encode_blocks_into, decode_blocks_into

A quantized weight is two arguments everywhere: `weight` (its parts) and `layout` (its sizes), see
`weight.QuantizedWeight`. `torch.ops.qlora.NAME` runs the reference until a backend takes its place (`backends.use`),
and no caller changes. The alternative, a Python `if device` at each call site, would let the paths drift apart and
hides the operators from `torch.compile` and `opcheck`. Not `torch.library.custom_op`: its autograd wrapper costs
several times what this costs a call, and a step makes a thousand. None of the operators is differentiable; `qlora`
calls them inside its own autograd Functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from qlora_kernels import reference

LIBRARY = torch.library.Library("qlora", "FRAGMENT")
OPERATORS: list[str] = []  # every operator, in the order of this file
SHAPES: dict[str, Callable] = {}  # their shape functions, which allocate and compute nothing


def operator(mutates: tuple[str, ...] = ()) -> Callable[[Callable], torch._ops.OpOverload]:
    """Make a function the operator of its name, with the schema its type hints say, run by the reference on every
    device.
    """

    def define(function: Callable) -> torch._ops.OpOverload:
        name = function.__name__
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        LIBRARY.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"qlora::{name}", function, lib=LIBRARY)
        OPERATORS.append(name)
        SHAPES[name] = function
        return getattr(torch.ops.qlora, name).default

    return define


def _wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums: float32, or float64 where one of them is float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


# Each function below is the schema of an operator, by its hints, and its body the shape function: what `torch.compile`
# and meta tensors see. (Hints are `Optional`: the versions of torch that are supported do not all read `Tensor |
# None`.)

# ---------------------------------------------------------------- nf4


@operator()
def quantize_4bit(weight: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, 1, dtype=torch.uint8)
    return packed, weight.new_empty(-(-n // blocksize), dtype=torch.float32)


@operator()
def fit_scales_4bit(weight: Tensor, levels: Tensor, blocksize: int) -> Tensor:
    return weight.new_empty(-(-weight.numel() // blocksize), dtype=torch.float32)


@operator()
def encode_4bit(weight: Tensor, levels: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    return weight.new_empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)


@operator()
def quantize_absmax(absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    nested = absmax.new_empty(-(-absmax.numel() // nested_blocksize))
    return torch.empty_like(absmax, dtype=torch.uint8), nested, absmax.new_empty(())


@operator()
def dequantize_4bit(weight: list[Tensor], layout: list[int], row_scale: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    return weight[0].new_empty(layout[0], layout[1], dtype=dtype)


@operator(mutates=("out",))
def dequantize_4bit_into(out: Tensor, weight: list[Tensor], layout: list[int], row_scale: Optional[Tensor]) -> None:
    return None


@operator()
def dequantize_4bit_joined(
    weights: list[Tensor], layouts: list[int], row_scale: Optional[Tensor], dtype: torch.dtype
) -> Tensor:
    return weights[0].new_empty(sum(layouts[::4]), layouts[1], dtype=dtype)


@operator()
def gemv_4bit(x: Tensor, weight: list[Tensor], layout: list[int]) -> Tensor:
    return x.new_empty(layout[0], dtype=_wide(x))


@operator()
def matmul_4bit(
    x: Tensor, weight: list[Tensor], layout: list[int], row_scale: Optional[Tensor], transposed: bool
) -> Tensor:
    return x.new_empty(x.shape[0], layout[0] if transposed else layout[1])


# ---------------------------------------------------------------- adapter


@operator()
def row_norms_4bit(weight: list[Tensor], layout: list[int], A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return A.new_empty(layout[0])


@operator()
def row_norms_4bit_all(
    weights: list[Tensor], layouts: list[int], A: list[Tensor], B: list[Tensor], scaling: list[float]
) -> list[Tensor]:
    return [a.new_empty(rows) for a, rows in zip(A, layouts[::4], strict=True)]


@operator()
def adapted_linear(
    x: Tensor,
    x_adapter: Tensor,
    A: Tensor,
    B: Tensor,
    m: Optional[Tensor],
    n: Optional[Tensor],
    base_row_norms: Optional[Tensor],
    scaling: float,
    weight: list[Tensor],
    layout: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, rows = x.shape[0], layout[0]
    factors = B.new_empty(0 if m is None else 3, rows)
    return (
        x.new_empty(tokens, rows),
        x.new_empty(tokens, A.shape[0]),
        x.new_empty(A.shape),
        x.new_empty(B.shape),
        factors,
    )


@operator()
def adapted_linear_backward(
    dy: Tensor,
    saved: list[Tensor],
    y: Optional[Tensor],
    scaling: float,
    weight: list[Tensor],
    layout: list[int],
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A, B = saved[2:4]
    dx = dy.new_empty((dy.shape[0], layout[1]) if needs_x else 0)
    dA, dB = A.new_empty(A.shape, dtype=_wide(dy)), B.new_empty(B.shape, dtype=_wide(dy))
    return dx, dA, dB, B.new_empty(0 if y is None else layout[0], dtype=_wide(dy))


@operator()
def prepare_lora_factors(
    A: Tensor, B: Tensor, m: Optional[Tensor], n: Optional[Tensor], scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = 0 if m is None else B.shape[0]
    return torch.empty_like(A, dtype=dtype), torch.empty_like(B, dtype=dtype), B.new_empty(rows), B.new_empty(rows)


@operator()
def columnwise_dot(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], dtype=_wide(a, b))


@operator()
def matmul_tn(left: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(left.shape[1], x.shape[1], dtype=_wide(x))


@operator(mutates=("out",))
def matmul_dense_into(out: Tensor, x: Tensor, weight: Tensor, transposed: bool) -> None:
    return None


@operator()
def adapter_gradients(
    dy: Tensor,
    B_scaled: Tensor,
    xA: Tensor,
    y: Optional[Tensor],
    row_scale: Optional[Tensor],
    m_clamped: Optional[Tensor],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dB = B_scaled.new_empty(B_scaled.shape, dtype=_wide(dy))
    return torch.empty_like(xA), dB, dB.new_empty(0 if y is None else dB.shape[0])


@operator()
def adapted_operands(
    A: list[Tensor],
    B: list[Tensor],
    m: list[Tensor],
    n: list[Tensor],
    scaling: float,
    weights: list[Tensor],
    layouts: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rank, columns), rows = A[0].shape, sum(layouts[::4])
    dense = weights[0].new_empty(rows, columns, dtype=dtype)
    A_cast = A[0].new_empty(len(A) * rank, columns, dtype=dtype)
    B_scaled = B[0].new_empty(rows, len(B) * rank, dtype=dtype)
    return dense, A_cast, B_scaled, B[0].new_empty(2, rows if m else 0)


@operator()
def joined_gradients(
    dy: Tensor,
    B_scaled: Tensor,
    xA: Tensor,
    y: Optional[Tensor],
    dots: Optional[Tensor],
    factors: Tensor,
    outs: list[int],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, ranks = B_scaled.shape
    dB = B_scaled.new_empty(rows, ranks // len(outs), dtype=_wide(dy))
    return torch.empty_like(xA), dB, dB.new_empty(0 if y is None and dots is None else rows)


# ---------------------------------------------------------------- step


@operator(mutates=("logits",))
def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=_wide(logits))


@operator()
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=_wide(x))


@operator()
def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[0], dtype=_wide(x))


@operator()
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return torch.empty_like(x)


@operator()
def rms_norm_backward_add(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, onto: Tensor) -> Tensor:
    return torch.empty_like(x)


@operator()
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@operator()
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


@operator()
def swiglu_backward_dots(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up), gate.new_empty(2, gate.shape[1], dtype=_wide(gate))


@operator()
def swiglu_joined(y: Tensor) -> Tensor:
    return y.new_empty(y.shape[0], y.shape[1] // 2)


@operator()
def swiglu_joined_backward(dh: Tensor, y: Tensor, dots: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), y.new_empty(y.shape[1] if dots else 0, dtype=_wide(y))


@operator()
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@operator()
def geglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


@operator()
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operator()
def rotate_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return dq.new_empty(dq.shape), dk.new_empty(dk.shape)


# ---------------------------------------------------------------- attention


@operator()
def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=_wide(q))


@operator()
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# ---------------------------------------------------------------- optim


@operator(mutates=("p", "exp_avg", "exp_avg_sq", "work"))
def adamw_(
    p: list[Tensor],
    g: list[Tensor],
    at: list[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    work: Tensor,
    numbers: list[float],
) -> None:
    return None


@operator()
def total_norm(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(())


@operator(mutates=("codes", "absmax", "values", "work"))
def encode_blocks_into(
    codes: Tensor, absmax: Tensor, values: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    return None


@operator(mutates=("values", "work"))
def decode_blocks_into(
    values: Tensor, codes: Tensor, absmax: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    return None


# Last, since it reads the list above: whoever has the operators has what runs them. Without this line, a program that
# imports nothing but these would run the reference, slowly, and nothing would say so.
importlib.import_module("qlora_kernels.backends")

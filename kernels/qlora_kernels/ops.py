"""Every operator once: its schema, its shape function, and which code runs where.

    torch.ops.qlora.quantize_nf4    weight -> (packed, absmax)
    torch.ops.qlora.fit_scales_nf4  weight -> scales of least squared error, in place of absmax
    torch.ops.qlora.encode_nf4      weight, scales -> packed
    torch.ops.qlora.quantize_absmax absmax -> (codes, nested_absmax, offset)          double quantization
    torch.ops.qlora.dequantize_nf4  packed, constants [, row_gain] -> dense; dequantize_nf4_into writes into a given tensor
    torch.ops.qlora.row_norms_nf4   packed, constants, A, B, scaling -> norms of the rows of W + s B A     (DoRA's n)
    torch.ops.qlora.column_dots     a, b [tokens, out] -> sum_t a * b [out]                                (DoRA's dm)
    torch.ops.qlora.cross_entropy_  logits, targets -> losses; the logits become their own gradient
    torch.ops.qlora.rms_norm, swiglu and their _backward: what lies between the products of a layer

The default implementation of each is the function below, which is `reference.py`; a faster kernel for a device takes its place
with `use(operator, device, function)`, as at the end of this file, and no caller changes. The alternative, a Python `if device` at
each call site, would let the paths drift apart and hides the operators from `torch.compile` and `opcheck`. Not
`torch.library.custom_op`: its autograd wrapper costs 15 to 30 us a call where this costs 3, and a step makes a thousand calls.
None of the operators is differentiable; `qlora` calls them inside its own autograd Functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.cpu import native

_library = torch.library.Library("qlora", "FRAGMENT")


def operator(mutates: tuple[str, ...] = ()) -> Callable[[Callable], torch._ops.OpOverload]:
    """Make a function the operator of its name, with the schema its type hints say, on every device."""

    def define(function: Callable) -> torch._ops.OpOverload:
        name = function.__name__
        _library.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.qlora, name).default

    return define


def shape_of(name: str) -> Callable:
    """Register the shape function of an operator: what `torch.compile` and meta tensors see of it."""
    return torch.library.register_fake(f"qlora::{name}", lib=_library)


def use(name: str, device: str, function: Callable) -> None:
    """Run `function` for the operator on tensors of `device` ("CPU", "CUDA") instead of the reference."""
    _library.impl(name, function, device)


@operator()
def quantize_nf4(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_nf4(weight, blocksize)


@shape_of("quantize_nf4")
def _(weight, blocksize):
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, 1, dtype=torch.uint8)
    return packed, weight.new_empty(-(-n // blocksize), dtype=torch.float32)


@operator()
def fit_scales_nf4(weight: Tensor, blocksize: int) -> Tensor:
    return reference.fit_scales_nf4(weight, blocksize)


@shape_of("fit_scales_nf4")
def _(weight, blocksize):
    return weight.new_empty(-(-weight.numel() // blocksize), dtype=torch.float32)


@operator()
def encode_nf4(weight: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    return reference.encode_nf4(weight, scales, blocksize)


@shape_of("encode_nf4")
def _(weight, scales, blocksize):
    return weight.new_empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)


@operator()
def quantize_absmax(absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quantize_absmax(absmax, nested_blocksize)


@shape_of("quantize_absmax")
def _(absmax, nested_blocksize):
    nested = absmax.new_empty(-(-absmax.numel() // nested_blocksize))
    return torch.empty_like(absmax, dtype=torch.uint8), nested, absmax.new_empty(())


@operator()
def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],  # the schema is inferred from these hints, which cannot be `Tensor | None`
    nested_offset: Optional[Tensor],
    row_gain: Optional[Tensor],
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    return reference.dequantize_nf4(
        packed, absmax, nested_absmax, nested_offset, row_gain, rows, columns, blocksize, nested_blocksize, dtype
    )


@shape_of("dequantize_nf4")
def _(packed, absmax, nested_absmax, nested_offset, row_gain, rows, columns, blocksize, nested_blocksize, dtype):
    return packed.new_empty(rows, columns, dtype=dtype)


@operator(mutates=("out",))
def dequantize_nf4_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],
    nested_offset: Optional[Tensor],
    row_gain: Optional[Tensor],
    blocksize: int,
    nested_blocksize: int,
) -> None:
    """As `dequantize_nf4`, to `out` [rows, columns] in its dtype: fresh memory costs more than the decoding itself."""
    rows, columns = out.shape
    reference.count_write(out)
    out.copy_(
        reference.dequantize_nf4(
            packed, absmax, nested_absmax, nested_offset, row_gain, rows, columns, blocksize, nested_blocksize, out.dtype
        )
    )


@shape_of("dequantize_nf4_into")
def _(out, packed, absmax, nested_absmax, nested_offset, row_gain, blocksize, nested_blocksize):
    return None


@operator()
def row_norms_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],
    nested_offset: Optional[Tensor],
    A: Tensor,
    B: Tensor,
    scaling: float,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    return reference.row_norms_nf4(
        packed, absmax, nested_absmax, nested_offset, A, B, scaling, rows, columns, blocksize, nested_blocksize
    )


@shape_of("row_norms_nf4")
def _(packed, absmax, nested_absmax, nested_offset, A, B, scaling, rows, columns, blocksize, nested_blocksize):
    return A.new_empty(rows)


@operator()
def column_dots(a: Tensor, b: Tensor) -> Tensor:
    return reference.column_dots(a, b)


@shape_of("column_dots")
def _(a, b):
    return a.new_empty(a.shape[1], dtype=torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32))


@operator(mutates=("logits",))
def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    return reference.cross_entropy_(logits, targets)


@shape_of("cross_entropy_")
def _(logits, targets):
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


@operator()
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference.rms_norm(x, weight, eps)


@shape_of("rms_norm")
def _(x, weight, eps):
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@operator()
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return reference.rms_norm_backward(dy, x, weight, inverse)


@shape_of("rms_norm_backward")
def _(dy, x, weight, inverse):
    return torch.empty_like(x)


@operator()
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up)


@shape_of("swiglu")
def _(gate, up):
    return torch.empty_like(gate)


@operator()
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return reference.swiglu_backward(dy, gate, up)


@shape_of("swiglu_backward")
def _(dy, gate, up):
    return torch.empty_like(gate), torch.empty_like(up)


NATIVE, CPU_BACKEND = native.load()  # the library or None, and in words what the CPU runs

if NATIVE is not None:
    for _name in (
        "quantize_nf4", "fit_scales_nf4", "encode_nf4", "quantize_absmax", "dequantize_nf4", "dequantize_nf4_into", "row_norms_nf4", "column_dots",
        "cross_entropy_", "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward",
    ):  # fmt: skip
        use(_name, "CPU", getattr(NATIVE, _name))


def backends() -> dict[str, str]:
    """Which code runs the operators, by device type, in words (for `qlora doctor`)."""
    cpu = CPU_BACKEND if NATIVE is None else NATIVE.describe()
    return {"cpu": cpu, "cuda": "reference (plain PyTorch)"}

"""Every operator once: its schema, its shape function, and which code runs where.

    torch.ops.qlora.quantize_nf4    weight -> (packed, absmax)
    torch.ops.qlora.fit_scales_nf4  weight -> scales of least squared error, in place of absmax
    torch.ops.qlora.encode_nf4      weight, scales -> packed
    torch.ops.qlora.quantize_absmax absmax -> (codes, nested_absmax, offset)          double quantization
    torch.ops.qlora.adamw_          parameters, gradients and the flat moments of all: one step, in place; total_norm of many gradients
    torch.ops.qlora.encode_blocks_into, decode_blocks_into: 8-bit codes and block maxima of an optimizer's state
    torch.ops.qlora.dequantize_nf4  packed, constants [, row_gain] -> dense; dequantize_nf4_into writes into a given tensor
    torch.ops.qlora.nf4_gemv        x, packed, constants -> W x in float32                               (one token of generation)
    torch.ops.qlora.row_norms_nf4   packed, constants, A, B, scaling -> norms of the rows of W + s B A     (DoRA's n)
    torch.ops.qlora.row_norms_nf4_all the same of many layers at once
    torch.ops.qlora.nf4_product     x, packed, constants -> x Wt or x W
    torch.ops.qlora.adapted_product, adapted_product_backward: a whole adapted layer, x, A, B, m, packed, constants -> y, and dy -> dx, dA, dB, dm
    torch.ops.qlora.fold_factors    A, B, m, n -> A, s diag(m / n) B in the dtype of a product, m / n, and a safe m
    torch.ops.qlora.column_dots     a, b [tokens, out] -> sum_t a * b [out]                                (DoRA's dm)
    torch.ops.qlora.token_product   u [tokens, r], x [tokens, in] -> ut x in float32                       (dA)
    torch.ops.qlora.adapter_gradients  dy, u, y ... -> all that an adapter wants of dy: dy (s g B), dB and dm, in one pass over it
    torch.ops.qlora.cross_entropy_  logits, targets -> losses; the logits become their own gradient
    torch.ops.qlora.rms_norm, swiglu and their _backward: what lies between the products of a layer; swiglu_backward_dots: with column_dots
    torch.ops.qlora.rotate, rotate_backward: rotary embedding of queries and keys
    torch.ops.qlora.attention, attention_backward: causal, examples end to end

Where what runs: on a CPU the native library, on an NVIDIA card the Triton kernels, on any other accelerator
bitsandbytes' operators, and the reference for the rest. QLORA_BACKEND=native|triton|bitsandbytes|reference forces one;
it is an error where it cannot run.

The default implementation of each is the function below, which is `reference.py`; a faster kernel for a device takes
its place with `use(operator, device, function)`, as at the end of this file, and no caller changes. The alternative, a
Python `if device` at each call site, would let the paths drift apart and hides the operators from `torch.compile` and
`opcheck`. Not `torch.library.custom_op`: its autograd wrapper costs 15 to 30 us a call where this costs 3, and a step
makes a thousand calls. None of the operators is differentiable; `qlora` calls them inside its own autograd Functions.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

from qlora_kernels import BackendError, reference
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
    reference.dequantize_nf4_into(
        out, packed, absmax, nested_absmax, nested_offset, row_gain, blocksize, nested_blocksize
    )


@shape_of("dequantize_nf4_into")
def _(out, packed, absmax, nested_absmax, nested_offset, row_gain, blocksize, nested_blocksize):
    return None


@operator()
def nf4_gemv(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],
    nested_offset: Optional[Tensor],
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    return reference.nf4_gemv(
        x, packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize
    )


@shape_of("nf4_gemv")
def _(x, packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize):
    return x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))


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
def row_norms_nf4_all(
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor],
    nested_offset: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
    columns: Sequence[int],
    blocksizes: Sequence[int],
    nested_blocksize: int,
) -> list[Tensor]:
    """`row_norms_nf4` of many layers in one call: a layer alone is small, what it costs is half the way there."""
    return reference.row_norms_nf4_all(
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        A,
        B,
        scaling,
        rows,
        columns,
        blocksizes,
        nested_blocksize,
        row_norms_nf4,
    )


@shape_of("row_norms_nf4_all")
def _(packed, absmax, nested_absmax, nested_offset, A, B, scaling, rows, columns, blocksizes, nested_blocksize):
    return [a.new_empty(count) for a, count in zip(A, rows, strict=True)]


@operator()
def nf4_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],
    nested_offset: Optional[Tensor],
    row_gain: Optional[Tensor],
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    transposed: bool,
) -> Tensor:
    return reference.nf4_product(
        x,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        row_gain,
        rows,
        columns,
        blocksize,
        nested_blocksize,
        transposed,
    )


@shape_of("nf4_product")
def _(
    x, packed, absmax, nested_absmax, nested_offset, row_gain, rows, columns, blocksize, nested_blocksize, transposed
):
    return x.new_empty(x.shape[0], rows if transposed else columns)


@operator()
def adapted_product(
    x: Tensor,
    x_adapter: Tensor,
    A: Tensor,
    B: Tensor,
    m: Optional[Tensor],
    n: Optional[Tensor],
    base: Optional[Tensor],
    scaling: float,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],
    nested_offset: Optional[Tensor],
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight = (packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize)
    return reference.adapted_product(x, x_adapter, A, B, m, n, base, scaling, *weight)


@shape_of("adapted_product")
def _(
    x,
    x_adapter,
    A,
    B,
    m,
    n,
    base,
    scaling,
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    rows,
    columns,
    blocksize,
    nested_blocksize,
):
    u = x.new_empty(x.shape[0], A.shape[0])
    return (
        x.new_empty(x.shape[0], rows),
        u,
        x.new_empty(A.shape),
        x.new_empty(B.shape),
        B.new_empty(0 if m is None else 3, rows),
    )


@operator()
def adapted_product_backward(
    dy: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    u: Tensor,
    y: Optional[Tensor],
    factors: Tensor,
    scaling: float,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],
    nested_offset: Optional[Tensor],
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = (packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize)
    return reference.adapted_product_backward(dy, x, down, up, u, y, factors, scaling, *weight, needs_x)


@shape_of("adapted_product_backward")
def _(
    dy,
    x,
    down,
    up,
    u,
    y,
    factors,
    scaling,
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    rows,
    columns,
    blocksize,
    nested_blocksize,
    needs_x,
):
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx = dy.new_empty((dy.shape[0], columns) if needs_x else 0)
    return (
        dx,
        down.new_empty(down.shape, dtype=wide),
        up.new_empty(up.shape, dtype=wide),
        up.new_empty(0 if y is None else rows, dtype=wide),
    )


@operator()
def column_dots(a: Tensor, b: Tensor) -> Tensor:
    return reference.column_dots(a, b)


@shape_of("column_dots")
def _(a, b):
    return a.new_empty(a.shape[1], dtype=torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32))


@operator()
def fold_factors(
    A: Tensor, B: Tensor, m: Optional[Tensor], n: Optional[Tensor], scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.fold_factors(A, B, m, n, scaling, dtype)


@shape_of("fold_factors")
def _(A, B, m, n, scaling, dtype):
    rows = 0 if m is None else B.shape[0]
    return torch.empty_like(A, dtype=dtype), torch.empty_like(B, dtype=dtype), B.new_empty(rows), B.new_empty(rows)


@operator()
def token_product(left: Tensor, x: Tensor) -> Tensor:
    return reference.token_product(left, x)


@shape_of("token_product")
def _(left, x):
    return x.new_empty(left.shape[1], x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


@operator()
def adapter_gradients(
    dy: Tensor,
    up: Tensor,
    u: Tensor,
    y: Optional[Tensor],
    gain: Optional[Tensor],
    safe: Optional[Tensor],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.adapter_gradients(dy, up, u, y, gain, safe, scaling)


@shape_of("adapter_gradients")
def _(dy, up, u, y, gain, safe, scaling):
    wide = torch.promote_types(dy.dtype, torch.float32)
    return (
        torch.empty_like(u),
        up.new_empty(up.shape, dtype=wide),
        up.new_empty(0 if y is None else up.shape[0], dtype=wide),
    )


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


@operator()
def swiglu_backward_dots(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.swiglu_backward_dots(dy, gate, up)


@shape_of("swiglu_backward_dots")
def _(dy, gate, up):
    dots = gate.new_empty(2, gate.shape[1], dtype=torch.promote_types(gate.dtype, torch.float32))
    return torch.empty_like(gate), torch.empty_like(up), dots


@operator()
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rotate(q, k, cos, sin)


@shape_of("rotate")
def _(q, k, cos, sin):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operator()
def rotate_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rotate_backward(dq, dk, cos, sin)


@shape_of("rotate_backward")
def _(dq, dk, cos, sin):
    return dq.new_empty(dq.shape), dk.new_empty(dk.shape)


@operator()
def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    return reference.attention(q, k, v, bounds, scale)


@shape_of("attention")
def _(q, k, v, bounds, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))


@operator()
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.attention_backward(dout, q, k, v, out, lse, bounds, scale)


@shape_of("attention_backward")
def _(dout, q, k, v, out, lse, bounds, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@operator(mutates=("p", "exp_avg", "exp_avg_sq", "work"))
def adamw_(
    p: Sequence[Tensor],
    g: Sequence[Tensor],
    at: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    work: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step_size: float,
    correction: float,
    scale: float,
) -> None:
    reference.adamw_(p, g, at, exp_avg, exp_avg_sq, work, beta1, beta2, eps, decay, step_size, correction, scale)


@shape_of("adamw_")
def _(p, g, at, exp_avg, exp_avg_sq, work, beta1, beta2, eps, decay, step_size, correction, scale):
    return None


@operator()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    return reference.total_norm(tensors)


@shape_of("total_norm")
def _(tensors):
    return tensors[0].new_empty(())


@operator(mutates=("codes", "absmax", "values", "work"))
def encode_blocks_into(
    codes: Tensor, absmax: Tensor, values: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    reference.encode_blocks_into(codes, absmax, values, work, blocksize, signed)


@shape_of("encode_blocks_into")
def _(codes, absmax, values, work, blocksize, signed):
    return None


@operator(mutates=("values", "work"))
def decode_blocks_into(
    values: Tensor, codes: Tensor, absmax: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    reference.decode_blocks_into(values, codes, absmax, work, blocksize, signed)


@shape_of("decode_blocks_into")
def _(values, codes, absmax, work, blocksize, signed):
    return None


# ---------------------------------------------------------------- which code runs where

BACKENDS = ("native", "triton", "bitsandbytes", "reference")  # what QLORA_BACKEND may name
OPERATORS = (
    "quantize_nf4",
    "fit_scales_nf4",
    "encode_nf4",
    "quantize_absmax",
    "dequantize_nf4",
    "dequantize_nf4_into",
    "nf4_gemv",
    "row_norms_nf4",
    "row_norms_nf4_all",
    "nf4_product",
    "adapted_product",
    "adapted_product_backward",
    "fold_factors",
    "column_dots",
    "token_product",
    "adapter_gradients",
    "cross_entropy_",
    "rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
    "swiglu_backward_dots",
    "adamw_",
    "total_norm",
    "encode_blocks_into",
    "decode_blocks_into",
    "rotate",
    "rotate_backward",
    "attention",
    "attention_backward",
)
ACCELERATORS = ("CUDA", "XPU", "HPU", "MPS", "PrivateUse1")  # torch's dispatch keys


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _cuda() -> tuple[str, str]:
    """(backend, why) on CUDA devices: our Triton kernels where they run. Found out at the first use, which may start
    the driver.
    """
    forced = os.environ.get("QLORA_BACKEND", "")
    if forced in ("reference", "bitsandbytes"):
        return _other()
    if torch.version.hip is not None:
        missing = "they are made for NVIDIA cards"
    elif not _installed("triton"):
        missing = "triton is not installed"
    elif not torch.cuda.is_available():
        missing = "torch sees no CUDA device"
    elif torch.cuda.get_device_capability() < (8, 0):
        missing = "they need compute capability 8.0"
    else:
        return "triton", ""
    if forced == "triton":
        raise BackendError(
            f"QLORA_BACKEND=triton: the Triton kernels cannot run, {missing}. Unset it for the fastest there is"
        )
    backend, why = _other()
    return backend, f"the Triton kernels cannot run, {missing}" + (f"; {why}" if why else "")


@functools.cache
def _other() -> tuple[str, str]:
    """(backend, why) where we have no kernels of our own."""
    forced = os.environ.get("QLORA_BACKEND", "")
    if forced == "reference":
        return "reference", "QLORA_BACKEND=reference"
    if _installed("bitsandbytes"):
        return "bitsandbytes", "QLORA_BACKEND=bitsandbytes" if forced == "bitsandbytes" else ""
    if forced == "bitsandbytes":
        raise BackendError(
            "QLORA_BACKEND=bitsandbytes: bitsandbytes is not installed. Install it, or unset QLORA_BACKEND"
        )
    return "reference", "bitsandbytes is not installed"


@functools.cache
def _kernels(backend: str) -> dict[str, Callable]:
    """The operators that a backend has; imported here, because importing Triton or bitsandbytes is slow and may fail."""
    if backend == "triton":
        from qlora_kernels import triton_nf4, triton_optim, triton_step

        modules = (triton_nf4, triton_step, triton_optim)
    elif backend == "bitsandbytes":
        from qlora_kernels import bitsandbytes_nf4

        modules = (bitsandbytes_nf4,)
    else:
        modules = ()
    return {name: getattr(module, name) for module in modules for name in OPERATORS if hasattr(module, name)}


def _late(name: str, choose: Callable[[], tuple[str, str]]) -> Callable:
    """The operator `name` by the backend that `choose` finds at the first call; what that lacks is the reference's."""
    found: list[Callable] = []

    def call(*arguments):
        if not found:
            found.append(_kernels(choose()[0]).get(name) or getattr(reference, name))
        return found[0](*arguments)

    return call


def _choose_cpu() -> tuple[native.Native | None, str]:
    forced = os.environ.get("QLORA_BACKEND", "")
    if forced not in ("", *BACKENDS):
        raise BackendError(
            f"QLORA_BACKEND={forced}: must be one of {', '.join(BACKENDS)}, or unset for the fastest there is"
        )
    if forced in ("reference", "bitsandbytes"):
        return None, _words(*_other())
    library, words = native.load()
    if forced == "native" and library is None:
        raise BackendError(
            f"QLORA_BACKEND=native: the native CPU kernels are not built. Run {native.build.COMMAND}, or unset QLORA_BACKEND"
        )
    if forced == "triton":
        _cuda()
    return library, words


def _words(backend: str, why: str) -> str:
    name = {
        "reference": "reference (plain PyTorch)",
        "triton": "Triton kernels",
        "bitsandbytes": "bitsandbytes' kernels",
    }[backend]
    return f"{name}, because {why}" if why else name


NATIVE, CPU_BACKEND = _choose_cpu()  # the library or None, and in words what the CPU runs

for _name in OPERATORS:
    if NATIVE is not None and hasattr(NATIVE, _name):
        use(_name, "CPU", getattr(NATIVE, _name))
    elif os.environ.get("QLORA_BACKEND") == "bitsandbytes":
        use(_name, "CPU", _late(_name, _other))
    for _device in ACCELERATORS:
        use(_name, _device, _late(_name, _cuda if _device == "CUDA" else _other))


def multiplies_a_vector(device: torch.device) -> bool:
    """Whether `nf4_gemv` has a kernel there; elsewhere decoding to a reused buffer and the usual product are faster."""
    return device.type == "cuda" and _cuda()[0] == "triton"


def fuses(device: torch.device) -> bool:
    """Whether the operators between the products (RMSNorm, SwiGLU) have kernels there, so that they beat PyTorch's
    chains.
    """
    return NATIVE is not None if device.type == "cpu" else device.type == "cuda" and _cuda()[0] == "triton"


def multiplies(x: Tensor, *weight: Tensor | int | None) -> bool:
    """Whether `nf4_product` and `adapted_product` of a weight [packed ... nested_blocksize] are one kernel; elsewhere a
    dense weight for the usual product is faster. Tensors without a device count as the CPU's, for `plan`.
    """
    return x.device.type in ("cpu", "meta") and NATIVE is not None and NATIVE.multiplies(x, *weight)


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` has a kernel for them on their device. Tensors without a device count as the CPU's, for
    `plan`.
    """
    return q.device.type in ("cpu", "meta") and NATIVE is not None and NATIVE.attends(q, k, v)


def backends() -> dict[str, str]:
    """Which code runs the operators, by device type, in words (for `qlora doctor`)."""
    cpu = CPU_BACKEND if NATIVE is None else NATIVE.describe()
    return {"cpu": cpu, "cuda": _words(*_cuda())}

"""What lies between a layer's products, in Triton: the loss, RMSNorm, SwiGLU and their gradients.

    cross_entropy_         a row of logits is read once for its sum and once to become its gradient
    rms_norm, swiglu       one pass each, where PyTorch's chains write three to five tensors
    swiglu_backward_dots   with the sums of DoRA's gradients for gate and up, which are at hand in that pass

The alternative, liger-kernel, is not used: the gradient of its SwiGLU overwrites the gate's and the up projection's
outputs, behind autograd's back. DoRA has saved those for the gradient of its magnitudes, which would silently be wrong.
What it would add is the rotary embedding in one launch, which stays PyTorch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.triton.common import DTYPES, FUSED, cdiv, counters, last_of, on, power_of_2, sum_of_shares

SHARE = 64  # tokens that a program of `swiglu_backward_dots` sums
WIDEST = 1 << 15  # of a row that one program holds


def _alike(*parts: Tensor) -> bool:
    return all(part.dtype == parts[0].dtype and part.dtype in DTYPES and part.is_contiguous() for part in parts)


# ---------------------------------------------------------------- loss


@triton.jit
def cross_entropy_kernel(losses, logits, targets, n, BLOCK: tl.constexpr):
    """One row of n logits. The target's gradient p - 1 is minus the share of all others, which keeps its digits near p
    = 1.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    most = float("-inf")
    others = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * n + at, mask=at < n, other=float("-inf")).to(tl.float32)
        now = tl.maximum(most, tl.max(value, axis=0))
        others = others * tl.exp(most - now) + tl.sum(tl.where(at == target, 0.0, tl.exp(value - now)), axis=0)
        most = now
    wanted = tl.load(logits + row * n + target).to(tl.float32)
    total = others + tl.exp(wanted - most)
    tl.debug_barrier()  # the whole row has been read, by every thread, before it is overwritten
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * n + at, mask=at < n, other=0.0).to(tl.float32)
        share = tl.where(at == target, -others, tl.exp(value - most)) / total
        tl.store(logits + row * n + at, share.to(logits.dtype.element_ty), mask=at < n)
    tl.store(losses + row, tl.log(total) + (most - wanted))


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    if (
        not _alike(logits)
        or logits.dim() != 2
        or targets.dtype != torch.int64
        or not targets.is_contiguous()
        or logits.numel() == 0
    ):
        return NotImplemented
    rows, n = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    reference.mark_mutated(logits)
    with on(logits):
        cross_entropy_kernel[(rows,)](losses, logits, targets, n, BLOCK=4096, num_warps=8, **FUSED)
    return losses


# ---------------------------------------------------------------- RMSNorm


@triton.jit
def rms_norm_kernel(y, inverse, x, weight, eps, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * n + at, mask=at < n, other=0.0).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, axis=0) / n + tl.cast(eps, tl.float32)))
    normal = (value * scale).to(y.dtype.element_ty)  # rounded before the weight, as transformers does
    tl.store(y + row * n + at, tl.load(weight + at, mask=at < n, other=0.0) * normal, mask=at < n)
    tl.store(inverse + row, scale)


@triton.jit
def rms_norm_backward_kernel(dx, dy, x, weight, inverse, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    gradient = tl.load(dy + row * n + at, mask=at < n, other=0.0) * tl.load(weight + at, mask=at < n, other=0.0)
    gradient = gradient.to(tl.float32)
    scale = tl.load(inverse + row)
    normal = tl.load(x + row * n + at, mask=at < n, other=0.0).to(tl.float32) * scale
    value = (gradient - normal * (tl.sum(gradient * normal, axis=0) / n)) * scale
    tl.store(dx + row * n + at, value.to(dx.dtype.element_ty), mask=at < n)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _alike(x, weight) or x.dim() != 2 or x.shape[1] > WIDEST or x.numel() == 0:
        return NotImplemented
    (rows, n), block = x.shape, power_of_2(x.shape[1])
    y, inverse = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    with on(x):
        rms_norm_kernel[(rows,)](y, inverse, x, weight, eps, n, BLOCK=block, num_warps=_warps(block), **FUSED)
    return y, inverse


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    dy = dy.contiguous()
    if not _alike(dy, x, weight) or x.dim() != 2 or x.shape[1] > WIDEST or x.numel() == 0:
        return NotImplemented
    (rows, n), block = x.shape, power_of_2(x.shape[1])
    dx = torch.empty_like(x)
    with on(x):
        rms_norm_backward_kernel[(rows,)](dx, dy, x, weight, inverse, n, BLOCK=block, num_warps=_warps(block), **FUSED)
    return dx


# ---------------------------------------------------------------- SwiGLU


@triton.jit
def swiglu_kernel(y, gate, up, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(y.dtype.element_ty)
    tl.store(y + at, silu * tl.load(up + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def _gated_gradients(dy, gate, up):
    """(d gate, d up) in the dtype of dy."""
    g = gate.to(tl.float32)
    s = tl.sigmoid(g)
    through = (dy * up).to(tl.float32)
    return (through * s * (1 + g * (1 - s))).to(dy.dtype), dy * (g * s).to(dy.dtype)


@triton.jit
def swiglu_backward_kernel(dgate, dup, dy, gate, up, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g, u = tl.load(gate + at, mask=inside, other=0.0), tl.load(up + at, mask=inside, other=0.0)
    dg, du = _gated_gradients(tl.load(dy + at, mask=inside, other=0.0), g, u)
    tl.store(dgate + at, dg, mask=inside)
    tl.store(dup + at, du, mask=inside)


@triton.jit
def swiglu_backward_dots_kernel(
    gradients, reduced, dy, gate, up, tokens, columns, SHARE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The same, and dots [2, columns]: the sums of d gate * gate and d up * up; sums [2, shares, columns]: over SHARE
    tokens.
    """
    dgate, dup = gradients
    dots, sums, arrived = reduced
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.program_id(1)
    first, second = tl.zeros([TOKENS, COLUMNS], tl.float32), tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, SHARE, TOKENS):
        token = (share * SHARE + start + tl.arange(0, TOKENS)).to(tl.int64)
        at = token[:, None] * columns + column[None, :]
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        g, u = tl.load(gate + at, mask=inside, other=0.0), tl.load(up + at, mask=inside, other=0.0)
        dg, du = _gated_gradients(tl.load(dy + at, mask=inside, other=0.0), g, u)
        tl.store(dgate + at, dg, mask=inside)
        tl.store(dup + at, du, mask=inside)
        first += dg.to(tl.float32) * g.to(tl.float32)
        second += du.to(tl.float32) * u.to(tl.float32)
    shares = tl.num_programs(1)
    others = sums + shares.to(tl.int64) * columns
    place = share.to(tl.int64) * columns + column
    inside = column < columns
    tl.store(sums + place, tl.sum(first, axis=0), mask=inside)
    tl.store(others + place, tl.sum(second, axis=0), mask=inside)
    if last_of(arrived + tl.program_id(0), shares):
        tl.store(dots + column, sum_of_shares(sums, column, shares, columns, COLUMNS), mask=inside)
        tl.store(dots + columns + column, sum_of_shares(others, column, shares, columns, COLUMNS), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if not _alike(gate, up) or gate.shape != up.shape or gate.numel() == 0:
        return NotImplemented
    y, n = torch.empty_like(gate), gate.numel()
    with on(gate):
        swiglu_kernel[(cdiv(n, 1024),)](y, gate, up, n, BLOCK=1024, **FUSED)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()
    if not _alike(dy, gate, up) or gate.shape != up.shape or gate.numel() == 0:
        return NotImplemented
    dgate, dup, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    with on(gate):
        swiglu_backward_kernel[(cdiv(n, 1024),)](dgate, dup, dy, gate, up, n, BLOCK=1024, **FUSED)
    return dgate, dup


def swiglu_backward_dots(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy = dy.contiguous()
    if not _alike(dy, gate, up) or gate.shape != up.shape or gate.dim() != 2 or gate.numel() == 0:
        return NotImplemented
    tokens, columns = gate.shape
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    groups, shares = cdiv(columns, 128), cdiv(tokens, SHARE)
    sums = torch.empty(2, shares, columns, dtype=torch.float32, device=gate.device)
    dots = torch.empty(2, columns, dtype=torch.float32, device=gate.device)
    with on(gate):
        swiglu_backward_dots_kernel[(groups, shares)](
            (dgate, dup),
            (dots, sums, counters(gate.device, groups)),
            dy,
            gate,
            up,
            tokens,
            columns,
            SHARE=SHARE,
            TOKENS=8,
            COLUMNS=128,
            **FUSED,
        )
    return dgate, dup, dots

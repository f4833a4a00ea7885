"""What lies between a layer's products, in Triton: the loss, RMSNorm, SwiGLU, the rotation and their gradients.

    cross_entropy_         a row of logits is read once for its sum and once to become its gradient
    rms_norm, swiglu       one pass each, where PyTorch's chains write three to five tensors
    swiglu_backward_dots   with the sums of DoRA's gradients for gate and up, which are at hand in that pass
    rotate                 q and k in one launch and one pass, read with whatever strides they have, rounded once

The alternative, liger-kernel, is not used: the gradient of its SwiGLU overwrites the gate's and the up projection's
outputs, behind autograd's back. DoRA has saved those for the gradient of its magnitudes, which would silently be wrong.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.triton.common import DTYPES, EXACT, FUSED, cdiv, counters, last_of, on, power_of_2, sum_of_shares

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


# A row of gate, up and their gradients begins `stride` after the one before: they may be the halves of one matrix. The
# product and its gradient lie without gaps.


@triton.jit
def swiglu_kernel(y, gate, up, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < columns, row * stride + column
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(y.dtype.element_ty)
    tl.store(y + row * columns + column, silu * tl.load(up + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def _gated_gradients(dy, gate, up):
    """(d gate, d up) in the dtype of dy."""
    g = gate.to(tl.float32)
    s = tl.sigmoid(g)
    through = (dy * up).to(tl.float32)
    return (through * s * (1 + g * (1 - s))).to(dy.dtype), dy * (g * s).to(dy.dtype)


@triton.jit
def swiglu_backward_kernel(dgate, dup, dy, gate, up, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < columns, row * stride + column
    g, u = tl.load(gate + at, mask=inside, other=0.0), tl.load(up + at, mask=inside, other=0.0)
    dg, du = _gated_gradients(tl.load(dy + row * columns + column, mask=inside, other=0.0), g, u)
    tl.store(dgate + at, dg, mask=inside)
    tl.store(dup + at, du, mask=inside)


@triton.jit
def swiglu_backward_dots_kernel(
    gradients,
    reduced,
    dy,
    values,
    tokens,
    columns,
    stride,
    SHARE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same, and dots [2, columns]: the sums of d gate * gate and d up * up; sums [2, shares, columns]: over SHARE
    tokens.
    """
    dgate, dup = gradients
    gate, up = values
    dots, sums, arrived = reduced
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.program_id(1)
    first, second = tl.zeros([TOKENS, COLUMNS], tl.float32), tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, SHARE, TOKENS):
        token = (share * SHARE + start + tl.arange(0, TOKENS)).to(tl.int64)
        at = token[:, None] * stride + column[None, :]
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        g, u = tl.load(gate + at, mask=inside, other=0.0), tl.load(up + at, mask=inside, other=0.0)
        from_dy = dy + token[:, None] * columns + column[None, :]
        dg, du = _gated_gradients(tl.load(from_dy, mask=inside, other=0.0), g, u)
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
    y = torch.empty_like(gate)
    _swiglu(y, gate, up, gate.shape[-1])
    return y


def swiglu_joined(y: Tensor) -> Tensor:
    if not _alike(y) or y.dim() != 2 or y.shape[1] % 2 or y.numel() == 0:
        return NotImplemented
    h = y.new_empty(y.shape[0], y.shape[1] // 2)
    gate, up = y.chunk(2, dim=1)
    _swiglu(h, gate, up, y.shape[1])
    return h


def _swiglu(y: Tensor, gate: Tensor, up: Tensor, stride: int) -> None:
    columns = y.shape[-1]
    with on(y):
        swiglu_kernel[(y.numel() // columns, cdiv(columns, 1024))](y, gate, up, columns, stride, BLOCK=1024, **FUSED)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()
    if not _alike(dy, gate, up) or gate.shape != up.shape or gate.numel() == 0:
        return NotImplemented
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _swiglu_backward((dgate, dup), dy, (gate, up), gate.shape[-1], dots=None)
    return dgate, dup


def swiglu_backward_dots(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy = dy.contiguous()
    if not _alike(dy, gate, up) or gate.shape != up.shape or gate.dim() != 2 or gate.numel() == 0:
        return NotImplemented
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    dots = torch.empty(2, gate.shape[1], dtype=torch.float32, device=gate.device)
    _swiglu_backward((dgate, dup), dy, (gate, up), gate.shape[1], dots)
    return dgate, dup, dots


def swiglu_joined_backward(dh: Tensor, y: Tensor, dots: bool) -> tuple[Tensor, Tensor]:
    dh = dh.contiguous()
    if not _alike(dh, y) or y.dim() != 2 or y.shape != (dh.shape[0], 2 * dh.shape[1]) or y.numel() == 0:
        return NotImplemented
    dy, sums = torch.empty_like(y), torch.empty(y.shape[1] if dots else 0, dtype=torch.float32, device=y.device)
    _swiglu_backward(dy.chunk(2, dim=1), dh, y.chunk(2, dim=1), y.shape[1], sums if dots else None)
    return dy, sums


def _swiglu_backward(
    into: tuple[Tensor, ...], dy: Tensor, values: tuple[Tensor, ...], stride: int, dots: Tensor | None
) -> None:
    """Into the gradients of gate and up, and into `dots` [2, columns] or [2 columns] where it is given."""
    columns = dy.shape[-1]
    tokens = dy.numel() // columns
    if dots is None:
        with on(dy):
            swiglu_backward_kernel[(tokens, cdiv(columns, 1024))](
                *into, dy, *values, columns, stride, BLOCK=1024, **FUSED
            )
        return
    groups, shares = cdiv(columns, 128), cdiv(tokens, SHARE)
    sums = torch.empty(2, shares, columns, dtype=torch.float32, device=dy.device)
    with on(dy):
        swiglu_backward_dots_kernel[(groups, shares)](
            into,
            (dots, sums, counters(dy.device, groups)),
            dy,
            values,
            tokens,
            columns,
            stride,
            SHARE=SHARE,
            TOKENS=8,
            COLUMNS=128,
            **FUSED,
        )


# ---------------------------------------------------------------- rotation


@triton.jit
def rotate_kernel(into, x, angles, sizes, strides, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """A token's heads of q, then of k, HEADS at a time; `x` and `into` are q and k, the results without gaps.

    (x1, x2) becomes (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), BACK (x1 cos1 + x2 sin2, x2 cos2 - x1 sin1).
    """
    q_heads, k_heads, half, positions = sizes
    token, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_q = tl.cdiv(q_heads, HEADS)
    column = tl.arange(0, HALF)
    angle = (token % positions) * (2 * half) + column
    cos1, cos2, sin1, sin2 = _halves_of(angles, angle, column, half)
    if program < of_q:
        head = program * HEADS + tl.arange(0, HEADS)
        inside = (head < q_heads)[:, None] & (column < half)[None, :]
        at = token * strides[0] + head[:, None] * strides[1] + column[None, :]
        to = (token * q_heads + head[:, None]) * (2 * half) + column[None, :]
        _rotate_heads(into[0] + to, x[0] + at, half, inside, cos1, cos2, sin1, sin2, BACK)
    else:
        head = (program - of_q) * HEADS + tl.arange(0, HEADS)
        inside = (head < k_heads)[:, None] & (column < half)[None, :]
        at = token * strides[2] + head[:, None] * strides[3] + column[None, :]
        to = (token * k_heads + head[:, None]) * (2 * half) + column[None, :]
        _rotate_heads(into[1] + to, x[1] + at, half, inside, cos1, cos2, sin1, sin2, BACK)


@triton.jit
def _halves_of(angles, at, column, half):
    """cos and sin of the first and of the second half of a head, float32 [1, HALF]."""
    cos, sin = angles
    inside = column < half
    cos1 = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos + half + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin + half + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    return cos1, cos2, sin1, sin2


@triton.jit
def _rotate_heads(into, x, half, inside, cos1, cos2, sin1, sin2, BACK: tl.constexpr):
    x1 = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    tl.store(into, y1.to(into.dtype.element_ty), mask=inside)
    tl.store(into + half, y2.to(into.dtype.element_ty), mask=inside)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(q, k, cos, sin, back=False)


def rotate_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(dq, dk, cos, sin, back=True)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    takes = (
        q.dim() == k.dim() == 3
        and all(t.dtype == q.dtype and t.dtype in DTYPES and t.stride(-1) == 1 for t in (q, k, cos, sin))
        and q.shape[::2] == k.shape[::2]
        and q.shape[2] % 2 == 0
        and cos.shape == sin.shape == (cos.shape[0], q.shape[2])
        and cos.is_contiguous()
        and sin.is_contiguous()
        and q.numel() > 0
        and k.numel() > 0
        and q.shape[0] % cos.shape[0] == 0
    )
    if not takes:
        return NotImplemented
    tokens, heads, width = q.shape
    half = width // 2
    block = max(1, 1024 // power_of_2(half))  # heads, of which a thread holds 8 pairs
    into = q.new_empty(q.shape), k.new_empty(k.shape)
    with on(q):
        rotate_kernel[(tokens, cdiv(heads, block) + cdiv(k.shape[1], block))](
            into,
            (q, k),
            (cos, sin),
            (heads, k.shape[1], half, cos.shape[0]),
            (q.stride(0), q.stride(1), k.stride(0), k.stride(1)),
            BACK=back,
            HEADS=block,
            HALF=power_of_2(half),
            **EXACT,
        )
    return into

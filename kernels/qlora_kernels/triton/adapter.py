"""LoRA and DoRA in Triton: the factors of a layer and the gradients of its adapter. (Row norms: `adapter_norms`.)

    prepare_lora_factors   all that a layer's product needs of A, B, m and n in one launch: a small step is bound by
                           its launches
    columnwise_dot         sum_t a[t, j] * b[t, j] in float32, in two stages, so that narrow matrices fill a card: a
                           program sums a tile of columns over its share of the tokens, and the last of a tile's adds
                           the shares up, always in the same order, so that every run gives the same bits

The products of A and B with dense matrices are cuBLAS's. The alternative to two stages, atomic additions, would give
other bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.reference.common import widened_product
from qlora_kernels.triton.adapter_norms import row_norms_4bit, row_norms_4bit_all
from qlora_kernels.triton.common import DTYPES, EXACT, FUSED, cdiv, counters, last_of, on, power_of_2, sum_of_shares

__all__ = [
    "adapter_gradients",
    "columnwise_dot",
    "prepare_lora_factors",
    "row_norms_4bit",
    "row_norms_4bit_all",
]  # the operators of this subject

SHARE = 64  # tokens that a program of `columnwise_dot` sums


# ---------------------------------------------------------------- factors


@triton.jit
def prepare_lora_factors_kernel(
    into, factors, scaling, count, rows, rank, DORA: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr
):
    """The first programs convert A, flat, the others BLOCK // RANK rows of B each. NaN stays NaN: a comparison with it
    is false.
    """
    A_cast, B_scaled, row_scale, m_clamped = into
    A, B, m, n = factors
    program = tl.program_id(0)
    pieces = tl.cdiv(count, BLOCK)
    if program < pieces:
        at = program * BLOCK + tl.arange(0, BLOCK)
        element = tl.load(A + at, mask=at < count, other=0.0)
        tl.store(A_cast + at, element.to(A_cast.dtype.element_ty), mask=at < count)
    else:
        row = (program - pieces) * (BLOCK // RANK) + tl.arange(0, BLOCK // RANK)
        k = tl.arange(0, RANK)
        inside = (row < rows)[:, None] & (k < rank)[None, :]
        value = tl.load(B + row[:, None] * rank + k[None, :], mask=inside, other=0.0) * tl.cast(scaling, tl.float32)
        if DORA:
            norm = tl.load(n + row, mask=row < rows, other=1.0)
            norm = tl.where(norm < 1e-12, 1e-12, norm)
            magnitude = tl.load(m + row, mask=row < rows, other=1.0)
            size = tl.abs(magnitude)
            size = tl.where(size < 1e-6 * norm, 1e-6 * norm, size)
            size = tl.where(magnitude.to(tl.int32, bitcast=True) < 0, -size, size)
            factor = tl.div_rn(size, norm)
            tl.store(m_clamped + row, size, mask=row < rows)
            tl.store(row_scale + row, factor, mask=row < rows)
            value = value * factor[:, None]
        tl.store(B_scaled + row[:, None] * rank + k[None, :], value.to(B_scaled.dtype.element_ty), mask=inside)


def prepare_lora_factors(
    A: Tensor, B: Tensor, m: Tensor | None, n: Tensor | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, rank = B.shape
    m_and_n = (m, n) if m is not None and n is not None else ()
    if (
        dtype not in DTYPES
        or rank > 1024
        or not A.numel()
        or not B.numel()
        or not all(t.dtype == torch.float32 and t.is_contiguous() for t in (A, B, *m_and_n))
    ):
        return NotImplemented
    if m is not None and n is not None and not m.numel() == n.numel() == rows:
        raise ValueError(f"{m.numel()} magnitudes and {n.numel()} norms for {rows} rows")
    A_cast, B_scaled = torch.empty_like(A, dtype=dtype), torch.empty_like(B, dtype=dtype)
    row_scale, m_clamped = (B.new_empty(rows if m_and_n else 0) for _ in range(2))
    width = max(16, power_of_2(rank))
    with on(A):
        prepare_lora_factors_kernel[(cdiv(A.numel(), 2048) + cdiv(rows, 2048 // width),)](
            (A_cast, B_scaled, row_scale, m_clamped),
            (A, B, *(m_and_n or (B, B))),
            scaling,
            A.numel(),
            rows,
            rank,
            DORA=bool(m_and_n),
            BLOCK=2048,
            RANK=width,
            **EXACT,
        )
    return A_cast, B_scaled, row_scale, m_clamped


# ---------------------------------------------------------------- gradients


@triton.jit
def columnwise_dot_kernel(
    into, values, finish, sizes, SHARE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, FINISH: tl.constexpr
):
    """out [columns]; sums [share, columns]: the sum over SHARE tokens, TOKENS at a time; `values` are a and b. FINISH:
    out is divided by m_clamped, and on the way dB [columns, rank] = scaling row_scale raw.
    """
    out, sums, arrived = into
    a, b = values
    tokens, columns, a_stride, b_stride, rank = sizes
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.program_id(1)
    if FINISH:
        if share == 0:
            _, row_scale, raw, dB, scaling = finish
            factor = tl.cast(scaling, tl.float32) * tl.load(row_scale + column, mask=column < columns, other=0.0)
            for start in range(0, rank, 16):
                k = start + tl.arange(0, 16)
                inside = (column < columns)[:, None] & (k < rank)[None, :]
                at = column[:, None] * rank + k[None, :]
                into_dB = dB + at  # before the load: the other way round takes more registers
                value = tl.load(raw + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(into_dB, value * factor[:, None], mask=inside)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, SHARE, TOKENS):
        token = (share * SHARE + start + tl.arange(0, TOKENS)).to(tl.int64)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        x = tl.load(a + token[:, None] * a_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(b + token[:, None] * b_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += x * y
    tl.store(sums + share.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)
    if last_of(arrived + tl.program_id(0), tl.num_programs(1)):
        found = sum_of_shares(sums, column, tl.num_programs(1), columns, COLUMNS)
        if FINISH:
            found = tl.div_rn(found, tl.load(finish[0] + column, mask=column < columns, other=1.0))
        tl.store(out + column, found, mask=column < columns)


def columnwise_dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in DTYPES or b.dtype != a.dtype or a.shape != b.shape or a.dim() != 2 or a.numel() == 0:
        return NotImplemented
    return _columnwise_dot(a, b)


def _columnwise_dot(a: Tensor, b: Tensor, finish: tuple = (), rank: int = 0) -> Tensor:
    """`finish`: m_clamped, row_scale, raw, dB and scaling of the kernel, if it shall finish the gradients."""
    tokens, columns = a.shape
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    groups, shares = cdiv(columns, 128), cdiv(tokens, SHARE)
    sums = torch.empty(shares, columns, dtype=torch.float32, device=a.device)
    out = torch.empty(columns, dtype=torch.float32, device=a.device)
    with on(a):
        columnwise_dot_kernel[(groups, shares)](
            (out, sums, counters(a.device, groups)),
            (a, b),
            finish,
            (tokens, columns, a.stride(0), b.stride(0), rank),
            SHARE=SHARE,
            TOKENS=16,
            COLUMNS=128,
            FINISH=bool(finish),
            **FUSED,
        )
    return out


def adapter_gradients(
    dy: Tensor,
    B_scaled: Tensor,
    xA: Tensor,
    y: Tensor | None,
    row_scale: Tensor | None,
    m_clamped: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three reads of dy, where a CPU has one: products of cuBLAS, and the sums above, which also make dB what it has to
    be and divide dm, in the place of four launches. Without DoRA there are only the products.
    """
    if y is None or row_scale is None or m_clamped is None:
        return NotImplemented
    takes = y.shape == dy.shape and y.numel() > 0 and dy.dtype == y.dtype == xA.dtype and dy.dtype in DTYPES
    if not takes or any(
        t.dtype != torch.float32 or not t.is_contiguous() or t.numel() != y.shape[1] for t in (row_scale, m_clamped)
    ):
        return NotImplemented
    raw = widened_product(dy.t(), xA).contiguous()
    dB = torch.empty(raw.shape, dtype=torch.float32, device=dy.device)
    return dy @ B_scaled, dB, _columnwise_dot(dy, y, (m_clamped, row_scale, raw, dB, scaling), xA.shape[1])

"""LoRA and DoRA in Triton: the factors of a layer and the gradients of its adapter. (Row norms: `adapter_norms`.)

    prepare_lora_factors   all that a layer's product needs of A, B, m and n in one launch: a small step is bound by
                           its launches
    adapted_operands       the same for q, k and v, or gate and up, as one matrix each, and their weights, see
                           `reference`: two launches. One for both would hold the registers of the factors, 62 to 70,
                           where decoding has 53 and lives on many programs at a time
    columnwise_dot         sum_t a[t, j] * b[t, j] in float32, in two stages, so that narrow matrices fill a card: a
                           program sums a tile of columns over its share of the tokens, and the last of a tile's adds
                           the shares up, always in the same order, so that every run gives the same bits

The products of A and B with dense matrices are cuBLAS's. The alternative to two stages, atomic additions, would give
other bits in every run.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.reference.common import widened_product
from qlora_kernels.triton.adapter_norms import row_norms_4bit, row_norms_4bit_all
from qlora_kernels.triton.common import DTYPES, EXACT, FUSED, cdiv, counters, last_of, on, power_of_2, sum_of_shares
from qlora_kernels.triton.nf4 import MOST_JOINED, dequantize_4bit, dequantize_4bit_joined

__all__ = [
    "adapted_operands",
    "adapter_gradients",
    "columnwise_dot",
    "joined_gradients",
    "prepare_lora_factors",
    "row_norms_4bit",
    "row_norms_4bit_all",
]  # the operators of this subject

SHARE = 64  # tokens that a program of `columnwise_dot` sums


# ---------------------------------------------------------------- factors


@triton.jit
def _factors_of_layer(
    into,
    factors,
    scaling,
    sizes,
    first,
    LAYER: tl.constexpr,
    COUNT: tl.constexpr,
    DORA: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
):
    """Of layer LAYER of COUNT, whose rows begin at `first` in B_scaled; `sizes`: the elements of A, the rows of B, the
    rank. The first programs convert A, flat, the others BLOCK // RANK rows of B each. NaN stays NaN: a comparison with
    it is false.
    """
    program = tl.program_id(0)
    A_cast, B_scaled, row_scale, m_clamped = into
    A, B, m, n = factors
    count, rows, rank = sizes
    pieces = tl.cdiv(count, BLOCK)
    if program < pieces:
        at = program * BLOCK + tl.arange(0, BLOCK)
        element = tl.load(A + at, mask=at < count, other=0.0)
        tl.store(A_cast + LAYER * count + at, element.to(A_cast.dtype.element_ty), mask=at < count)
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
            tl.store(m_clamped + first + row, size, mask=row < rows)
            tl.store(row_scale + first + row, factor, mask=row < rows)
            value = value * factor[:, None]
        to = B_scaled + (first + row)[:, None] * (COUNT * rank) + k[None, :]
        for other in tl.static_range(COUNT):  # zeros beside it
            here = value if other == LAYER else tl.zeros_like(value)
            tl.store(to + other * rank, here.to(B_scaled.dtype.element_ty), mask=inside)


@triton.jit
def prepare_lora_factors_kernel(
    into, factors, scaling, count, rows, rank, DORA: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr
):
    _factors_of_layer(into, factors, scaling, (count, rows, rank), 0, 0, 1, DORA, BLOCK, RANK)


@triton.jit
def join_lora_factors_kernel(
    into,
    factors,
    scaling,
    count,
    rows,
    rank,
    DORA: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """`factors`: of each of COUNT layers. A program of a layer with fewer rows than another has nothing to do."""
    first = 0
    for i in tl.static_range(COUNT):
        if tl.program_id(1) == i:
            sizes = (count, rows[i], rank)
            _factors_of_layer(into, factors[i], scaling, sizes, first, i, COUNT, DORA, BLOCK, RANK)
        first += rows[i]


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
    (rank, columns), rows = A[0].shape, tuple(layouts[::4])
    count, out, dora = len(rows), sum(rows), bool(m)
    if dtype not in DTYPES or rank > 1024 or count > MOST_JOINED or min(rank, columns, *rows) < 1:
        return NotImplemented
    for a, b, height in zip(A, B, rows, strict=True):
        if not (_takes(a, (rank, columns)) and _takes(b, (height, rank))):
            return NotImplemented
    for magnitude, norm, height in zip(m, n, rows, strict=True) if dora else ():
        if not (_takes(magnitude, (height,)) and _takes(norm, (height,))):
            return NotImplemented
    like = A[0]
    A_cast = like.new_empty(count * rank, columns, dtype=dtype)
    B_scaled = like.new_empty(out, count * rank, dtype=dtype)
    factors = like.new_empty(2, out if dora else 0)
    row_scale, m_clamped = factors.unbind() if dora else (None, None)
    width = max(16, power_of_2(rank))
    with on(like):
        join_lora_factors_kernel[(cdiv(rank * columns, 2048) + cdiv(max(rows), 2048 // width), count)](
            (A_cast, B_scaled, row_scale, m_clamped) if dora else (A_cast, B_scaled, like, like),
            tuple(zip(A, B, m or B, n or B, strict=True)),
            scaling,
            rank * columns,
            rows,
            rank,
            DORA=dora,
            BLOCK=2048,
            RANK=width,
            COUNT=count,
            **EXACT,
        )
    decode = dequantize_4bit if count == 1 else dequantize_4bit_joined
    dense = decode(weights, layouts, row_scale, dtype)
    return NotImplemented if dense is NotImplemented else (dense, A_cast, B_scaled, factors)


def _takes(factor: Tensor, shape: tuple[int, ...]) -> bool:
    return factor.dtype == torch.float32 and factor.shape == shape and factor.is_contiguous()


# ---------------------------------------------------------------- gradients

# `finish` in kernels is (m_clamped, row_scale, raw, dB, scaling, ends): dB [columns, rank] = scaling row_scale raw, of
# which a column takes the block of its layer. `ends`: the first column behind the first layer and behind the second.


@triton.jit
def _finish_dB(finish, column, columns, rank, SCALED: tl.constexpr, COUNT: tl.constexpr):
    _, row_scale, raw, dB, scaling, ends = finish
    factor = tl.full(column.shape, 1.0, tl.float32) * tl.cast(scaling, tl.float32)
    if SCALED:
        factor = tl.cast(scaling, tl.float32) * tl.load(row_scale + column, mask=column < columns, other=0.0)
    first = column * (rank * COUNT)
    for i in tl.static_range(COUNT - 1):
        first += (column >= ends[i]).to(tl.int32) * rank
    for start in range(0, rank, 16):
        k = start + tl.arange(0, 16)
        inside = (column < columns)[:, None] & (k < rank)[None, :]
        into_dB = dB + column[:, None] * rank + k[None, :]  # before the load: the other way round takes more registers
        at = first[:, None] + k[None, :]
        value = tl.load(raw + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(into_dB, value * factor[:, None], mask=inside)


@triton.jit
def finish_gradients_kernel(
    dm, dots, finish, columns, rank, COLUMNS: tl.constexpr, DORA: tl.constexpr, COUNT: tl.constexpr
):
    """dB, and dm = dots / m_clamped where there are magnitudes."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    _finish_dB(finish, column, columns, rank, DORA, COUNT)
    if DORA:
        total = tl.load(dots + column, mask=column < columns, other=0.0)
        divisor = tl.load(finish[0] + column, mask=column < columns, other=1.0)
        tl.store(dm + column, tl.div_rn(total, divisor), mask=column < columns)


@triton.jit
def columnwise_dot_kernel(
    into,
    values,
    finish,
    sizes,
    SHARE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FINISH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """out [columns]; sums [share, columns]: the sum over SHARE tokens, TOKENS at a time; `values` are a and b. FINISH:
    out is divided by m_clamped, and dB made on the way.
    """
    out, sums, arrived = into
    a, b = values
    tokens, columns, a_stride, b_stride, rank = sizes
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.program_id(1)
    if FINISH:
        if share == 0:
            _finish_dB(finish, column, columns, rank, True, COUNT)
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
    """`finish`: as the kernel takes it, if it shall finish the gradients."""
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
            COUNT=1 + len(finish[5]) if finish else 1,
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
    if row_scale.shape != m_clamped.shape or not row_scale.is_contiguous() or not m_clamped.is_contiguous():
        return NotImplemented
    return _finished(dy, B_scaled, xA, (y, None), (row_scale, m_clamped), [B_scaled.shape[0]], scaling)


def joined_gradients(
    dy: Tensor,
    B_scaled: Tensor,
    xA: Tensor,
    y: Tensor | None,
    dots: Tensor | None,
    factors: Tensor,
    outs: list[int],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `adapter_gradients`: two products and one launch that finishes them."""
    if len(outs) > MOST_JOINED or not factors.is_contiguous():
        return NotImplemented
    dora = tuple(factors.unbind()) if factors.numel() else ()
    if len(dora) == (y is None and dots is None):  # the one without the other
        return NotImplemented
    return _finished(dy, B_scaled, xA, (y, dots), dora, outs, scaling)


def _finished(
    dy: Tensor,
    B_scaled: Tensor,
    xA: Tensor,
    sums: tuple[Tensor | None, Tensor | None],
    dora: tuple[Tensor, ...],
    outs: list[int],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(v, dB, dm); `sums` are y and dots of `joined_gradients`, `dora` (row_scale, m_clamped) or nothing."""
    (y, dots), columns, rank = sums, dy.shape[1], xA.shape[1] // len(outs)
    takes = (
        dy.numel() > 0
        and dy.dtype == xA.dtype
        and dy.dtype in DTYPES
        and sum(outs) == columns
        and (y is None or (y.shape == dy.shape and y.dtype == dy.dtype))
        and all(t.dtype == torch.float32 and t.shape == (columns,) for t in dora)
        and (dots is None or (dots.dtype == torch.float32 and dots.is_contiguous() and dots.shape == (columns,)))
    )
    if not takes:
        return NotImplemented
    raw = widened_product(dy.t(), xA).contiguous()
    dB = torch.empty(columns, rank, dtype=torch.float32, device=dy.device)
    row_scale, m_clamped = dora or (dB, dB)
    ends = tuple(itertools.accumulate(outs[:-1]))
    finish = (m_clamped, row_scale, raw, dB, scaling, ends)
    if y is not None:
        return dy @ B_scaled, dB, _columnwise_dot(dy, y, finish, rank)
    dm = dB.new_empty(columns if dora else 0)
    with on(dB):
        finish_gradients_kernel[(cdiv(columns, 128),)](
            dm,
            dB if dots is None else dots,
            finish,
            columns,
            rank,
            COLUMNS=128,
            DORA=bool(dora),
            COUNT=len(outs),
            **FUSED,
        )
    return dy @ B_scaled, dB, dm

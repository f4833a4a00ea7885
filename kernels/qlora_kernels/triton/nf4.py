"""Quantized weights in Triton: codes to numbers, and the product with one vector. (To codes: `nf4_encode`.)

    dequantize   one launch: codes, double-quantized scales, row scale and cast; of up to three weights below each other
    gemv         y = W x, decoded in registers: a token of generation costs one read of the codes

A thread decodes whole words: 4 bytes, 8 weights, which share a scale because every block size is a multiple of 8. So a
scale is decoded once for 8 weights, and the 8 results in bf16 are one 16-byte store beside its neighbour's. Levels come
from a table of 64 bytes that stays in the first-level cache: one load a weight. The alternatives: a tree of selections,
15 instructions a weight, costs more than the memory traffic; a table of byte pairs in shared memory would halve the
loads at the price of bank conflicts.

`map[q] * nested + offset` has to be rounded twice, as bitsandbytes does, so decoding is compiled without contraction
(EXACT). float64, foreign block sizes and blocks that cross rows in a product are left to the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.triton.common import BLOCKSIZES, DTYPES, EXACT, FUSED, cdiv, on
from qlora_kernels.triton.nf4_encode import encode_4bit, fit_scales_4bit, quantize_4bit, quantize_absmax

__all__ = [
    "dequantize_4bit",
    "dequantize_4bit_into",
    "dequantize_4bit_joined",
    "encode_4bit",
    "fit_scales_4bit",
    "gemv_4bit",
    "quantize_4bit",
    "quantize_absmax",
]  # the operators of this subject

MOST_JOINED = 3  # weights in one launch: q, k and v
WORDS = 512  # words that a program decodes: 4 for each of its 128 threads


# ---------------------------------------------------------------- decoding

# `weight` in kernels is (packed, absmax, levels, nested_absmax, nested_offset, dynamic_map), see `kernel_weight`.


@triton.jit
def block_scales(weight, block, mask, NESTED_BLOCKSIZE: tl.constexpr):
    """The float32 scale of each block; NESTED_BLOCKSIZE 0 means that absmax holds them as they are."""
    _, absmax, _, nested, offset, dynamic_map = weight
    if NESTED_BLOCKSIZE == 0:
        return tl.load(absmax + block, mask=mask, other=0.0)
    else:
        code = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        return tl.load(dynamic_map + code) * scale + tl.load(offset)


@triton.jit
def word_codes(packed, word, bytes, COUNT: tl.constexpr):
    """The codes [COUNT, 8] of words [COUNT]; a byte past the end gives code 0, which nobody stores."""
    at = word.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    byte = tl.load(packed + at, mask=at < bytes, other=0).to(tl.int32)
    return tl.reshape(tl.join(byte >> 4, byte & 15), [COUNT, 8])


@triton.jit
def word_levels(weight, word, bytes, COUNT: tl.constexpr):
    """The levels [COUNT, 8] of words [COUNT]."""
    return tl.load(weight[2] + word_codes(weight[0], word, bytes, COUNT))


@triton.jit
def _decode_words(
    out,
    weight,
    row_scale,
    program,
    sizes,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """WORDS words of a weight. `sizes`: its values, the bytes of its codes, its columns. ROW_SCALE: 0 none, 1 on the
    scales of blocks (each lies in one row), 2 on the values.
    """
    n, bytes, columns = sizes
    first = program.to(tl.int64) * WORDS
    local = tl.arange(0, WORDS)
    word = first + local
    block = (
        (first * 8 // BLOCKSIZE).to(tl.int32)
        + (first * 8 % BLOCKSIZE).to(tl.int32) // BLOCKSIZE
        + local // (BLOCKSIZE // 8)
    )
    if BLOCKSIZE > WORDS * 8:
        block = (word * 8 // BLOCKSIZE).to(tl.int32)
    inside = word * 8 < n
    scale = block_scales(weight, block, inside, NESTED_BLOCKSIZE)
    if ROW_SCALE == 1:
        scale = scale * tl.load(row_scale + block // (columns // BLOCKSIZE), mask=inside, other=0.0)
    value = word_levels(weight, word, bytes, WORDS) * scale[:, None]
    element = local[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = element < n - first * 8
    if ROW_SCALE == 2:
        value = value * tl.load(row_scale + (element + first * 8) // columns, mask=inside, other=0.0)
    tl.store(out + first * 8 + element, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    out,
    weight,
    row_scale,
    n,
    bytes,
    columns,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    WORDS: tl.constexpr,
):
    sizes = (n, bytes, columns)
    _decode_words(out, weight, row_scale, tl.program_id(0), sizes, BLOCKSIZE, NESTED_BLOCKSIZE, ROW_SCALE, WORDS)


@triton.jit
def dequantize_joined_kernel(
    out,
    weights,
    row_scale,
    rows,
    columns,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    WORDS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The same of COUNT weights of `rows` each, below each other; rows * columns are whole words."""
    program = tl.program_id(0)
    begin, first = 0, 0  # the first program of a weight, its first row
    for i in tl.static_range(COUNT):
        n = rows[i] * columns
        end = begin + tl.cdiv(n, WORDS * 8)
        if program >= begin and program < end:
            _decode_words(
                out + first * columns,
                weights[i],
                row_scale + first,
                program - begin,
                (n, n // 2, columns),
                BLOCKSIZE,
                NESTED_BLOCKSIZE,
                ROW_SCALE,
                WORDS,
            )
        begin, first = end, first + rows[i]


@triton.jit
def gemv_kernel(
    y,
    x,
    weight,
    rows,
    columns,
    bytes,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """y [rows] float32 = W x. A program takes ROWS rows, WORDS words of each at a time; a thread sums whole words."""
    local = tl.arange(0, ROWS * WORDS)
    row = tl.program_id(0) * ROWS + local // WORDS
    per_row = columns // 8
    total = tl.zeros([ROWS * WORDS], tl.float32)
    for start in range(0, per_row, WORDS):
        at = start + local % WORDS
        inside = (row < rows) & (at < per_row)
        word = tl.where(inside, row.to(tl.int64) * per_row + at, 0)
        scale = block_scales(weight, (word * 8 // BLOCKSIZE).to(tl.int32), inside, NESTED_BLOCKSIZE)
        value = tl.load(x + at[:, None] * 8 + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        level = word_levels(weight, word, bytes, ROWS * WORDS)
        total += tl.sum(level * value, axis=1) * tl.where(inside, scale, 0.0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + row, tl.sum(tl.reshape(total, [ROWS, WORDS]), axis=1), mask=row < rows)


# ---------------------------------------------------------------- as operators: `ops` says what they mean


def kernel_weight(weight: list[Tensor], layout: list[int]) -> tuple[tuple[Tensor, ...], dict[str, int]] | None:
    """A quantized weight as the kernels take it: its tensors and its block sizes; None where they do not take it (its
    sizes are checked, because a kernel would read past the end).
    """
    packed, absmax, levels = weight[:3]
    rows, columns, blocksize, nested_blocksize = layout
    n, nested = rows * columns, len(weight) == 5
    blocks = cdiv(n, blocksize)
    nested_absmax, nested_offset = weight[3:] if nested else (absmax, absmax)  # without them they are not read
    takes = (
        blocksize in BLOCKSIZES
        and packed.dtype == torch.uint8
        and packed.is_contiguous()
        and packed.numel() >= (n + 1) // 2
        and absmax.dtype == (torch.uint8 if nested else torch.float32)
        and absmax.is_contiguous()
        and absmax.numel() >= blocks
        and levels.dtype == torch.float32
        and levels.is_contiguous()
        and levels.numel() == 16
    )
    if nested:
        takes = (
            takes
            and nested_absmax.dtype == nested_offset.dtype == torch.float32
            and nested_absmax.is_contiguous()
            and nested_absmax.numel() >= cdiv(blocks, nested_blocksize)
        )
    if not takes:
        return None
    tensors = (packed, absmax, levels, nested_absmax, nested_offset, reference.dynamic_map(packed.device))
    return tensors, {"BLOCKSIZE": blocksize, "NESTED_BLOCKSIZE": nested_blocksize if nested else 0}


def dequantize_4bit(weight: list[Tensor], layout: list[int], row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = torch.empty(layout[0], layout[1], dtype=dtype, device=weight[0].device)
    return out if _decode(out, weight, layout, row_scale) else NotImplemented


def dequantize_4bit_into(out: Tensor, weight: list[Tensor], layout: list[int], row_scale: Tensor | None) -> None:
    if not _decode(out, weight, layout, row_scale):
        return NotImplemented
    reference.mark_mutated(out)
    return None


def dequantize_4bit_joined(
    weights: list[Tensor], layouts: list[int], row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows, (columns, blocksize) = tuple(layouts[::4]), layouts[1:3]
    count, size = len(rows), len(weights) // len(rows)
    if (
        count > MOST_JOINED
        or dtype not in DTYPES
        or columns % blocksize
        or sum(rows) * columns >= 1 << 31
        or layouts != [part for height in rows for part in (height, *layouts[1:4])]  # another width or block size
        or (row_scale is not None and (row_scale.dtype != torch.float32 or row_scale.shape != (sum(rows),)))
    ):
        return NotImplemented
    taken = [kernel_weight(weights[i * size : i * size + size], layouts[i * 4 : i * 4 + 4]) for i in range(count)]
    if None in taken:
        return NotImplemented
    out = torch.empty(sum(rows), columns, dtype=dtype, device=weights[0].device)
    with on(out):
        dequantize_joined_kernel[(sum(cdiv(n * columns, WORDS * 8) for n in rows),)](
            out,
            tuple(one[0] for one in taken if one),
            weights[2] if row_scale is None else row_scale.contiguous(),
            rows,
            columns,
            ROW_SCALE=0 if row_scale is None else 1,
            WORDS=WORDS,
            COUNT=len(rows),
            **next(one[1] for one in taken if one),
            **EXACT,
        )
    return out


def _decode(out: Tensor, weight: list[Tensor], layout: list[int], row_scale: Tensor | None) -> bool:
    """Whether the kernel took it, and then it has."""
    rows, columns, blocksize, _ = layout
    n = rows * columns
    taken = kernel_weight(weight, layout)
    if taken is None or out.dtype not in DTYPES or out.shape != (rows, columns) or not out.is_contiguous() or n == 0:
        return False
    tensors, sizes = taken
    if row_scale is not None:
        if row_scale.numel() != rows:
            raise ValueError(f"row_scale holds {row_scale.numel()} values for {rows} rows")
        row_scale = row_scale.float().contiguous()
    with on(out):
        dequantize_kernel[(cdiv(n, WORDS * 8),)](
            out,
            tensors,
            tensors[1] if row_scale is None else row_scale,
            n,
            (n + 1) // 2,
            columns,
            ROW_SCALE=0 if row_scale is None else 1 if columns % blocksize == 0 else 2,
            WORDS=WORDS,
            **sizes,
            **EXACT,
        )
    return True


def gemv_4bit(x: Tensor, weight: list[Tensor], layout: list[int]) -> Tensor:
    rows, columns, blocksize, _ = layout
    taken = kernel_weight(weight, layout)
    if taken is None or columns % blocksize or x.dtype not in DTYPES:
        return NotImplemented
    tensors, sizes = taken
    x = x.contiguous()
    y = torch.empty(rows, dtype=torch.float32, device=x.device)
    with on(y):
        gemv_kernel[(cdiv(rows, 4),)](
            y, x, tensors, rows, columns, rows * columns // 2, ROWS=4, WORDS=128, **sizes, **FUSED
        )
    return y

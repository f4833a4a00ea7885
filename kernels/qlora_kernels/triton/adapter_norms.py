"""DoRA's row norms in Triton: n_j = ||W_j + s B_j A||.

W + s B A is made tile by tile and never written, in one launch for a layer, or for all layers of one shape. The
alternative, the three sums of `reference.row_norms`, costs as many products, and needs the rows where they cancel a
second time. Where the rows make too few programs to fill a card, each row is shared out among several.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.triton.common import FUSED, cdiv, counters, last_of, on, power_of_2, sum_of_shares
from qlora_kernels.triton.nf4 import block_scales, dequantize_4bit, kernel_weight, word_codes
from qlora_kernels.weight import QuantizedWeight

MAX_RANK = 64  # what fits in registers
PROGRAMS = 528  # as many as an H100 holds at a time

# In these kernels `sizes` is (rows, columns, bytes, rank, share): the bytes of all codes, and the words of a row that a
# program takes.


@triton.jit
def _decoded(
    weight,
    levels,
    sizes,
    first,
    start,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """WORDS words of each of ROWS rows from word `start` on, as float32 [ROWS, WORDS * 8]; zeros outside of the matrix.

    The levels [16] are given as values, which lie in shared memory and cost no 64-bit address a weight; here, unlike in
    `dequantize_kernel`, there is time to bring them there.
    """
    rows, columns, bytes = sizes[0], sizes[1], sizes[2]
    local = tl.arange(0, ROWS * WORDS)
    row = first + local // WORDS
    per_row = columns // 8
    at = start + local % WORDS
    inside = (row < rows) & (at < per_row)
    word = tl.where(inside, row.to(tl.int64) * per_row + at, 0)
    scale = block_scales(weight, (word * 8 // BLOCKSIZE).to(tl.int32), inside, NESTED_BLOCKSIZE)
    code = tl.reshape(word_codes(weight[0], word, bytes, ROWS * WORDS), [ROWS * WORDS * 8])
    level = tl.reshape(tl.gather(levels, code, 0), [ROWS * WORDS, 8])
    return tl.reshape(level * tl.where(inside, scale, 0.0)[:, None], [ROWS, WORDS * 8])


@triton.jit
def _halves(value):
    """value = high + low, both of TF32's 11 digits: three products of such have float32's digits, from the tensor
    cores.

    As Triton's own "tf32x3", without its search for NaN in the results, which are as many as the weights here.
    """
    high = (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, value - high


@triton.jit
def _norms_of_rows(
    into,
    weight,
    factors,
    sizes,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
):
    """n [rows] = ||W_j + s B_j A||: a program squares ROWS rows of W + s B A over its share, the last of a row's adds
    the shares up.
    """
    n, sums, counter = into
    A, B, scaling = factors
    rows, columns, _, rank, share = sizes
    first = tl.program_id(0) * ROWS
    part, parts = tl.program_id(1), tl.num_programs(1)
    row = first + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    b = tl.load(B + row[:, None] * rank + k[None, :], mask=(row < rows)[:, None] & (k < rank)[None, :], other=0.0)
    b_high, b_low = _halves(b * tl.cast(scaling, tl.float32))  # the interpreter of Triton 3.6 passes float64
    squares = tl.zeros([ROWS, WORDS * 8], tl.float32)
    levels = tl.load(weight[2] + tl.arange(0, 16))
    for start in range(part * share, min(part * share + share, columns // 8), WORDS):
        W = _decoded(weight, levels, sizes, first, start, BLOCKSIZE, NESTED_BLOCKSIZE, ROWS, WORDS)
        column = start * 8 + tl.arange(0, WORDS * 8)
        inside = (k < rank)[:, None] & (column < columns)[None, :]
        a_high, a_low = _halves(tl.load(A + k[:, None] * columns + column[None, :], mask=inside, other=0.0))
        value = tl.dot(b_low, a_high, W, input_precision="tf32")
        value = tl.dot(b_high, a_low, value, input_precision="tf32")
        value = tl.dot(b_high, a_high, value, input_precision="tf32")
        squares += value * value
    tl.store(sums + part * rows + row, tl.sum(squares, axis=1), mask=row < rows)
    if last_of(counter, parts):
        tl.store(n + row, tl.sqrt_rn(sum_of_shares(sums, row, parts, rows, ROWS)), mask=row < rows)


@triton.jit
def row_norms_kernel(
    into,
    weight,
    factors,
    sizes,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Of one layer: the programs of a row count themselves in a counter of their own."""
    n, sums, arrived = into
    own = (n, sums, arrived + tl.program_id(0))
    _norms_of_rows(own, weight, factors, sizes, BLOCKSIZE, NESTED_BLOCKSIZE, ROWS, WORDS, RANK)


@triton.jit
def row_norms_all_kernel(
    into,
    table,
    scalings,
    dynamic_map,
    sizes,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
):
    """The same of many layers of one shape; table [layers, 7] holds the addresses of packed, absmax, levels,
    nested_absmax, nested_offset, A and B.
    """
    n, sums, arrived = into
    rows = sizes[0]
    layer = tl.program_id(2)
    entry = table + layer * 7
    weight = (
        tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.uint8)), 16),
        tl.load(entry + 1).to(tl.pointer_type(tl.float32 if NESTED_BLOCKSIZE == 0 else tl.uint8)),
        tl.load(entry + 2).to(tl.pointer_type(tl.float32)),
        tl.load(entry + 3).to(tl.pointer_type(tl.float32)),
        tl.load(entry + 4).to(tl.pointer_type(tl.float32)),
        dynamic_map,
    )
    A = tl.multiple_of(tl.load(entry + 5).to(tl.pointer_type(tl.float32)), 16)
    B = tl.multiple_of(tl.load(entry + 6).to(tl.pointer_type(tl.float32)), 16)
    counter = arrived + layer * tl.num_programs(0) + tl.program_id(0)
    own = (n + layer * rows, sums + layer * tl.num_programs(1) * rows, counter)
    factors = (A, B, tl.load(scalings + layer))
    _norms_of_rows(own, weight, factors, sizes, BLOCKSIZE, NESTED_BLOCKSIZE, ROWS, WORDS, RANK)


def row_norms_4bit(weight: list[Tensor], layout: list[int], A: Tensor, B: Tensor, scaling: float) -> Tensor:
    rows, columns, blocksize, _ = layout
    rank = A.shape[0]
    taken = kernel_weight(weight, layout)
    if taken is None or columns % blocksize:
        return NotImplemented
    if A.dtype != torch.float32 or B.dtype != torch.float32 or rank > MAX_RANK:
        return _row_norms_by_chunks(QuantizedWeight(weight, layout), A, B, scaling)
    if A.shape != (rank, columns) or B.shape != (rows, rank):
        raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a weight of {rows} x {columns}")
    tensors, blocksizes = taken
    grid, sizes, options = _norms_grid(rows, columns, rank)
    n = torch.empty(rows, dtype=torch.float32, device=A.device)
    into = (n, torch.empty(grid[1], rows, dtype=torch.float32, device=A.device), counters(A.device, grid[0]))
    with on(n):
        row_norms_kernel[grid](into, tensors, (A.contiguous(), B.contiguous(), scaling), sizes, **blocksizes, **options)
    return n


def _norms_grid(rows: int, columns: int, rank: int) -> tuple[tuple[int, int], tuple[int, ...], dict]:
    """Grid, sizes and options of the kernels of row norms: the same for a layer alone and among others, so that the
    bits are the same.
    """
    groups, words = cdiv(rows, 64), columns // 8
    share = 16 * cdiv(words, 16 * min(32, max(1, PROGRAMS // groups)))
    return (
        (groups, cdiv(words, share)),
        (rows, columns, rows * columns // 2, rank, share),
        {
            # One stage: pipelined, registers would spill. Contracted: the last bit of a scale is nothing in a sum of
            # thousands.
            "ROWS": 64,
            "WORDS": 8 if rank <= 32 else 4,
            "RANK": max(16, power_of_2(rank)),
            "num_stages": 1,
            **FUSED,
        },
    )


def row_norms_4bit_all(
    weights: list[Tensor], layouts: list[int], A: list[Tensor], B: list[Tensor], scaling: list[float]
) -> list[Tensor]:
    """One launch for all layers of one shape; a layer that cannot share one has its own."""
    split = zip(*reference.split_weights(weights, layouts), strict=True)
    found: dict[int, Tensor] = {}
    alike: dict[tuple, list[tuple[int, tuple[Tensor, ...], float]]] = {}
    for i, layer in enumerate(zip(split, A, B, scaling, strict=True)):
        (weight, layout), a, b, s = layer
        taken = kernel_weight(weight, layout)
        if taken is not None and _shares_a_launch(weight[0], layout, a, b):
            key = (a.device, layout[0], layout[1], a.shape[0], *taken[1].values())
            alike.setdefault(key, []).append((i, (*taken[0][:5], a, b), s))
        else:
            n = row_norms_4bit(weight, layout, a, b, s)
            found[i] = reference.row_norms_4bit(weight, layout, a, b, s) if n is NotImplemented else n
    for key, members in alike.items():
        places, tensors, scalings = zip(*members, strict=True)
        found.update(zip(places, _row_norms_together(key, tensors, scalings).unbind(), strict=True))
    return [found[i] for i in range(len(A))]


def _shares_a_launch(packed: Tensor, layout: list[int], A: Tensor, B: Tensor) -> bool:
    """Whether `row_norms_all_kernel` takes this layer: it assumes addresses that are multiples of 16."""
    rows, columns, blocksize, _ = layout
    rank = A.shape[0]
    return (
        columns % blocksize == 0
        and rank <= MAX_RANK
        and A.dtype == B.dtype == torch.float32
        and A.is_contiguous()
        and B.is_contiguous()
        and packed.data_ptr() % 16 == A.data_ptr() % 16 == B.data_ptr() % 16 == 0
        and A.shape == (rank, columns)
        and B.shape == (rows, rank)
    )


def _row_norms_together(key: tuple, tensors: tuple[tuple[Tensor, ...], ...], scalings: tuple[float, ...]) -> Tensor:
    """n [layers, rows] in one launch; `tensors` of a layer are what the table of `row_norms_all_kernel` points to."""
    device, rows, columns, rank, blocksize, nested_blocksize = key
    grid, sizes, options = _norms_grid(rows, columns, rank)
    table, scaling = _table(device, tuple(part.data_ptr() for parts in tensors for part in parts), scalings)
    n = torch.empty(len(tensors), rows, dtype=torch.float32, device=device)
    sums = torch.empty(len(tensors), grid[1], rows, dtype=torch.float32, device=device)
    into = (n, sums, counters(device, len(tensors) * grid[0]))
    with on(n):
        row_norms_all_kernel[(*grid, len(tensors))](
            into,
            table,
            scaling,
            reference.dynamic_map(device),
            sizes,
            BLOCKSIZE=blocksize,
            NESTED_BLOCKSIZE=nested_blocksize,
            **options,
        )
    return n


@functools.lru_cache(maxsize=64)
def _table(device: torch.device, addresses: tuple[int, ...], scalings: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Both on the device; kept, since they change with the parameters only, and a CUDA graph may not copy them."""
    table, scaling = torch.tensor(addresses, dtype=torch.int64), torch.tensor(scalings, dtype=torch.float32)
    return table.to(device), scaling.to(device)


def _row_norms_by_chunks(weight: QuantizedWeight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Large ranks and float64: decode to float32, a piece at a time, and leave the products to cuBLAS. Rows are whole
    blocks.
    """
    rows, columns = weight.shape
    scales, codes = reference.decode_absmax(weight).view(rows, -1), weight.packed.view(rows, -1)
    step = max(1, (1 << 24) // columns)
    parts = (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def decoded(part: slice) -> Tensor:
        layout = [part.stop - part.start, *weight.layout[1:]]
        return dequantize_4bit([codes[part], scales[part], weight.levels], layout, None, torch.float32)

    return reference.row_norms(((part, decoded(part).to(A.dtype)) for part in parts), A, B, scaling)

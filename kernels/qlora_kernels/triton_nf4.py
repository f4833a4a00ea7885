"""The NF4 operators as Triton kernels, for NVIDIA cards from compute capability 8.0 on.

    dequantize   one launch: codes, double-quantized constants, row gain and cast (bitsandbytes takes three launches and no gain)
    gemv         y = W x, decoding in registers: what one token of generation costs is reading the codes once
    row norms    DoRA's n: W + s B A is made tile by tile and never written. One launch; the three sums of `reference.row_norms` cost as
                 many products, need the rows where they cancel a second time, and a launch each for gram and total
    quantize     absmax, fitted scales and double quantization, to the codes of `reference.py`

A thread decodes whole words: 4 bytes, 8 weights, which share a scale because every block size is a multiple of 8. So a
scale is decoded once for 8 weights, and the 8 bf16 results are one 16-byte store beside its neighbour's. Levels come
from a table of 64 bytes that stays in the first-level cache: one load a weight, where a tree of selections takes 15
instructions, which on an H100 costs more than the memory traffic. A table of byte pairs in shared memory would halve
the loads, at the price of bank conflicts.

The interpreter (TRITON_INTERPRET=1) runs all of this on CPU tensors: tests/test_triton.py. `map[q] * nested + offset`
must be rounded twice as bitsandbytes does (fused, 2.4 % of the scales change), so what has to be exact is compiled
without contraction (EXACT). What the kernels do not take (float64, foreign block sizes, blocks that cross rows in the
products) goes to the reference.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = frozenset(1 << k for k in range(5, 13))  # 32..4096
EXACT, FUSED = (
    {"enable_fp_fusion": False},
    {"enable_fp_fusion": True},
)  # never left to the default, which Triton is changing
WORDS = 512  # words that a program decodes: 4 for each of its 128 threads
TILE = 4096  # weights that a program quantizes
MAX_RANK = 64  # of the row norms: what fits in registers
PROGRAMS = (
    528  # of the row norms: as many as an H100 has room for at a time; where the rows make fewer, a row is shared out
)


# ---------------------------------------------------------------- what the kernels share


@triton.jit
def _scales(absmax, nested, offset, dynamic_map, block, mask, NESTED_BLOCKSIZE: tl.constexpr):
    """The float32 scale of each block; NESTED_BLOCKSIZE 0 means that absmax holds them as they are."""
    if NESTED_BLOCKSIZE == 0:
        return tl.load(absmax + block, mask=mask, other=0.0)
    else:
        code = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        return tl.load(dynamic_map + code) * scale + tl.load(offset)


@triton.jit
def _word_codes(packed, word, bytes, COUNT: tl.constexpr):
    """The codes [COUNT, 8] of words [COUNT]; a byte past the end gives code 0, which nobody stores."""
    at = word.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    byte = tl.load(packed + at, mask=at < bytes, other=0).to(tl.int32)
    return tl.reshape(tl.join(byte >> 4, byte & 15), [COUNT, 8])


@triton.jit
def _word_levels(packed, levels, word, bytes, COUNT: tl.constexpr):
    return tl.load(levels + _word_codes(packed, word, bytes, COUNT))


@triton.jit
def _count_below(value, midpoints, BITS: tl.constexpr):
    """How many of the 2^BITS - 1 ascending midpoints are less than each value: its code, ties to the lower one."""
    code = tl.zeros(value.shape, tl.int32)
    for step in tl.static_range(BITS):
        middle = tl.load(midpoints + code + ((1 << (BITS - 1 - step)) - 1))
        code = tl.where(middle < value, code + (1 << (BITS - 1 - step)), code)
    return code


@triton.jit
def last_of(counter, parts):
    """Whether this is the last of `parts` programs to come here; then it sees what all of them have stored, and sets
    the counter back to 0.
    """
    tl.debug_barrier()  # every thread has stored
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_of_shares(sums, column, parts, columns, COLUMNS: tl.constexpr):
    """sums [parts, columns] added up over the parts, for COLUMNS of the columns: in the same order whichever program
    does it.
    """
    total = tl.zeros([16, COLUMNS], tl.float32)
    for start in range(0, parts, 16):
        part = (start + tl.arange(0, 16)).to(tl.int64)[:, None]
        inside = (part < parts) & (column < columns)[None, :]
        total += tl.load(
            sums + part * columns + column[None, :], mask=inside, other=0.0, cache_modifier=".cg"
        )  # not from this core's cache
    return tl.sum(total, axis=0)


# ---------------------------------------------------------------- decoding


@triton.jit
def dequantize_kernel(
    out,
    packed,
    absmax,
    nested,
    offset,
    gain,
    levels,
    dynamic_map,
    n,
    bytes,
    columns,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    GAIN: tl.constexpr,
    WORDS: tl.constexpr,
):
    """GAIN: 0 none, 1 on the scales (every block lies in one row), 2 on the values."""
    first = tl.program_id(0).to(tl.int64) * WORDS
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
    scale = _scales(absmax, nested, offset, dynamic_map, block, inside, NESTED_BLOCKSIZE)
    if GAIN == 1:
        scale = scale * tl.load(gain + block // (columns // BLOCKSIZE), mask=inside, other=0.0)
    value = _word_levels(packed, levels, word, bytes, WORDS) * scale[:, None]
    element = local[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = element < n - first * 8
    if GAIN == 2:
        value = value * tl.load(gain + (element + first * 8) // columns, mask=inside, other=0.0)
    tl.store(out + first * 8 + element, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gemv_kernel(
    y,
    x,
    packed,
    absmax,
    nested,
    offset,
    levels,
    dynamic_map,
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
        scale = _scales(
            absmax, nested, offset, dynamic_map, (word * 8 // BLOCKSIZE).to(tl.int32), inside, NESTED_BLOCKSIZE
        )
        value = tl.load(x + at[:, None] * 8 + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        total += tl.sum(_word_levels(packed, levels, word, bytes, ROWS * WORDS) * value, axis=1) * tl.where(
            inside, scale, 0.0
        )
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + row, tl.sum(tl.reshape(total, [ROWS, WORDS]), axis=1), mask=row < rows)


# ---------------------------------------------------------------- DoRA's norms


@triton.jit
def _words(
    packed,
    absmax,
    nested,
    offset,
    levels,
    dynamic_map,
    first,
    rows,
    columns,
    bytes,
    start,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """WORDS words of each of ROWS rows from word `start` on, as float32 [ROWS, WORDS * 8]; zeros outside of the matrix."""
    local = tl.arange(0, ROWS * WORDS)
    row = first + local // WORDS
    per_row = columns // 8
    at = start + local % WORDS
    inside = (row < rows) & (at < per_row)
    word = tl.where(inside, row.to(tl.int64) * per_row + at, 0)
    scale = _scales(absmax, nested, offset, dynamic_map, (word * 8 // BLOCKSIZE).to(tl.int32), inside, NESTED_BLOCKSIZE)
    # From shared memory, which costs no 64-bit address a weight; here, unlike in `dequantize_kernel`, there is time to
    # bring the levels there.
    level = tl.gather(levels, tl.reshape(_word_codes(packed, word, bytes, ROWS * WORDS), [ROWS * WORDS * 8]), 0)
    return tl.reshape(tl.reshape(level, [ROWS * WORDS, 8]) * tl.where(inside, scale, 0.0)[:, None], [ROWS, WORDS * 8])


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
    n,
    sums,
    counter,
    packed,
    absmax,
    nested,
    offset,
    A,
    B,
    levels,
    dynamic_map,
    scaling,
    rows,
    columns,
    bytes,
    rank,
    share,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
):
    """n [rows] = ||W_j + s B_j A||: a program squares ROWS rows of W + s B A over `share` words, the last of a row's
    adds the shares up.
    """
    first = tl.program_id(0) * ROWS
    part, parts = tl.program_id(1), tl.num_programs(1)
    row = first + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    b = tl.load(B + row[:, None] * rank + k[None, :], mask=(row < rows)[:, None] & (k < rank)[None, :], other=0.0)
    b_high, b_low = _halves(b * tl.cast(scaling, tl.float32))  # the interpreter of Triton 3.6 passes float64
    squares = tl.zeros([ROWS, WORDS * 8], tl.float32)
    levels = tl.load(levels + tl.arange(0, 16))
    for start in range(part * share, min(part * share + share, columns // 8), WORDS):
        W = _words(
            packed,
            absmax,
            nested,
            offset,
            levels,
            dynamic_map,
            first,
            rows,
            columns,
            bytes,
            start,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            ROWS,
            WORDS,
        )
        column = start * 8 + tl.arange(0, WORDS * 8)
        a = tl.load(
            A + k[:, None] * columns + column[None, :],
            mask=(k < rank)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        a_high, a_low = _halves(a)
        value = tl.dot(b_low, a_high, W, input_precision="tf32")
        value = tl.dot(b_high, a_low, value, input_precision="tf32")
        value = tl.dot(b_high, a_high, value, input_precision="tf32")
        squares += value * value
    tl.store(sums + part * rows + row, tl.sum(squares, axis=1), mask=row < rows)
    if last_of(counter, parts):
        tl.store(n + row, tl.sqrt_rn(sum_of_shares(sums, row, parts, rows, ROWS)), mask=row < rows)


@triton.jit
def row_norms_kernel(
    n,
    sums,
    arrived,
    packed,
    absmax,
    nested,
    offset,
    A,
    B,
    levels,
    dynamic_map,
    scaling,
    rows,
    columns,
    bytes,
    rank,
    share,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
):
    _norms_of_rows(
        n,
        sums,
        arrived + tl.program_id(0),
        packed,
        absmax,
        nested,
        offset,
        A,
        B,
        levels,
        dynamic_map,
        scaling,
        rows,
        columns,
        bytes,
        rank,
        share,
        BLOCKSIZE,
        NESTED_BLOCKSIZE,
        ROWS,
        WORDS,
        RANK,
    )


@triton.jit
def row_norms_all_kernel(
    n,
    sums,
    arrived,
    table,
    scalings,
    levels,
    dynamic_map,
    rows,
    columns,
    bytes,
    rank,
    share,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RANK: tl.constexpr,
):
    """The same of many layers of one shape; table [layers, 6] holds the addresses of packed, absmax, nested, offset, A
    and B.
    """
    layer = tl.program_id(2)
    entry = table + layer * 6
    packed = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.uint8)), 16)
    absmax = tl.load(entry + 1).to(tl.pointer_type(tl.float32 if NESTED_BLOCKSIZE == 0 else tl.uint8))
    nested, offset = (
        tl.load(entry + 2).to(tl.pointer_type(tl.float32)),
        tl.load(entry + 3).to(tl.pointer_type(tl.float32)),
    )
    A = tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(tl.float32)), 16)
    B = tl.multiple_of(tl.load(entry + 5).to(tl.pointer_type(tl.float32)), 16)
    counter = arrived + layer * tl.num_programs(0) + tl.program_id(0)
    _norms_of_rows(
        n + layer * rows,
        sums + layer * tl.num_programs(1) * rows,
        counter,
        packed,
        absmax,
        nested,
        offset,
        A,
        B,
        levels,
        dynamic_map,
        tl.load(scalings + layer),
        rows,
        columns,
        bytes,
        rank,
        share,
        BLOCKSIZE,
        NESTED_BLOCKSIZE,
        ROWS,
        WORDS,
        RANK,
    )


# ---------------------------------------------------------------- encoding


@triton.jit
def quantize_kernel(
    packed,
    absmax,
    weight,
    midpoints,
    n,
    bytes,
    tiny,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """BLOCKS whole blocks: their absmax (written), or GIVEN scales (read from absmax), and their codes."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    element = tl.arange(0, BLOCKS)[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    value = tl.load(weight + first * BLOCKSIZE + element, mask=element < n - first * BLOCKSIZE, other=0.0).to(
        tl.float32
    )
    if GIVEN:
        scale = tl.load(absmax + block, mask=block * BLOCKSIZE < n, other=0.0)
        inverse = tl.where(tl.abs(scale) > tl.cast(tiny, tl.float32), tl.div_rn(1.0, scale), 0.0)
    else:
        # As integers, magnitudes order like the numbers, and a NaN is the largest: it must reach the maximum.
        scale = tl.max(tl.abs(value).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
        tl.store(absmax + block, scale, mask=block * BLOCKSIZE < n)
        inverse = tl.div_rn(1.0, tl.maximum(scale, tl.cast(tiny, tl.float32)))
    scaled = tl.minimum(tl.maximum(value * inverse[:, None], -1.0), 1.0)
    pair = tl.reshape(_count_below(scaled, midpoints, 4), [BLOCKS * BLOCKSIZE // 2, 2])
    high, low = tl.split(pair)  # past the end stands 0.0, code 7: the pad nibble
    at = tl.arange(0, BLOCKS * BLOCKSIZE // 2)
    tl.store(
        packed + first * BLOCKSIZE // 2 + at, (high << 4 | low).to(tl.uint8), mask=at < bytes - first * BLOCKSIZE // 2
    )


@triton.jit
def encode_blocks_kernel(
    codes,
    maxima,
    values,
    offset,
    midpoints,
    n,
    tiny,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Values (less the offset, if there is one: double quantization), in blocks, to an 8-bit dynamic map."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    element = block.to(tl.int64)[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside = element < n
    value = tl.load(values + element, mask=inside, other=0.0)
    if OFFSET:
        value = tl.where(inside, value - tl.load(offset), 0.0)
    largest = tl.max(tl.abs(value), axis=1)
    tl.store(maxima + block, largest, mask=block.to(tl.int64) * BLOCKSIZE < n)
    scaled = value * tl.div_rn(1.0, tl.maximum(largest, tl.cast(tiny, tl.float32)))[:, None]
    code = _count_below(tl.minimum(tl.maximum(scaled, -1.0), 1.0), midpoints, 8)
    tl.store(codes + element, code.to(tl.uint8), mask=inside)


@triton.jit
def _lane_sum(lanes, BLOCKS: tl.constexpr):
    """Sums of [BLOCKS, 16] by halves, the order of `reference._lane_sum`."""
    for step in tl.static_range(4):
        left, right = tl.split(tl.permute(tl.reshape(lanes, [BLOCKS, 2, 8 >> step]), [0, 2, 1]))
        lanes = left + right
    return tl.reshape(lanes, [BLOCKS])


@triton.jit
def fit_scales_kernel(
    scales, weight, levels, midpoints, stretches, candidates, n, tiny, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    """For each block the scale of least squared error among the candidates, refined: see `reference.fit_scales_nf4`."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    lane = block[:, None] * BLOCKSIZE + tl.arange(0, 16)[None, :]
    bits = tl.zeros([BLOCKS, 16], tl.int32)
    for row in range(BLOCKSIZE // 16):
        value = tl.load(weight + lane + row * 16, mask=lane + row * 16 < n, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, tl.abs(value).to(tl.int32, bitcast=True))
    absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, tl.maximum(absmax, tl.cast(tiny, tl.float32)))
    finite = tl.max(bits, axis=1) < 0x7F800000
    factor = tl.full([BLOCKS], 1.0, tl.float32)
    best = tl.full([BLOCKS], -1.0, tl.float32)
    for candidate in range(candidates):
        stretch = tl.load(stretches + candidate)
        wl = tl.zeros([BLOCKS, 16], tl.float32)
        ll = tl.zeros([BLOCKS, 16], tl.float32)
        for row in range(BLOCKSIZE // 16):
            value = (
                tl.load(weight + lane + row * 16, mask=lane + row * 16 < n, other=0.0).to(tl.float32) * inverse[:, None]
            )
            nearest = tl.load(levels + _count_below(tl.minimum(tl.maximum(value * stretch, -1.0), 1.0), midpoints, 4))
            wl += value * nearest
            ll += nearest * nearest
        w, l = _lane_sum(wl, BLOCKS), _lane_sum(ll, BLOCKS)
        safe = tl.where(l > 0, l, 1.0)
        gain = tl.div_rn(w * w, safe)
        better = (l > 0) & (gain > best) & finite
        best = tl.where(better, gain, best)
        factor = tl.where(better, tl.div_rn(w, safe), factor)
    tl.store(scales + block, absmax * factor, mask=block * BLOCKSIZE < n)


# ---------------------------------------------------------------- as operators: see ops.py for what they mean


def cdiv(n: int, size: int) -> int:
    """How many pieces of `size` make n. Triton's own takes 1.3 us, a tenth of a launch."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest one from n on."""
    return 1 << (n - 1).bit_length()


def on(tensor: Tensor):
    """Triton launches on the current device; make that the one of `tensor`."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Zeros int32 [count or more] for `last_of`, which leaves zeros. Each stream has its own: kernels at the same time
    must not share them.
    """
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    if key not in _counters or len(_counters[key]) < count:
        _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return _counters[key]


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return reference.nf4_levels(device), reference.dynamic_map(device)


def _constants(packed, absmax, nested_absmax, nested_offset, n: int, blocksize: int, nested_blocksize: int):
    """The parts as the kernels take them, or None where they do not (the sizes are checked: a kernel would read past
    the end).
    """
    nested = nested_absmax is not None
    blocks = -(-n // blocksize)
    takes = (
        blocksize in BLOCKSIZES
        and all(part.is_contiguous() for part in (packed, absmax))
        and packed.dtype == torch.uint8
        and packed.numel() >= (n + 1) // 2
        and absmax.numel() >= blocks
        and absmax.dtype == (torch.uint8 if nested else torch.float32)
        and (not nested or (nested_absmax.numel() >= -(-blocks // nested_blocksize) and nested_absmax.is_contiguous()))
        and (not nested or nested_absmax.dtype == nested_offset.dtype == torch.float32)
    )
    if not takes:
        return None
    return (packed, absmax, nested_absmax, nested_offset) if nested else (packed, absmax, absmax, absmax)


def dequantize_nf4(
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    row_gain,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    dequantize_nf4_into(out, packed, absmax, nested_absmax, nested_offset, row_gain, blocksize, nested_blocksize)
    return out


def dequantize_nf4_into(
    out, packed, absmax, nested_absmax, nested_offset, row_gain, blocksize: int, nested_blocksize: int
) -> None:
    rows, columns = out.shape
    n = rows * columns
    parts = _constants(packed, absmax, nested_absmax, nested_offset, n, blocksize, nested_blocksize)
    if parts is None or out.dtype not in DTYPES or not out.is_contiguous() or n == 0:
        return reference.dequantize_nf4_into(
            out, packed, absmax, nested_absmax, nested_offset, row_gain, blocksize, nested_blocksize
        )
    if row_gain is not None:
        if row_gain.numel() != rows:
            raise ValueError(f"row_gain holds {row_gain.numel()} values for {rows} rows")
        row_gain = row_gain.float().contiguous()
    gain = 0 if row_gain is None else 1 if columns % blocksize == 0 else 2
    reference.count_write(out)
    with on(out):
        dequantize_kernel[(cdiv(n, WORDS * 8),)](
            out,
            *parts,
            parts[1] if row_gain is None else row_gain,
            *_tables(out.device),
            n,
            (n + 1) // 2,
            columns,
            BLOCKSIZE=blocksize,
            NESTED_BLOCKSIZE=nested_blocksize if nested_absmax is not None else 0,
            GAIN=gain,
            WORDS=WORDS,
            **EXACT,
        )


def nf4_gemv(
    x, packed, absmax, nested_absmax, nested_offset, rows: int, columns: int, blocksize: int, nested_blocksize: int
) -> Tensor:
    parts = _constants(packed, absmax, nested_absmax, nested_offset, rows * columns, blocksize, nested_blocksize)
    if parts is None or columns % blocksize or x.dtype not in DTYPES:
        return reference.nf4_gemv(
            x, packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize
        )
    x = x.contiguous()
    y = torch.empty(rows, dtype=torch.float32, device=x.device)
    with on(y):
        gemv_kernel[(cdiv(rows, 4),)](
            y,
            x,
            *parts,
            *_tables(x.device),
            rows,
            columns,
            rows * columns // 2,
            BLOCKSIZE=blocksize,
            NESTED_BLOCKSIZE=nested_blocksize if nested_absmax is not None else 0,
            ROWS=4,
            WORDS=128,
            **FUSED,
        )
    return y


def row_norms_nf4(
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    A,
    B,
    scaling: float,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    rank = A.shape[0]
    parts = _constants(packed, absmax, nested_absmax, nested_offset, rows * columns, blocksize, nested_blocksize)
    if parts is None or A.dtype != torch.float32 or B.dtype != torch.float32 or columns % blocksize or rank > MAX_RANK:
        return _row_norms_by_chunks(
            packed, absmax, nested_absmax, nested_offset, A, B, scaling, rows, columns, blocksize, nested_blocksize
        )
    if A.shape != (rank, columns) or B.shape != (rows, rank):
        raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a weight of {rows} x {columns}")
    A, B = A.contiguous(), B.contiguous()
    grid, sizes, options = _norms_grid(
        rows, columns, rank, blocksize, nested_blocksize if nested_absmax is not None else 0
    )
    sums = torch.empty(grid[1], rows, dtype=torch.float32, device=A.device)
    n = torch.empty(rows, dtype=torch.float32, device=A.device)
    with on(n):
        row_norms_kernel[grid](
            n, sums, counters(A.device, grid[0]), *parts, A, B, *_tables(A.device), scaling, *sizes, **options
        )
    return n


def _norms_grid(rows: int, columns: int, rank: int, blocksize: int, nested_blocksize: int) -> tuple[tuple, tuple, dict]:
    """Grid, sizes and options of the kernels of row norms: the same for a layer alone and among others, so that the
    bits are the same.
    """
    groups, words = cdiv(rows, 64), columns // 8
    share = 16 * cdiv(words, 16 * min(32, max(1, PROGRAMS // groups)))
    return (
        (groups, cdiv(words, share)),
        (rows, columns, rows * columns // 2, rank, share),
        {
            "BLOCKSIZE": blocksize,
            "NESTED_BLOCKSIZE": nested_blocksize,
            # One stage: pipelined, registers would spill. Contracted: the last bit of a scale is nothing in a sum of
            # thousands.
            "ROWS": 64,
            "WORDS": 8 if rank <= 32 else 4,
            "RANK": max(16, power_of_2(rank)),
            "num_stages": 1,
            **FUSED,
        },
    )


def row_norms_nf4_all(
    packed, absmax, nested_absmax, nested_offset, A, B, scaling, rows, columns, blocksizes, nested_blocksize: int
) -> list[Tensor]:
    """`row_norms_nf4` of many layers, lists of its arguments (those of double quantization empty where there is none):
    a launch for all of one shape. A 7B then takes three, where 224 take 5 ms of Python.
    """
    constants = list(zip(nested_absmax, nested_offset, strict=True)) if nested_absmax else [(None, None)] * len(packed)
    alike: dict[tuple, list[int]] = {}
    found: list[Tensor | None] = [None] * len(packed)
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        parts = _constants(packed[i], absmax[i], *constants[i], rows[i] * columns[i], blocksizes[i], nested_blocksize)
        together = (
            parts is not None
            and columns[i] % blocksizes[i] == 0
            and a.shape[0] <= MAX_RANK
            and all(t.dtype == torch.float32 and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (a, b))
            and packed[i].data_ptr() % 16 == 0
            and a.shape[1] == columns[i]
            and b.shape == (rows[i], a.shape[0])
        )
        if together:
            alike.setdefault((a.device, rows[i], columns[i], a.shape[0], blocksizes[i]), []).append(i)
        else:
            found[i] = row_norms_nf4(
                packed[i],
                absmax[i],
                *constants[i],
                a,
                b,
                scaling[i],
                rows[i],
                columns[i],
                blocksizes[i],
                nested_blocksize,
            )
    for (device, count, width, rank, blocksize), members in alike.items():
        grid, sizes, options = _norms_grid(count, width, rank, blocksize, nested_blocksize if nested_absmax else 0)
        tensors = [
            (packed[i], absmax[i], *(part if part is not None else absmax[i] for part in constants[i]), A[i], B[i])
            for i in members
        ]
        table = torch.tensor([[part.data_ptr() for part in parts] for parts in tensors]).to(device, non_blocking=True)
        scalings = torch.tensor([float(scaling[i]) for i in members]).to(device, non_blocking=True)
        sums = torch.empty(len(members), grid[1], count, dtype=torch.float32, device=device)
        n = torch.empty(len(members), count, dtype=torch.float32, device=device)
        with on(n):
            row_norms_all_kernel[(*grid, len(members))](
                n, sums, counters(device, len(members) * grid[0]), table, scalings, *_tables(device), *sizes, **options
            )
        for i, norms in zip(members, n.unbind(), strict=True):
            found[i] = norms
    return found


def _row_norms_by_chunks(
    packed, absmax, nested_absmax, nested_offset, A, B, scaling, rows, columns, blocksize, nested_blocksize
) -> Tensor:
    """Large ranks and float64: decode to float32, a piece at a time, and leave the products to cuBLAS. Odd widths: the
    reference.
    """
    if columns % blocksize:
        return reference.row_norms_nf4(
            packed, absmax, nested_absmax, nested_offset, A, B, scaling, rows, columns, blocksize, nested_blocksize
        )
    scales = reference.decode_absmax(absmax, nested_absmax, nested_offset, nested_blocksize).view(rows, -1)
    codes = packed.view(rows, -1)
    step = max(1, (1 << 24) // columns)
    parts = (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def decoded(part: slice) -> Tensor:
        count = part.stop - part.start
        return dequantize_nf4(
            codes[part], scales[part], None, None, None, count, columns, blocksize, nested_blocksize, torch.float32
        )

    return reference.row_norms(((part, decoded(part).to(A.dtype)) for part in parts), A, B, scaling)


def quantize_nf4(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    if weight.dtype not in DTYPES or blocksize not in BLOCKSIZES or weight.numel() == 0:
        return reference.quantize_nf4(weight, blocksize)
    absmax = torch.empty(-(-weight.numel() // blocksize), dtype=torch.float32, device=weight.device)
    return _encode(weight, absmax, blocksize, given=False), absmax


def encode_nf4(weight: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    blocks = -(-weight.numel() // blocksize)
    if (
        weight.dtype not in DTYPES
        or blocksize not in BLOCKSIZES
        or scales.dtype != torch.float32
        or weight.numel() == 0
    ):
        return reference.encode_nf4(weight, scales, blocksize)
    if scales.numel() != blocks:
        raise ValueError(f"{scales.numel()} scales for {blocks} blocks")
    return _encode(weight, scales.contiguous(), blocksize, given=True)


def _encode(weight: Tensor, absmax: Tensor, blocksize: int, given: bool) -> Tensor:
    weight, n = weight.contiguous(), weight.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    midpoints = reference._midpoints(weight.device, nested=False)
    with on(packed):
        quantize_kernel[(cdiv(n, TILE),)](
            packed,
            absmax,
            weight,
            midpoints,
            n,
            packed.numel(),
            reference.TINY,
            BLOCKSIZE=blocksize,
            BLOCKS=TILE // blocksize,
            GIVEN=given,
            **EXACT,
        )
    return packed


def fit_scales_nf4(weight: Tensor, blocksize: int) -> Tensor:
    if weight.dtype not in DTYPES or blocksize not in BLOCKSIZES or weight.numel() == 0:
        return reference.fit_scales_nf4(weight, blocksize)
    weight, n, device = weight.contiguous(), weight.numel(), weight.device
    scales = torch.empty(-(-n // blocksize), dtype=torch.float32, device=device)
    stretches = torch.tensor([32.0 / candidate for candidate in reference.FIT], device=device)
    with on(scales):
        fit_scales_kernel[(cdiv(scales.numel(), 64),)](
            scales,
            weight,
            reference.nf4_levels(device),
            reference._midpoints(device, nested=False),
            stretches,
            len(reference.FIT),
            n,
            reference.TINY,
            BLOCKSIZE=blocksize,
            BLOCKS=64,
            **EXACT,
        )
    return scales


def quantize_absmax(absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or nested_blocksize not in BLOCKSIZES or absmax.numel() == 0:
        return reference.quantize_absmax(absmax, nested_blocksize)
    absmax, n = absmax.contiguous(), absmax.numel()
    offset = absmax.mean()
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested = torch.empty(-(-n // nested_blocksize), dtype=torch.float32, device=absmax.device)
    with on(codes):
        encode_blocks_kernel[(cdiv(n, TILE),)](
            codes,
            nested,
            absmax,
            offset,
            reference._midpoints(absmax.device, nested=True),
            n,
            reference.TINY,
            BLOCKSIZE=nested_blocksize,
            BLOCKS=TILE // nested_blocksize,
            OFFSET=True,
            **EXACT,
        )
    return codes, nested, offset

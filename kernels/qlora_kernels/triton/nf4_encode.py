"""Quantizing in Triton: weights to 4-bit codes and scales, scales and moments to 8-bit codes.

    quantize, encode   a program takes whole blocks: their largest magnitudes, or given scales, and the nearest levels
    fit_scales         a program searches the scales of 64 blocks, and reads their weights again for each candidate
    encode_blocks      the 8-bit codes of double quantization, and of an optimizer's moments (`optim`)

A code is found by halving among the midpoints of the levels, in 4 or 8 steps; the alternative, comparing with each of
them, takes 15 or 255. All is compiled without contraction (EXACT): codes are the reference's, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qlora_kernels import reference
from qlora_kernels.triton.common import BLOCKSIZES, DTYPES, EXACT, cdiv, on

TILE = 4096  # weights that a program quantizes


@triton.jit
def count_below(value, midpoints, BITS: tl.constexpr):
    """How many of the 2^BITS - 1 ascending midpoints are less than each value: its code, ties to the lower one."""
    code = tl.zeros(value.shape, tl.int32)
    for step in tl.static_range(BITS):
        middle = tl.load(midpoints + code + ((1 << (BITS - 1 - step)) - 1))
        code = tl.where(middle < value, code + (1 << (BITS - 1 - step)), code)
    return code


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
    value = tl.load(weight + first * BLOCKSIZE + element, mask=element < n - first * BLOCKSIZE, other=0.0)
    value = value.to(tl.float32)
    if GIVEN:
        scale = tl.load(absmax + block, mask=block * BLOCKSIZE < n, other=0.0)
        inverse = tl.where(tl.abs(scale) > tl.cast(tiny, tl.float32), tl.div_rn(1.0, scale), 0.0)
    else:
        # As integers, magnitudes order like the numbers, and a NaN is the largest: it must reach the maximum.
        scale = tl.max(tl.abs(value).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
        tl.store(absmax + block, scale, mask=block * BLOCKSIZE < n)
        inverse = tl.div_rn(1.0, tl.maximum(scale, tl.cast(tiny, tl.float32)))
    scaled = tl.minimum(tl.maximum(value * inverse[:, None], -1.0), 1.0)
    pair = tl.reshape(count_below(scaled, midpoints, 4), [BLOCKS * BLOCKSIZE // 2, 2])
    high, low = tl.split(pair)  # past the end stands 0.0, whose code is the pad nibble
    at = tl.arange(0, BLOCKS * BLOCKSIZE // 2)
    inside = at < bytes - first * BLOCKSIZE // 2
    tl.store(packed + first * BLOCKSIZE // 2 + at, (high << 4 | low).to(tl.uint8), mask=inside)


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
    code = count_below(tl.minimum(tl.maximum(scaled, -1.0), 1.0), midpoints, 8)
    tl.store(codes + element, code.to(tl.uint8), mask=inside)


@triton.jit
def _lane_sum(lanes, BLOCKS: tl.constexpr):
    """Sums of [BLOCKS, 16] by halves, in the order that `reference.nf4` prescribes."""
    for step in tl.static_range(4):
        left, right = tl.split(tl.permute(tl.reshape(lanes, [BLOCKS, 2, 8 >> step]), [0, 2, 1]))
        lanes = left + right
    return tl.reshape(lanes, [BLOCKS])


@triton.jit
def fit_scales_kernel(
    scales, weight, levels, midpoints, stretches, candidates, n, tiny, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    """For each block the scale of least squared error among the candidates, refined: `reference.fit_scales_4bit`."""
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
            value = tl.load(weight + lane + row * 16, mask=lane + row * 16 < n, other=0.0).to(tl.float32)
            value = value * inverse[:, None]
            nearest = tl.load(levels + count_below(tl.minimum(tl.maximum(value * stretch, -1.0), 1.0), midpoints, 4))
            wl += value * nearest
            ll += nearest * nearest
        product, square = _lane_sum(wl, BLOCKS), _lane_sum(ll, BLOCKS)
        divisor = tl.where(square > 0, square, 1.0)
        gain = tl.div_rn(product * product, divisor)
        better = (square > 0) & (gain > best) & finite
        best = tl.where(better, gain, best)
        factor = tl.where(better, tl.div_rn(product, divisor), factor)
    tl.store(scales + block, absmax * factor, mask=block * BLOCKSIZE < n)


_midpoints = WeakTensorKeyDictionary()


def midpoints(levels: Tensor) -> Tensor:
    """`reference.midpoints_of`, kept as long as the levels: a few launches saved for each weight."""
    if levels not in _midpoints:
        _midpoints[levels] = reference.midpoints_of(levels)
    return _midpoints[levels]


def _takes(weight: Tensor, levels: Tensor, blocksize: int) -> bool:
    """Whether the kernels quantize such a weight."""
    fits = levels.dtype == torch.float32 and levels.is_contiguous() and levels.numel() == 16
    return fits and weight.dtype in DTYPES and blocksize in BLOCKSIZES and weight.numel() > 0


def quantize_4bit(weight: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    if not _takes(weight, levels, blocksize):
        return NotImplemented
    absmax = torch.empty(cdiv(weight.numel(), blocksize), dtype=torch.float32, device=weight.device)
    return _encode(weight, levels, absmax, blocksize, given=False), absmax


def encode_4bit(weight: Tensor, levels: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    if not _takes(weight, levels, blocksize) or scales.dtype != torch.float32:
        return NotImplemented
    blocks = cdiv(weight.numel(), blocksize)
    if scales.numel() != blocks:
        raise ValueError(f"{scales.numel()} scales for {blocks} blocks")
    return _encode(weight, levels, scales.contiguous(), blocksize, given=True)


def _encode(weight: Tensor, levels: Tensor, absmax: Tensor, blocksize: int, given: bool) -> Tensor:
    weight, n = weight.contiguous(), weight.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    with on(packed):
        quantize_kernel[(cdiv(n, TILE),)](
            packed,
            absmax,
            weight,
            midpoints(levels),
            n,
            packed.numel(),
            reference.TINY,
            BLOCKSIZE=blocksize,
            BLOCKS=TILE // blocksize,
            GIVEN=given,
            **EXACT,
        )
    return packed


def fit_scales_4bit(weight: Tensor, levels: Tensor, blocksize: int) -> Tensor:
    if not _takes(weight, levels, blocksize):
        return NotImplemented
    weight, n = weight.contiguous(), weight.numel()
    scales = torch.empty(cdiv(n, blocksize), dtype=torch.float32, device=weight.device)
    stretches = torch.tensor([32.0 / candidate for candidate in reference.FIT], device=weight.device)
    with on(scales):
        fit_scales_kernel[(cdiv(scales.numel(), 64),)](
            scales,
            weight,
            levels,
            midpoints(levels),
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
        return NotImplemented
    absmax, n = absmax.contiguous(), absmax.numel()
    offset = absmax.mean()
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested = torch.empty(cdiv(n, nested_blocksize), dtype=torch.float32, device=absmax.device)
    with on(codes):
        encode_blocks_kernel[(cdiv(n, TILE),)](
            codes,
            nested,
            absmax,
            offset,
            midpoints(reference.dynamic_map(absmax.device)),
            n,
            reference.TINY,
            BLOCKSIZE=nested_blocksize,
            BLOCKS=TILE // nested_blocksize,
            OFFSET=True,
            **EXACT,
        )
    return codes, nested, offset

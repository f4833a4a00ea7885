"""Quantized weights in plain PyTorch, byte for byte as bitsandbytes stores them: the specification.

NF4 (QLoRA, arXiv:2305.14314, section 3 and appendix E) and any other codebook of 16 ascending levels:
    codes    weight flattened row-major, blocks of `blocksize`; x = w * (1 / absmax); nearest of the levels, ties to the
             lower code; byte k = code[2k] << 4 | code[2k+1]; the pad nibble of an odd tail is the code of 0 (NF4: 7)
    absmax   largest magnitude of a block, float32; a block of zeros has absmax 0 and the code of 0 throughout
    nested   offset = mean(absmax); (absmax - offset) in blocks of 256 to the signed 8-bit dynamic map
             (arXiv:1511.04561)
    decode   level[code] * (map[q] * nested_absmax + offset), two roundings to float32 in that order, then one to the
             dtype asked for
Work goes by chunks of whole blocks, so that the float32 temporaries stay at a few tens of MB whatever the size of the
weight. The alternative, decoding through an int64 index of every element, costs sixteen times the memory of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from qlora_kernels.reference.common import TINY, chunk_elements, mark_mutated
from qlora_kernels.weight import QuantizedWeight

# Scales tried by `fit_scales_4bit`: absmax * k / 32. absmax itself comes first and is kept where others are no better.
FIT = (32, *range(24, 47))


@functools.cache
def dynamic_map(device: torch.device, signed: bool = True) -> Tensor:
    """The 8-bit dynamic data type, float32 [256], ascending (arXiv:1511.04561; 7 exponent bits).

    Decade 10^(i-6), i = 0..6, is cut into 2^i equal parts of [0.1, 1] and contributes their centres, with both signs;
    unsigned into 2^(i+1). 0 and 1 complete the 256 values.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1, dtype=torch.float32)
        centres = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += centres.tolist() + ((-centres).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def midpoints_of(levels: Tensor) -> Tensor:
    """The borders between neighbouring levels: a value's code is the number of midpoints below it."""
    return (levels[:-1] + levels[1:]) / 2


def _byte_table(levels: Tensor) -> Tensor:
    """float32 [256, 2]: the two levels that a byte stands for, high nibble first."""
    byte = torch.arange(256, device=levels.device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).contiguous()


def _blocks(values: Tensor, blocksize: int) -> Tensor:
    """float32 [blocks, blocksize], zeros behind the last value."""
    return pad(values.float(), (0, -values.numel() % blocksize)).view(-1, blocksize)


def _encode(values: Tensor, blocksize: int, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int32, flat) and block maxima of one chunk of flat float values; the last block may be short."""
    n = values.numel()
    blocks = _blocks(values, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)).clamp_(-1, 1)
    return torch.bucketize(scaled, midpoints, out_int32=True).view(-1)[:n], absmax


def _pack(codes: Tensor, midpoints: Tensor, out: Tensor) -> None:
    """Two codes a byte to the start of `out`; an odd one is followed by the code of 0."""
    zero = int((midpoints < 0).sum()) if codes.numel() % 2 else 0
    codes = pad(codes, (0, codes.numel() % 2), value=zero).to(torch.uint8)
    out[: codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]


def quantize_4bit(weight: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """weight, any shape and float dtype -> packed uint8 [(n+1)//2, 1], absmax float32 [ceil(n / blocksize)]."""
    flat = weight.reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=flat.device)
    midpoints = midpoints_of(levels)
    size = chunk_elements(flat)
    for start in range(0, n, size):
        chunk = flat[start : start + size]
        codes, maxima = _encode(chunk, blocksize, midpoints)
        _pack(codes, midpoints, packed[start // 2 :, 0])
        block = start // blocksize
        absmax[block : block + maxima.numel()] = maxima
    return packed, absmax


def _lane_sum(values: Tensor) -> Tensor:
    """Sums of [blocks, blocksize]: 16 lanes in order, then the lanes in halves, so that every implementation gets the
    same bits.
    """
    lanes = values.view(values.shape[0], -1, 16).unbind(1)
    total = sum(lanes[1:], start=lanes[0])
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total.squeeze(1)


def fit_scales_4bit(weight: Tensor, levels: Tensor, blocksize: int) -> Tensor:
    """weight -> the scale of each block that leaves the least squared error, float32 [ceil(n / blocksize)].

    A candidate scale gives nearest levels l. For those levels the best scale is sum(w l) / sum(l l), and it leaves
    sum(w w) - sum(w l)^2 / sum(l l): the candidate with the largest last term wins. `blocksize` a multiple of 16.
    """
    flat = weight.reshape(-1)
    scales = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=flat.device)
    midpoints = midpoints_of(levels)
    size = chunk_elements(flat)
    for start in range(0, flat.numel(), size):
        blocks = _blocks(flat[start : start + size], blocksize)
        absmax = blocks.abs().amax(dim=1)
        blocks = blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)
        factor = torch.ones_like(absmax)
        best = torch.full_like(absmax, -1.0)
        for candidate in FIT:
            stretched = (blocks * torch.tensor(32.0 / candidate, device=flat.device)).clamp_(-1, 1)
            nearest = levels[torch.bucketize(stretched, midpoints, out_int32=True)]
            wl, ll = _lane_sum(blocks * nearest), _lane_sum(nearest * nearest)
            gain = wl * wl / ll
            better = (ll > 0) & (gain > best) & absmax.isfinite()
            best = torch.where(better, gain, best)
            factor = torch.where(better, wl / ll, factor)
        scales[start // blocksize : start // blocksize + absmax.numel()] = absmax * factor
    return scales


def encode_4bit(weight: Tensor, levels: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """weight, scales float32 [ceil(n / blocksize)] -> packed uint8 [(n+1)//2, 1]: the nearest levels of w * (1 /
    scale).

    For scales that are not absmax, or absmax as double quantization decodes it. A scale below 1e-38 counts as 0 and
    takes the code of 0.
    """
    flat = weight.reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    midpoints = midpoints_of(levels)
    inverse = torch.where(scales.abs() > TINY, 1.0 / scales, 0.0)
    size = chunk_elements(flat)
    for start in range(0, n, size):
        chunk = flat[start : start + size]
        blocks = _blocks(chunk, blocksize)
        block = start // blocksize
        scaled = (blocks * inverse[block : block + blocks.shape[0]].unsqueeze(1)).clamp_(-1, 1)
        codes = torch.bucketize(scaled, midpoints, out_int32=True).view(-1)[: chunk.numel()]
        _pack(codes, midpoints, packed[start // 2 :, 0])
    return packed


def quantize_absmax(absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """absmax float32 [k] -> codes uint8 [k], nested_absmax float32 [ceil(k / nested_blocksize)], offset float32 []."""
    offset = absmax.mean()
    codes, nested = _encode(absmax - offset, nested_blocksize, midpoints_of(dynamic_map(absmax.device)))
    return codes.to(torch.uint8), nested, offset


def decode_absmax(weight: QuantizedWeight) -> Tensor:
    """Block scales float32 [k], from the 8-bit codes of double quantization or as they are."""
    absmax, nested_absmax, nested_offset = weight.absmax, weight.nested_absmax, weight.nested_offset
    if nested_absmax is None or nested_offset is None:
        return absmax
    scale = nested_absmax.repeat_interleave(weight.nested_blocksize)[: absmax.numel()]
    return embedding(absmax.int(), dynamic_map(absmax.device).unsqueeze(1)).squeeze(1) * scale + nested_offset


def _decode(flat: Tensor, table: Tensor, scales: Tensor, start: int, stop: int, blocksize: int) -> Tensor:
    """Elements start..stop as float32; `start` on the border of a block."""
    values = embedding(flat[start // 2 : (stop + 1) // 2].int(), table).view(-1)
    scale = scales[start // blocksize : -(-stop // blocksize)].unsqueeze(1)
    values = pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize) * scale
    return values.view(-1)[: stop - start]


def dequantize_4bit(weight: list[Tensor], layout: list[int], row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """-> dense [rows, columns] in `dtype`. `row_scale` [rows] multiplies the block scales of its row before the level
    is applied; where a block crosses rows, or in float64, it multiplies the decoded float32 value instead.
    """
    w = QuantizedWeight(weight, layout)
    (rows, columns), blocksize, flat, table = w.shape, w.blocksize, w.packed.view(-1), _byte_table(w.levels)
    n = rows * columns
    scales = decode_absmax(w)
    if row_scale is not None and dtype != torch.float64:
        row_scale = row_scale.float()
    folded = columns % blocksize == 0 and dtype != torch.float64
    if row_scale is not None and folded:
        scales = (scales.view(rows, -1) * row_scale.unsqueeze(1)).view(-1)
    out = torch.empty(n, dtype=dtype, device=flat.device)
    size = chunk_elements(flat)
    for start in range(0, n, size):
        stop = min(start + size, n)
        values = _decode(flat, table, scales, start, stop, blocksize)
        if row_scale is not None and not folded:
            values = values * row_scale[torch.arange(start, stop, device=flat.device) // columns]
        out[start:stop] = values
    return out.view(rows, columns)


def dequantize_4bit_into(out: Tensor, weight: list[Tensor], layout: list[int], row_scale: Tensor | None) -> None:
    """`dequantize_4bit` to `out` [rows, columns], in its dtype."""
    mark_mutated(out)
    out.copy_(dequantize_4bit(weight, layout, row_scale, out.dtype))


def dequantize_4bit_joined(
    weights: list[Tensor], layouts: list[int], row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`dequantize_4bit` of weights of one width, below each other: parts and layouts of all in one list each."""
    split = list(zip(*split_weights(weights, layouts), strict=True))
    rows = [layout[0] for _, layout in split]
    scales: list[Tensor | None] = [None] * len(split) if row_scale is None else list(row_scale.split(rows))
    return torch.cat([dequantize_4bit(*weight, scale, dtype) for weight, scale in zip(split, scales, strict=True)])


def split_weights(weights: list[Tensor], layouts: list[int]) -> tuple[list[list[Tensor]], list[list[int]]]:
    """Parts and layouts by weight, from the flat lists of several weights, which all have as many parts."""
    size = 4 * len(weights) // max(1, len(layouts))
    parts = [weights[i : i + size] for i in range(0, len(weights), max(1, size))]
    return parts, [layouts[i : i + 4] for i in range(0, len(layouts), 4)]


def decoded_rows(weight: QuantizedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W[rows] in `dtype`) a chunk at a time; a chunk may begin inside a block."""
    (rows, columns), blocksize = weight.shape, weight.blocksize
    scales, table, flat = decode_absmax(weight), _byte_table(weight.levels), weight.packed.view(-1)
    step = max(1, chunk_elements(flat) // columns)
    for row in range(0, rows, step):
        part = slice(row, min(row + step, rows))
        start, stop = part.start * columns, part.stop * columns
        before = start % blocksize
        values = _decode(flat, table, scales, start - before, stop, blocksize)[before:]
        yield part, values.view(-1, columns).to(dtype)


def gemv_4bit(x: Tensor, weight: list[Tensor], layout: list[int]) -> Tensor:
    """x [columns] -> W x [rows], of a weight that is never rounded: decoded, multiplied and summed in float32 (float64
    for such x).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return dequantize_4bit(weight, layout, None, dtype) @ x.to(dtype)


def matmul_4bit(
    x: Tensor, weight: list[Tensor], layout: list[int], row_scale: Tensor | None, transposed: bool
) -> Tensor:
    """x [tokens, columns] -> x W't [tokens, rows], W' = diag(row_scale) W; not transposed: x [tokens, rows] -> x W'
    [tokens, columns].
    """
    dense = dequantize_4bit(weight, layout, row_scale, x.dtype)
    return x @ (dense.t() if transposed else dense)

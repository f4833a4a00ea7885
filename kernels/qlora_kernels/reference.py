"""Every operator in plain PyTorch, computed in float32: the specification, and the fallback on every device.

NF4 (QLoRA, arXiv:2305.14314, section 3 and appendix E), byte for byte as bitsandbytes stores it:
    codes    weight flattened row-major, blocks of `blocksize`; x = w * (1 / absmax); nearest of 16 levels, ties to the lower
             code; byte k = code[2k] << 4 | code[2k+1]; the pad nibble of an odd tail is 7 (the level 0)
    absmax   largest magnitude of a block, float32; a block of zeros has absmax 0 and code 7 throughout
    nested   offset = mean(absmax); (absmax - offset) in blocks of 256 to the signed 8-bit dynamic map (arXiv:1511.04561)
    decode   level[code] * (map[q] * nested_absmax + offset), two roundings to float32 in that order, then one to `dtype`
Work goes by chunks of whole blocks, so that the float32 temporaries stay at a few tens of MB whatever the size of the weight.
The alternative, decoding through an int64 index of every element, costs sixteen times the memory of the result.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21  # a multiple of every block size; float32 temporaries of 8 MB
TINY = 1e-38  # smaller block maxima are treated as this one, so that 1 / absmax stays finite

# Quantiles of N(0, 1) between 1 - 0.9677083 and 0.9677083, scaled to [-1, 1], with an exact zero. tests derive them.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.cache
def nf4_levels(device: torch.device) -> Tensor:
    """The 16 levels, float32 [16], on `device`."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """The signed 8-bit dynamic data type, float32 [256], ascending (arXiv:1511.04561; 7 exponent bits).

    Decade 10^(i-6), i = 0..6, is cut into 2^i equal parts of [0.1, 1] and contributes their centres, with both signs;
    0 and 1 complete the 256 values.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2.0
        values += ((10 ** (i - 6)) * centres).tolist() + (-(10 ** (i - 6)) * centres).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def _midpoints(device: torch.device, nested: bool) -> Tensor:
    levels = dynamic_map(device) if nested else nf4_levels(device)
    return (levels[:-1] + levels[1:]) / 2


@functools.cache
def _byte_table(device: torch.device) -> Tensor:
    """float32 [256, 2]: the two levels that a byte stands for, high nibble first."""
    levels = nf4_levels(device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).contiguous()


def _encode(values: Tensor, blocksize: int, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int32, flat) and block maxima of one chunk of flat float values; the last block may be short."""
    n = values.numel()
    short = -n % blocksize
    blocks = torch.nn.functional.pad(values.float(), (0, short)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)).clamp_(-1, 1)
    return torch.bucketize(scaled, midpoints, out_int32=True).view(-1)[:n], absmax


def quantize_nf4(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """weight, any shape and float dtype -> packed uint8 [(n+1)//2, 1], absmax float32 [ceil(n / blocksize)]."""
    flat = weight.reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=flat.device)
    midpoints = _midpoints(flat.device, nested=False)
    for start in range(0, n, CHUNK_ELEMENTS):
        chunk = flat[start : start + CHUNK_ELEMENTS]
        codes, maxima = _encode(chunk, blocksize, midpoints)
        if codes.numel() % 2:
            codes = torch.nn.functional.pad(codes, (0, 1), value=7)
        codes = codes.to(torch.uint8)
        half = start // 2
        packed[half : half + codes.numel() // 2, 0] = (codes[::2] << 4) | codes[1::2]
        block = start // blocksize
        absmax[block : block + maxima.numel()] = maxima
    return packed, absmax


def quantize_absmax(absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """absmax float32 [k] -> codes uint8 [k], nested_absmax float32 [ceil(k / nested_blocksize)], offset float32 []."""
    offset = absmax.mean()
    codes, nested = _encode(absmax - offset, nested_blocksize, _midpoints(absmax.device, nested=True))
    return codes.to(torch.uint8), nested, offset


def decode_absmax(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, nested_blocksize: int) -> Tensor:
    """Block scales float32 [k], from the 8-bit codes of double quantization or as they are."""
    if nested_absmax is None:
        return absmax
    scale = nested_absmax.repeat_interleave(nested_blocksize)[: absmax.numel()]
    return torch.nn.functional.embedding(absmax.int(), dynamic_map(absmax.device).unsqueeze(1)).squeeze(1) * scale + nested_offset


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    row_gain: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """-> dense [rows, columns] in `dtype`. `row_gain` [rows] multiplies the block scales of its row before the level is
    applied; where a block crosses rows, or in float64, it multiplies the decoded float32 value instead."""
    n = rows * columns
    scales = decode_absmax(absmax, nested_absmax, nested_offset, nested_blocksize)
    gain_in_scales = columns % blocksize == 0 and dtype != torch.float64
    if row_gain is not None and gain_in_scales:
        scales = (scales.view(rows, -1) * row_gain.float().unsqueeze(1)).view(-1)
    table = _byte_table(packed.device)
    flat = packed.view(-1)
    out = torch.empty(n, dtype=dtype, device=packed.device)
    for start in range(0, n, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, n)
        values = torch.nn.functional.embedding(flat[start // 2 : (stop + 1) // 2].int(), table).view(-1)
        scale = scales[start // blocksize : -(-stop // blocksize)].unsqueeze(1)
        short = -values.numel() % blocksize
        values = torch.nn.functional.pad(values, (0, short)).view(-1, blocksize) * scale
        values = values.view(-1)[: stop - start]
        if row_gain is not None and not gain_in_scales:
            row = torch.arange(start, stop, device=packed.device) // columns
            values = values * row_gain[row]
        out[start:stop] = values
    return out.view(rows, columns)

"""Quantized weights by bitsandbytes' own kernels: the same bytes, the same values.

Block scales are decoded as the reference does, and a row scale goes into them. bitsandbytes takes over where the work
is, a whole weight in one launch. The alternative, its fused variants, decode the scales as well, but know no row scale.
Taken are NF4 weights whose width is a multiple of the block size: for others its CPU kernel reads wrong values, and
elsewhere it compiles anew for each.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.weight import FORMATS, QuantizedWeight, levels_of

BLOCKSIZES = frozenset((64, 128, 256, 512, 1024))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NF4 = FORMATS["nf4"]


@functools.cache
def _operators() -> torch._ops._OpNamespace:

    return torch.ops.bitsandbytes


def _is_nf4(levels: Tensor) -> bool:
    """By identity: all NF4 weights on a device share their levels, and comparing values would wait for the device."""
    return levels is levels_of(NF4.name, levels.device)


def quantize_4bit(weight: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    fits = weight.dtype in DTYPES and blocksize in BLOCKSIZES and weight.dim() == 2 and weight.shape[1] % blocksize == 0
    if not fits or not _is_nf4(levels):
        return NotImplemented
    packed, absmax = _operators().quantize_4bit(weight.contiguous(), blocksize, NF4.quant_type, torch.uint8)
    return packed.view(-1, 1), absmax.float()


def dequantize_4bit(weight: list[Tensor], layout: list[int], row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    w = QuantizedWeight(weight, layout)
    (rows, columns), blocksize = w.shape, w.blocksize
    fits = dtype in DTYPES and blocksize in BLOCKSIZES and columns % blocksize == 0 and rows * columns > 0
    if not fits or not _is_nf4(w.levels):
        return NotImplemented
    scales = reference.decode_absmax(w)
    if row_scale is not None:
        scales = (scales.view(rows, -1) * row_scale.float().unsqueeze(1)).view(-1)
    packed = w.packed.view(-1, 1)
    return _operators().dequantize_4bit(packed, scales, blocksize, NF4.quant_type, [rows, columns], dtype)


def dequantize_4bit_into(out: Tensor, weight: list[Tensor], layout: list[int], row_scale: Tensor | None) -> None:
    dense = dequantize_4bit(weight, layout, row_scale, out.dtype)
    if dense is NotImplemented:
        return NotImplemented
    reference.mark_mutated(out)
    out.copy_(dense)
    return None

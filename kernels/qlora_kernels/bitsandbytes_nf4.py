"""bitsandbytes' operators as a backend, for accelerators that neither our Triton kernels nor our native CPU library
knows.

Same bytes, same values: block scales are decoded as the reference does, and a row gain goes into them. bitsandbytes
takes over where the work is (a whole weight in one launch); its fused variants are left alone. Taken only are widths
that are a multiple of the block
size: for others its CPU kernel reads wrong values, and elsewhere it compiles anew for 20 seconds. Those go to the
reference.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qlora_kernels import reference

BLOCKSIZES = frozenset((64, 128, 256, 512, 1024))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _operators():
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes; slow, so only when one is needed

    return torch.ops.bitsandbytes


def quantize_nf4(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    if weight.dtype not in DTYPES or blocksize not in BLOCKSIZES or weight.dim() != 2 or weight.shape[1] % blocksize:
        return reference.quantize_nf4(weight, blocksize)
    packed, absmax = _operators().quantize_4bit(weight.contiguous(), blocksize, "nf4", torch.uint8)
    return packed.view(-1, 1), absmax.float()


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
    if dtype not in DTYPES or blocksize not in BLOCKSIZES or columns % blocksize or rows * columns == 0:
        return reference.dequantize_nf4(
            packed, absmax, nested_absmax, nested_offset, row_gain, rows, columns, blocksize, nested_blocksize, dtype
        )
    scales = reference.decode_absmax(absmax, nested_absmax, nested_offset, nested_blocksize)
    if row_gain is not None:
        scales = (scales.view(rows, -1) * row_gain.float().unsqueeze(1)).view(-1)
    return _operators().dequantize_4bit(packed.view(-1, 1), scales, blocksize, "nf4", [rows, columns], dtype)


def dequantize_nf4_into(
    out, packed, absmax, nested_absmax, nested_offset, row_gain, blocksize: int, nested_blocksize: int
) -> None:
    reference.count_write(out)
    out.copy_(
        dequantize_nf4(
            packed, absmax, nested_absmax, nested_offset, row_gain, *out.shape, blocksize, nested_blocksize, out.dtype
        )
    )

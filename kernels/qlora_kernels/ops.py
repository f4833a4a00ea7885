"""Every operator once: its schema, its shape function, and which code runs where.

    torch.ops.qlora.quantize_nf4    weight -> (packed, absmax)
    torch.ops.qlora.quantize_absmax absmax -> (codes, nested_absmax, offset)          double quantization
    torch.ops.qlora.dequantize_nf4  packed, constants [, row_gain] -> dense

The default implementation of each is `reference.py`; a faster kernel registers itself for a device with
`OPERATOR.register_kernel("cpu")(function)` and no caller changes. The alternative, a Python `if device` at each call site, would
let the paths drift apart and hides the operators from `torch.compile` and `opcheck`.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from qlora_kernels import reference


@torch.library.custom_op("qlora::quantize_nf4", mutates_args=())
def quantize_nf4(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_nf4(weight, blocksize)


@quantize_nf4.register_fake
def _(weight, blocksize):
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, 1, dtype=torch.uint8)
    return packed, weight.new_empty(-(-n // blocksize), dtype=torch.float32)


@torch.library.custom_op("qlora::quantize_absmax", mutates_args=())
def quantize_absmax(absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quantize_absmax(absmax, nested_blocksize)


@quantize_absmax.register_fake
def _(absmax, nested_blocksize):
    nested = absmax.new_empty(-(-absmax.numel() // nested_blocksize))
    return torch.empty_like(absmax, dtype=torch.uint8), nested, absmax.new_empty(())


@torch.library.custom_op("qlora::dequantize_nf4", mutates_args=())
def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],  # custom_op infers its schema from these hints and does not read `Tensor | None`
    nested_offset: Optional[Tensor],
    row_gain: Optional[Tensor],
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    return reference.dequantize_nf4(
        packed, absmax, nested_absmax, nested_offset, row_gain, rows, columns, blocksize, nested_blocksize, dtype
    )


@dequantize_nf4.register_fake
def _(packed, absmax, nested_absmax, nested_offset, row_gain, rows, columns, blocksize, nested_blocksize, dtype):
    return packed.new_empty(rows, columns, dtype=dtype)


def backends() -> dict[str, str]:
    """Which code runs the operators, by device type, in words (for `qlora doctor`)."""
    return {"cpu": "reference (plain PyTorch)", "cuda": "reference (plain PyTorch)"}

"""The remaining Triton kernels: DoRA's reduction over tokens.

    column_dots   sum_t a[t, j] * b[t, j] in float32. Two stages, so that narrow matrices fill a card: each program sums a tile of
                  columns over its share of the tokens, then torch adds the shares. No atomics, so every run gives the same bits.

`(a * b).sum(0)` in PyTorch writes and reads the product once more and sums bf16 products that are already rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.triton_nf4 import DTYPES, on

SHARE = 128  # tokens that a program sums


@triton.jit
def column_dots_kernel(
    out, a, b, tokens, columns, a_stride, b_stride,
    SHARE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [share, column]: the sum over SHARE tokens, TOKENS at a time."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.program_id(1)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, SHARE, TOKENS):
        token = (share * SHARE + start + tl.arange(0, TOKENS)).to(tl.int64)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        x = tl.load(a + token[:, None] * a_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(b + token[:, None] * b_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += x * y
    tl.store(out + share.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)


def column_dots(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in DTYPES or b.dtype != a.dtype or a.shape != b.shape or a.dim() != 2 or a.numel() == 0:
        return reference.column_dots(a, b)
    tokens, columns = a.shape
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    shares = triton.cdiv(tokens, SHARE)
    out = torch.empty(shares, columns, dtype=torch.float32, device=a.device)
    with on(a):
        column_dots_kernel[(triton.cdiv(columns, 128), shares)](
            out, a, b, tokens, columns, a.stride(0), b.stride(0), SHARE=SHARE, TOKENS=16, COLUMNS=128, enable_fp_fusion=True
        )
    return out.sum(0) if shares > 1 else out[0]

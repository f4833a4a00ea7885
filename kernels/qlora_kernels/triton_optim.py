"""Triton kernels of the optimizer's step: AdamW over a flat page, and the block-wise 8-bit code of its moments.

    adamw_               one launch: reads p, g, m, v and writes p, m, v once, where PyTorch's chain makes eight launches and twice the traffic
    encode, decode       a program takes whole blocks; the code of a value is found by halving among the 255 midpoints

Without contraction and with exact division and square root, so that the results are PyTorch's to the last bit or two. A
kernel over a table of pointers, as torch's fused optimizers have it, would save gathering the pieces of a page, but the
table has to be made, sent and kept for every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.triton_nf4 import BLOCKSIZES, EXACT, TILE, cdiv, encode_blocks_kernel, on


@triton.jit
def adamw_kernel(p, g, m, v, weight1, beta2, weight2, eps, decay, step_size, correction, scale, n, BLOCK: tl.constexpr):
    """weight1 = 1 - beta1, weight2 = 1 - beta2; the rest as in `reference.adamw_`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    gradient = tl.load(g + at, mask=inside, other=0.0) * tl.cast(scale, tl.float32)
    first = tl.load(m + at, mask=inside, other=0.0)
    first += tl.cast(weight1, tl.float32) * (gradient - first)
    second = (
        tl.load(v + at, mask=inside, other=0.0) * tl.cast(beta2, tl.float32)
        + tl.cast(weight2, tl.float32) * gradient * gradient
    )
    denominator = tl.div_rn(tl.sqrt_rn(second), tl.zeros_like(second) + tl.cast(correction, tl.float32)) + tl.cast(
        eps, tl.float32
    )
    value = tl.load(p + at, mask=inside, other=0.0) * tl.cast(decay, tl.float32)
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    tl.store(p + at, value - tl.cast(step_size, tl.float32) * tl.div_rn(first, denominator), mask=inside)


@triton.jit
def decode_blocks_kernel(values, codes, absmax, levels, n, BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    tl.store(
        values + at, tl.load(levels + code) * tl.load(absmax + at // BLOCKSIZE, mask=inside, other=0.0), mask=inside
    )


def adamw_(
    p: Sequence[Tensor],
    g: Sequence[Tensor],
    at: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    work: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step_size: float,
    correction: float,
    scale: float,
) -> None:
    n, moments = exp_avg.numel(), (exp_avg, exp_avg_sq)
    if n == 0 or not all(t.dtype == torch.float32 and t.is_contiguous() and t.numel() == n for t in moments):
        return reference.adamw_(p, g, at, *moments, work, beta1, beta2, eps, decay, step_size, correction, scale)
    reference.count_write(p)
    alone = len(p) == 1 and p[0].numel() == n and p[0].dtype == g[0].dtype == torch.float32
    values, gradient = (p[0], g[0]) if alone else work[:2, :n]
    if not alone:
        pieces, places = reference.gathered(p, g, at, values, gradient)
    with on(exp_avg):
        adamw_kernel[(cdiv(n, 1024),)](
            values,
            gradient,
            *moments,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            decay,
            step_size,
            correction,
            scale,
            n,
            BLOCK=1024,
            **EXACT,
        )
    if not alone:
        torch._foreach_copy_(pieces, places)


def _check_blocks(codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int) -> bool:
    """Whether the kernels take these.

    Raises:
        ValueError: the sizes do not fit together.
    """
    n = values.numel()
    if not codes.numel() == n == absmax.numel() * blocksize:
        raise ValueError(f"{codes.numel()} codes and {absmax.numel()} maxima of blocks of {blocksize} for {n} values")
    contiguous = all(t.is_contiguous() for t in (codes, absmax, values))
    return (
        contiguous
        and blocksize in BLOCKSIZES
        and n > 0
        and codes.dtype == torch.uint8
        and values.dtype == absmax.dtype == torch.float32
    )


def encode_blocks_into(
    codes: Tensor, absmax: Tensor, values: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    if not _check_blocks(codes, absmax, values, blocksize):
        return reference.encode_blocks_into(codes, absmax, values, work, blocksize, signed)
    n, midpoints = values.numel(), reference.block_tables(values.device, signed)[1]
    with on(values):
        encode_blocks_kernel[(cdiv(n, TILE),)](
            codes,
            absmax,
            values,
            absmax,
            midpoints,
            n,
            reference.TINY,
            BLOCKSIZE=blocksize,
            BLOCKS=TILE // blocksize,
            OFFSET=False,
            **EXACT,
        )


def decode_blocks_into(
    values: Tensor, codes: Tensor, absmax: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    if not _check_blocks(codes, absmax, values, blocksize):
        return reference.decode_blocks_into(values, codes, absmax, work, blocksize, signed)
    with on(values):
        decode_blocks_kernel[(cdiv(values.numel(), 1024),)](
            values,
            codes,
            absmax,
            reference.block_tables(values.device, signed)[0],
            values.numel(),
            BLOCKSIZE=blocksize,
            BLOCK=1024,
            **EXACT,
        )

"""An optimizer's step in Triton: AdamW over a flat page, and the block-wise 8-bit code of its moments.

    adamw_           one launch: reads p, g, m, v and writes p, m, v once, where PyTorch's chain makes eight launches
                     and twice the traffic
    encode, decode   a program takes whole blocks; the code of a value is found by halving among the 255 midpoints

Without contraction and with exact division and square root, so that the results are PyTorch's to the last bit or two. A
kernel over a table of pointers, as torch's fused optimizers have it, would save gathering the pieces of a page, but the
table has to be made, sent and kept for every step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.triton.common import BLOCKSIZES, EXACT, cdiv, on
from qlora_kernels.triton.nf4_encode import TILE, encode_blocks_kernel


@triton.jit
def adamw_kernel(p, g, m, v, numbers, n, BLOCK: tl.constexpr):
    """`numbers`: 1 - beta1, beta2, 1 - beta2, eps, decay, step_size, correction, scale, as in `reference.adamw_`."""
    weight1, beta2, weight2, eps, decay, step_size, correction, scale = numbers
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    gradient = tl.load(g + at, mask=inside, other=0.0) * tl.cast(scale, tl.float32)
    first = tl.load(m + at, mask=inside, other=0.0)
    first += tl.cast(weight1, tl.float32) * (gradient - first)
    second = tl.load(v + at, mask=inside, other=0.0) * tl.cast(beta2, tl.float32)
    second = second + tl.cast(weight2, tl.float32) * gradient * gradient
    divisor = tl.zeros_like(second) + tl.cast(correction, tl.float32)
    denominator = tl.div_rn(tl.sqrt_rn(second), divisor) + tl.cast(eps, tl.float32)
    value = tl.load(p + at, mask=inside, other=0.0) * tl.cast(decay, tl.float32)
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    tl.store(p + at, value - tl.cast(step_size, tl.float32) * tl.div_rn(first, denominator), mask=inside)


@triton.jit
def decode_blocks_kernel(values, codes, absmax, levels, n, BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    level = tl.load(levels + code)
    tl.store(values + at, level * tl.load(absmax + at // BLOCKSIZE, mask=inside, other=0.0), mask=inside)


def adamw_(
    p: list[Tensor],
    g: list[Tensor],
    at: list[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    work: Tensor,
    numbers: list[float],
) -> None:
    n, moments = exp_avg.numel(), (exp_avg, exp_avg_sq)
    if n == 0 or not all(t.dtype == torch.float32 and t.is_contiguous() and t.numel() == n for t in moments):
        return NotImplemented
    beta1, beta2, *others = numbers
    reference.mark_mutated(p)
    alone = len(p) == 1 and p[0].numel() == n and p[0].dtype == g[0].dtype == torch.float32
    values, gradient = (p[0], g[0]) if alone else work[:2, :n]
    pieces, places = ([], []) if alone else reference.gathered(p, g, at, values, gradient)
    with on(exp_avg):
        adamw_kernel[(cdiv(n, 1024),)](
            values, gradient, *moments, (1 - beta1, beta2, 1 - beta2, *others), n, BLOCK=1024, **EXACT
        )
    if not alone:
        torch._foreach_copy_(pieces, places)
    return None


def _takes_blocks(codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int) -> bool:
    """Whether the kernels take these.

    Raises:
        ValueError: The sizes do not fit together.
    """
    n = values.numel()
    if not codes.numel() == n == absmax.numel() * blocksize:
        raise ValueError(f"{codes.numel()} codes and {absmax.numel()} maxima of blocks of {blocksize} for {n} values")
    return (
        all(t.is_contiguous() for t in (codes, absmax, values))
        and blocksize in BLOCKSIZES
        and n > 0
        and codes.dtype == torch.uint8
        and values.dtype == absmax.dtype == torch.float32
    )


def encode_blocks_into(
    codes: Tensor, absmax: Tensor, values: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    if not _takes_blocks(codes, absmax, values, blocksize):
        return NotImplemented
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
    return None


def decode_blocks_into(
    values: Tensor, codes: Tensor, absmax: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    if not _takes_blocks(codes, absmax, values, blocksize):
        return NotImplemented
    n, levels = values.numel(), reference.block_tables(values.device, signed)[0]
    with on(values):
        decode_blocks_kernel[(cdiv(n, 1024),)](
            values, codes, absmax, levels, n, BLOCKSIZE=blocksize, BLOCK=1024, **EXACT
        )
    return None

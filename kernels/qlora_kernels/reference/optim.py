"""An optimizer's step in plain PyTorch: AdamW over pieces of flat moments, the norm of all gradients, 8-bit moments.

The operations and their order are those of torch.optim.AdamW(foreach=False), so the bits are the same. The alternative,
one operator a parameter, launches a dozen kernels for each of hundreds of small tensors.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qlora_kernels.reference.common import TINY, mark_mutated
from qlora_kernels.reference.nf4 import dynamic_map, midpoints_of


@functools.cache
def block_tables(device: torch.device, signed: bool) -> tuple[Tensor, Tensor]:
    """(values [256], midpoints [255]) of the dynamic map for blocks. Unsigned, every value above 0 is nearer to the
    smallest code than to that of 0: a second moment that was rounded to 0 would make its step m / eps.
    """
    levels = dynamic_map(device, signed)
    midpoints = midpoints_of(levels)
    if not signed:
        midpoints[0] = 0
    return levels, midpoints


def encode_blocks_into(
    codes: Tensor, absmax: Tensor, values: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    """values float32 [n], whole blocks -> codes uint8 [n], absmax float32 [n / blocksize]: 8-bit state
    (arXiv:2110.02861).

    `work` int32 [n] and `values` are used up, so that nothing is allocated.
    """
    scaled, wide = values.view(-1, blocksize), work.view(torch.float32)
    torch.amax(torch.abs(scaled, out=wide.view(-1, blocksize)), dim=1, out=absmax)
    inverse = torch.clamp_min(absmax, TINY, out=wide[: absmax.numel()]).reciprocal_()
    scaled.mul_(inverse.unsqueeze(1))
    codes.copy_(torch.bucketize(values, block_tables(values.device, signed)[1], out_int32=True, out=work))


def decode_blocks_into(
    values: Tensor, codes: Tensor, absmax: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    """The inverse: code's value times its block's largest magnitude; `work` int32 [n] is used up."""
    torch.index_select(block_tables(values.device, signed)[0], 0, work.copy_(codes), out=values)
    values.view(-1, blocksize).mul_(absmax.unsqueeze(1))


def adamw_(
    p: list[Tensor],
    g: list[Tensor],
    at: list[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    work: Tensor,
    numbers: list[float],
) -> None:
    """One step of AdamW (arXiv:1711.05101) in place, of contiguous tensors p with gradients scale g:

        m = lerp(m, g, 1 - beta1)    v = beta2 v + (1 - beta2) g^2
        p = decay p - step_size m / (sqrt(v) / correction + eps)

    `numbers` are beta1, beta2, eps, decay = 1 - lr weight_decay, step_size = lr / (1 - beta1^t), correction =
    sqrt(1 - beta2^t) and scale. The moments of p[i] are those from at[i] of exp_avg and exp_avg_sq [n]; those between
    are 0 and stay so. They and work [3, n or more], which is used up so that nothing is allocated, have the dtype of
    the arithmetic. The operations and their order are those of torch.optim.AdamW(foreach=False): the same bits,
    wherever a tensor is cut.
    """
    beta1, beta2, eps, decay, step_size, correction, scale = numbers
    mark_mutated(p)
    values, gradient, root = work[:, : exp_avg.numel()]
    pieces, places = gathered(p, g, at, values, gradient)
    gradient.mul_(scale)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    torch.sqrt(exp_avg_sq, out=root).div_(correction).add_(eps)
    if decay != 1:
        values.mul_(decay)
    values.addcdiv_(exp_avg, root, value=-step_size)
    torch._foreach_copy_(pieces, places)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all elements of all tensors, a scalar."""
    return torch.nn.utils.get_total_norm(tensors)


def gathered(
    p: list[Tensor], g: list[Tensor], at: list[int], values: Tensor, gradient: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Copy p[i] and g[i] to `values` and `gradient` from at[i] on, zeros between the gradients; returns p flat, and
    where it lies in `values`.
    """
    pieces = [x.view(-1) for x in p]
    ranges = [slice(first, first + x.numel()) for first, x in zip(at, pieces, strict=True)]
    places = [values[part] for part in ranges]
    if sum(x.numel() for x in pieces) < gradient.numel():
        gradient.zero_()
    torch._foreach_copy_(places, pieces)
    torch._foreach_copy_([gradient[part] for part in ranges], [x.view(-1) for x in g])
    return pieces, places

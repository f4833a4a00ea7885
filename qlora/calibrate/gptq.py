"""NF4 codes chosen by error feedback (GPTQ, arXiv:2210.17323) under fixed scales: another file of the same kind.

    columns by falling H_jj;  U = upper Cholesky factor of (H + damping)^-1
    column j:   q_j = nearest level to w_j under its block's scale,   W[:, k > j] -= (w_j - q_j) / U_jj  U_jk

The scales are those that double quantization decodes to, chosen before any code, so the order of columns does not show
in the file and bitsandbytes reads it. Columns are taken BLOCK at a time: feedback within the block column by column, to
all later ones in one product. The alternative, scales that follow the errors as they move, gains a few per cent of the
error and makes each group wait for the one before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.weight import QuantizedWeight

BLOCK = 128
DAMPING = 0.1  # of the mean of the diagonal; more than the start needs, as GPTQ fits its text more closely


def damped(H: Tensor, damping: float) -> Tensor:
    """H [in, in] with `damping` times the mean of its diagonal added to the diagonal: what few tokens did not show."""
    made = H.clone()
    made.diagonal().add_(damping * H.diagonal().mean())
    return made


def gptq(weight: QuantizedWeight, W: Tensor, H: Tensor, damping: float = DAMPING) -> QuantizedWeight:
    """`weight` with codes chosen for W [out, in] under H; its scales stay. As it is where blocks cross rows or parts.

    Args:
        weight: W, quantized.
        W: the weight in 16 or 32 bits.
        H: [in, in], or [parts, in / parts, in / parts]: the parts on its diagonal, between which no error is fed.
        damping: of the mean of H's diagonal, added to it.

    Raises:
        torch.linalg.LinAlgError: H is not finite.
    """
    out, columns = weight.shape
    H = H if H.dim() == 3 else H.unsqueeze(0)
    width = H.shape[1]
    if width % weight.blocksize or columns % 2:
        return weight
    scales = reference.decode_absmax(weight).view(out, -1)
    codes = torch.empty(out, columns, dtype=torch.uint8, device=W.device)
    for start, part in zip(range(0, columns, width), H, strict=True):
        inside = slice(start, start + width)
        blocks = scales[:, start // weight.blocksize : (start + width) // weight.blocksize]
        codes[:, inside] = choose_codes(W[:, inside], blocks, part, weight.levels, weight.blocksize, damping)
    pairs = codes.view(-1, 2)
    packed = (pairs[:, 0] << 4 | pairs[:, 1]).view(-1, 1)
    return QuantizedWeight([packed, *weight.parts[1:]], weight.layout)


def choose_codes(W: Tensor, scales: Tensor, H: Tensor, levels: Tensor, blocksize: int, damping: float) -> Tensor:
    """Codes [out, in] uint8 of W [out, in], with scales [out, in / blocksize] and 16 rising levels.

    In memory are W and, for a BLOCK, errors in float32, the codes, and three of H. Columns lie in rows of their own
    here, where the loop passes over them.
    """
    order = H.diagonal().argsort(descending=True, stable=True)
    U = _feedback(damped(H, damping)[order][:, order])
    left = W.t()[order].float()  # [in, out]
    by_block = scales.t().contiguous()
    inverses = torch.where(by_block > 0, 1 / by_block, 0)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.empty(left.shape, dtype=torch.uint8, device=W.device)
    block_of = (order // blocksize).tolist()
    for start in range(0, len(left), BLOCK):
        part = slice(start, min(start + BLOCK, len(left)))
        errors = torch.empty_like(left[part])
        for j in range(part.start, part.stop):
            chosen = torch.bucketize(left[j] * inverses[block_of[j]], midpoints)
            codes[j] = chosen
            errors[j - start] = error = (left[j] - levels[chosen] * by_block[block_of[j]]) / U[j, j]
            left[j + 1 : part.stop].addr_(U[j, j + 1 : part.stop], error, alpha=-1)
        left[part.stop :].addmm_(U[part, part.stop :].t(), errors, alpha=-1)
    return torch.empty_like(codes).index_copy_(0, order, codes).t()


def _feedback(H: Tensor) -> Tensor:
    """U [in, in], the upper Cholesky factor of the inverse of H, which is changed; an input that never came counts as
    independent of all others.
    """
    dead = H.diagonal() <= 0
    H.diagonal()[dead] = 1
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)

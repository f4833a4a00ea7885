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

from qlora.calibrate.error_start import damped
from qlora_kernels import reference
from qlora_kernels.weight import QuantizedWeight

BLOCK = 128
DAMPING = 0.1  # of the mean of the diagonal; more than the start needs, as GPTQ fits its text more closely


def gptq(weight: QuantizedWeight, W: Tensor, H: Tensor, damping: float = DAMPING) -> QuantizedWeight:
    """`weight` with codes chosen for W [out, in] under H [in, in]; its scales stay. As it is where blocks cross rows.

    Raises:
        torch.linalg.LinAlgError: H is not finite.
    """
    out, columns = weight.shape
    if columns % weight.blocksize or columns % 2:
        return weight
    scales = reference.decode_absmax(weight).view(out, -1)
    codes = choose_codes(W.float(), scales, H, weight.levels, weight.blocksize, damping)
    pairs = codes.view(-1, 2)
    packed = (pairs[:, 0] << 4 | pairs[:, 1]).view(-1, 1)
    return QuantizedWeight([packed, *weight.parts[1:]], weight.layout)


def choose_codes(W: Tensor, scales: Tensor, H: Tensor, levels: Tensor, blocksize: int, damping: float) -> Tensor:
    """Codes [out, in] uint8 of W [out, in], with scales [out, in / blocksize] and 16 rising levels."""
    order = H.diagonal().argsort(descending=True, stable=True)
    H = damped(H, damping)[order][:, order]
    dead = H.diagonal() <= 0
    H.diagonal()[dead] = 1
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W, by_column = W[:, order].clone(), scales[:, order // blocksize]
    inverse = torch.where(by_column > 0, 1 / by_column, 0)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    for start in range(0, W.shape[1], BLOCK):
        part = slice(start, min(start + BLOCK, W.shape[1]))
        errors = torch.empty_like(W[:, part])
        for j in range(part.start, part.stop):
            chosen = torch.bucketize(W[:, j] * inverse[:, j], midpoints)
            codes[:, j] = chosen
            errors[:, j - start] = error = (W[:, j] - levels[chosen] * by_column[:, j]) / U[j, j]
            W[:, j + 1 : part.stop] -= error.unsqueeze(1) * U[j, j + 1 : part.stop]
        W[:, part.stop :] -= errors @ U[part, part.stop :]
    return torch.empty_like(codes).index_copy_(1, order, codes)

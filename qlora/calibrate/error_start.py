"""An adapter that starts by undoing the quantization error, in closed form: pure functions of one layer.

    W [out, in] in 16 bits, Q its quantized values, E = W - Q, x the layer's inputs, H [in, in] = mean of x xt
    wanted      min over B A of rank r:   tr((E - s B A) H (E - s B A)t) = mean ||(E - s B A) x||^2
    solution    B = the top r eigenvectors U of E H Et,   A = Ut E / s        (QERA arXiv:2410.06040, CLoQ)
    scaled      each row of A gets the norm a of a drawn row, B's column the rest: the products of A with x, and so the
                size of training's first steps, stay those of LoRA
    DoRA        m_j = n_j <w_j, v_j>_H / <v_j, v_j>_H,   v = Q + s B A,   n_j = ||v_j||: the best factor of each row

The published form takes H^(1/2) and its inverse; none is needed: with F = E H^(1/2), the best F' of rank r is U Ut F,
and U Ut F H^(-1/2) = U Ut E. U comes from subspace iteration, Y <- E (H (Et Y)), three thin products a round. The
alternatives not taken: a plain SVD of E (LoftQ), which does not know which inputs are large and gains next to nothing
(NF4's error is white), and all eigenvectors of a matrix of size out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 10  # of the subspace iteration
SPARE = 8  # directions more than asked for, for it to converge


@dataclass(frozen=True)
class LayerError:
    """The mean squared error of a layer's output over that output's mean square, before and after it was lowered."""

    before: float
    after: float


def error_table(layers: Mapping[str, LayerError]) -> str:
    """A line for each layer, the worst first: what share of its output is error, and what it was."""
    worst = sorted(layers.items(), key=lambda item: -item[1].after)
    return "\n".join(f"         {100 * e.after:7.3f} % (was {100 * e.before:7.3f} %)  {name}" for name, e in worst)


def weighted_error(E: Tensor, H: Tensor) -> float:
    """tr(E H Et): the mean squared error of the layer's output, for errors E [out, in] and moments H [in, in]."""
    return float(((E @ H) * E).sum(dtype=torch.float64))


def damped(H: Tensor, damping: float) -> Tensor:
    """H [in, in] with `damping` times the mean of its diagonal added to the diagonal: what few tokens did not show."""
    made = H.clone()
    made.diagonal().add_(damping * H.diagonal().mean())
    return made


def principal_directions(E: Tensor, H: Tensor, count: int, rounds: int = ROUNDS) -> Tensor:
    """U [out, k]: the first `count` eigenvectors of E H Et (fewer where E has no more rows or columns), largest first.

    The iteration starts from a draw of its own, so that nobody's random state moves.
    """
    out, columns = E.shape
    width = min(count + SPARE, out, columns)
    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(out, width, generator=generator, dtype=E.dtype).to(E.device)
    for _ in range(rounds):
        Y = torch.linalg.qr(E @ (H @ (E.t() @ Y))).Q
    projected = E.t() @ Y
    values, vectors = torch.linalg.eigh(projected.t() @ (H @ projected))
    del values  # in rising order
    return (Y @ vectors).flip(1)[:, :count]


def error_factors(E: Tensor, H: Tensor, drawn: Tensor, scaling: float, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) with s B A the best approximation of E under H.

    Args:
        E: W - Q [out, in].
        H: the second moments of the inputs [in, in].
        drawn: A [r, in] as it was drawn. Its mean row norm is kept; rows beyond the rank of E stay, with B zero.
        scaling: s.
        rounds: of the iteration.
    """
    rank = drawn.shape[0]
    U = principal_directions(E, H, rank, rounds)
    rows = U.t() @ E
    size, norm = rows.norm(dim=1), drawn.norm(dim=1).mean()
    there = size > 1e-7 * size.max() if len(size) else size > 0
    A, B = drawn.clone(), torch.zeros(E.shape[0], rank, dtype=drawn.dtype, device=drawn.device)
    k = torch.nonzero(there).squeeze(1)
    A[k] = rows[k] * (norm / size[k]).unsqueeze(1)
    B[:, k] = U[:, k] * (size[k] / (norm * scaling))
    return A, B


def row_gains(V: Tensor, VH: Tensor, left: Tensor) -> Tensor:
    """g [out] = <w_j, v_j>_H / <v_j, v_j>_H of V [out, in], V H, and what is `left` of the error, W - V; 1 for a row
    that H does not see.
    """
    size = (VH * V).sum(1)
    seen = size > 0
    return torch.where(seen, 1 + (VH * left).sum(1) / torch.where(seen, size, 1), 1)

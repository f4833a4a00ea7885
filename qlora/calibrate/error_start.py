"""An adapter that starts by undoing the quantization error, in closed form: pure functions of one layer.

    W [out, in] in 16 bits, Q its quantized values, E = W - Q, x the layer's inputs, H [in, in] = mean of x xt
    wanted      min over B A of rank r:   tr((E - s B A) H (E - s B A)t) = mean ||(E - s B A) x||^2
    solution    B = the top r eigenvectors U of E H Et,   A = Ut E / s        (QERA arXiv:2410.06040, CLoQ)
    scaled      each row a of A to mean (a x)^2 = at H a = |d|^2 tr(H) / in, what a drawn row d has in expectation, and
                B's column takes the rest: B A is the same, and B's steps stay those of LoRA
    DoRA        m_j = n_j <w_j, v_j>_H / <v_j, v_j>_H,   v = Q + s B A,   n_j = ||v_j||: the best factor of each row
    what comes of it    l = e - s b A of each row has l H l = e H e - 2 s b (A H e) + s^2 b (A H At) bt: from w H w,
                w H e, e H e and products of r columns, no second matrix of the size of E is made

The published form takes H^(1/2) and its inverse; none is needed: with F = E H^(1/2), the best F' of rank r is U Ut F,
and U Ut F H^(-1/2) = U Ut E. U comes from subspace iteration, Y <- (E H) (Et Y), two thin products a round. The
alternatives not taken: a plain SVD of E (LoftQ), which does not know which inputs are large and gains next to nothing
(NF4's error is white), and all eigenvectors of a matrix of size out.

Why scaled so. Adam moves every entry by about the learning rate e, so a step changes an output by s e |a x| through B
and by s e |b| |x|_1 through A. With c a and b / c in the place of a and b, the one grows with c and the other with 1/c:
no c keeps both as LoRA's, whose b is zero at first. The rows of Ut E lie along the largest directions of H. With the
norm of drawn rows, at H a is 2 to 70 times theirs, and B's steps are larger by its root. Measured: docs/log.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 5  # of the subspace iteration: 10 lower the error of SmolLM2's layers by another 0.03 %
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


@dataclass(frozen=True)
class RowForms:
    """<w, w>_H, <w, e>_H and <e, e>_H of each row of a weight and of its error, [out] each, in float64."""

    ww: Tensor
    we: Tensor
    ee: Tensor

    def less(self, B: Tensor, WHA: Tensor, EHA: Tensor, AHA: Tensor) -> RowForms:
        """The same with E - B A in the place of E.

        Args:
            B: [out, r].
            WHA: W H At [out, r].
            EHA: E H At [out, r].
            AHA: A H At [r, r].
        """
        changed, square = (B * EHA).sum(1), ((B @ AHA) * B).sum(1)
        return RowForms(self.ww, self.we - (B * WHA).sum(1), (self.ee - 2 * changed + square).clamp_min(0))

    def gains(self) -> Tensor:
        """g = <w, v>_H / <v, v>_H, the best factor of each row of V = W - E; 1 for a row that H does not see."""
        size = self._vv()
        seen = size > 1e-6 * self.ww  # less is what rounding left of nothing
        return torch.where(seen, 1 + (self.we - self.ee) / torch.where(seen, size, 1), 1)

    def scaled(self, gains: Tensor) -> Tensor:
        """<w - g v, w - g v>_H of each row, V = W - E."""
        more = gains - 1
        return (self.ee - 2 * more * (self.we - self.ee) + more.square() * self._vv()).clamp_min(0)

    def _vv(self) -> Tensor:
        return self.ww - 2 * self.we + self.ee


def row_forms(W: Tensor, H: Tensor, E: Tensor, EH: Tensor) -> RowForms:
    """The forms of some rows: W, E and E H [rows, in], H [in, in]."""
    product = torch.empty_like(W)

    def sums(X: Tensor, Y: Tensor) -> Tensor:
        return torch.mul(X, Y, out=product).sum(1).double()

    return RowForms(sums(torch.mm(W, H, out=product), W), sums(EH, W), sums(EH, E))


def principal_directions(E: Tensor, EH: Tensor, count: int, rounds: int = ROUNDS) -> Tensor:
    """U [out, k]: the first `count` eigenvectors of E H Et (fewer where E has no more rows or columns), largest first,
    of E [out, in] and E H.

    The iteration starts from a draw of its own, so that nobody's random state moves.
    """
    out, columns = E.shape
    width = min(count + SPARE, out, columns)
    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(out, width, generator=generator, dtype=E.dtype).to(E.device)
    for _ in range(rounds):
        Y = torch.linalg.qr(EH @ (E.t() @ Y)).Q
    projected = (Y.t() @ EH) @ (E.t() @ Y)
    values, vectors = torch.linalg.eigh((projected + projected.t()) / 2)
    del values  # in rising order
    return (Y @ vectors).flip(1)[:, :count]


def error_factors(
    E: Tensor, EH: Tensor, mean_square: float, drawn: Tensor, scaling: float, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) with s B A the best approximation of E under H.

    Args:
        E: W - Q [out, in].
        EH: E H, of the second moments H [in, in] of the inputs.
        mean_square: of the inputs, tr(H) / in.
        drawn: A [r, in] as it was drawn. A's rows get its size under H; rows beyond the rank of E stay, with B zero.
        scaling: s.
        rounds: of the iteration.
    """
    rank = drawn.shape[0]
    U = principal_directions(E, EH, rank, rounds)
    rows = U.t() @ E
    size = ((U.t() @ EH) * rows).sum(1).clamp_min(0).sqrt()
    wanted = drawn.norm(dim=1).mean() * mean_square**0.5  # the root of a drawn row's a H a, as expected
    there = size > 1e-7 * size.max() if len(size) else size > 0
    A, B = drawn.clone(), torch.zeros(E.shape[0], rank, dtype=drawn.dtype, device=drawn.device)
    k = torch.nonzero(there).squeeze(1)
    A[k] = rows[k] * (wanted / size[k]).unsqueeze(1)
    B[:, k] = U[:, k] * (size[k] / (wanted * scaling))
    return A, B

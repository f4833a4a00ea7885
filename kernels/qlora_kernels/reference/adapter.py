"""LoRA and DoRA in plain PyTorch, computed in float32: row norms, an adapted layer forward and backward, its sums.

    LoRA (arXiv:2106.09685)   y = x Wt + s (x At) Bt
    DoRA (arXiv:2402.09353)   y = g * (x Wt + s (x At) Bt),   g = m / n,   n_j = ||W_j + s B_j A||

g is `row_scale` here: it multiplies the block scales of the quantized weight and the rows of B, so DoRA has LoRA's
products. The alternative, a second look at the weight for the norm of W + s B A, is what `row_norms` avoids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from qlora_kernels.reference.common import chunk_elements, mark_mutated, widened_product
from qlora_kernels.reference.nf4 import decoded_rows, dequantize_4bit, dequantize_4bit_joined, split_weights
from qlora_kernels.weight import QuantizedWeight


def row_norms(chunks: Iterable[tuple[slice, Tensor]], A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """n [out] with n_j = ||W_j + s B_j A||, from W as (rows, W[rows]) in the dtype of A:

        n_j^2 = ||W_j||^2 + 2 s sum_k (W At)_jk B_jk + s^2 sum_k (B (A At))_jk B_jk

    Where the sums cancel (n^2 below 1e-3 ||W||^2) they have lost their digits, and those rows are computed densely. On
    a GPU all are, as to ask which would be a wait for every chunk.
    """
    gram = A @ A.t()
    n = torch.empty(B.shape[0], dtype=A.dtype, device=A.device)
    for part, W in chunks:
        b = B[part]
        if W.is_cuda:
            n[part] = torch.linalg.vector_norm(torch.addmm(W, b, A, alpha=scaling), dim=1)
            continue
        own = torch.linalg.vector_norm(W, dim=1).square_()
        squared = own + 2 * scaling * ((W @ A.t()) * b).sum(1) + scaling**2 * ((b @ gram) * b).sum(1)
        # Without numbers none is lost.
        if not squared.is_meta and (lost := (squared < 1e-3 * own).nonzero().squeeze(1)).numel():
            squared[lost] = (W[lost] + scaling * (b[lost] @ A)).square().sum(1)
        n[part] = squared.sqrt()
    return n


def row_norms_4bit(weight: list[Tensor], layout: list[int], A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`row_norms` of a quantized weight [rows, columns]: A [r, columns], B [rows, r] float32 or float64 -> n [rows] in
    that dtype.
    """
    return row_norms(decoded_rows(QuantizedWeight(weight, layout), A.dtype), A, B, scaling)


def row_norms_4bit_all(
    weights: list[Tensor],
    layouts: list[int],
    A: list[Tensor],
    B: list[Tensor],
    scaling: list[float],
    norms: Callable[..., Tensor] = row_norms_4bit,
) -> list[Tensor]:
    """`row_norms_4bit`, or `norms`, of each layer: parts and layouts of all weights in one list each."""
    return [
        norms(*w, *rest)
        for *w, rest in zip(*split_weights(weights, layouts), zip(A, B, scaling, strict=True), strict=True)
    ]


def clamp_magnitude(m: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """(m, n) safe to divide by: n away from 0 (rows of zeros), |m| at least 1e-6 n with m's sign. Used forward and
    backward alike.
    """
    n = n.clamp(min=1e-12)
    return torch.copysign(torch.maximum(m.abs(), 1e-6 * n), m), n


def prepare_lora_factors(
    A: Tensor, B: Tensor, m: Tensor | None, n: Tensor | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A [r, in], B [out, r], m and n [out] -> A and diag(row_scale) s B in `dtype`, row_scale = m / n, and m as
    `clamp_magnitude` has it; without m the last two are empty.
    """
    scaled = scaling * B
    row_scale, m_clamped = B.new_empty(0), B.new_empty(0)
    if m is not None and n is not None:
        m_clamped, n = clamp_magnitude(m, n)
        row_scale = m_clamped / n
        scaled = scaled * row_scale.unsqueeze(1)
    return A.to(dtype, copy=True), scaled.to(dtype), row_scale, m_clamped


def columnwise_dot(a: Tensor, b: Tensor) -> Tensor:
    """a, b [tokens, out] -> sum over tokens of a * b, [out]: summed in float32, or in float64 where one of them is
    float64.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    total = torch.zeros(a.shape[1], dtype=dtype, device=a.device)
    step = max(1, chunk_elements(a) // max(1, a.shape[1]))
    for start in range(0, a.shape[0], step):
        total += (a[start : start + step].to(dtype) * b[start : start + step].to(dtype)).sum(0)
    return total


def matmul_tn(left: Tensor, x: Tensor) -> Tensor:
    """left [tokens, r], x [tokens, in] -> left^T x [r, in], in float32 (float64 for float64)."""
    return widened_product(left.t(), x)


def matmul_dense_into(out: Tensor, x: Tensor, weight: Tensor, transposed: bool) -> None:
    """x [tokens, columns] Wt, or x [tokens, rows] W, to `out`, of a dense frozen W [rows, columns] of x's dtype, or of
    bf16.
    """
    mark_mutated(out)
    weight = weight.to(x.dtype)
    out.copy_(x @ (weight.t() if transposed else weight))


def adapter_gradients(
    dy: Tensor,
    B_scaled: Tensor,
    xA: Tensor,
    y: Tensor | None,
    row_scale: Tensor | None,
    m_clamped: Tensor | None,
    scaling: float,
    dot: Callable[[Tensor, Tensor], Tensor] = columnwise_dot,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over dy [tokens, out] that a layer's backward pass wants, with B_scaled [out, r] = diag(row_scale) s B
    and
    xA [tokens, r] = x At:

        v [tokens, r] = dy B_scaled    dB [out, r] = diag(s row_scale) dyt xA    dm [out] = sum_t dy y / m_clamped

    dm is empty without y.
    """
    dB = widened_product(dy.t(), xA)
    dB *= scaling if row_scale is None else (scaling * row_scale).unsqueeze(1)
    dm = dB.new_empty(0) if y is None or m_clamped is None else dot(dy, y) / m_clamped
    return dy @ B_scaled, dB, dm


def adapted_operands(
    A: list[Tensor],
    B: list[Tensor],
    m: list[Tensor],
    n: list[Tensor],
    scaling: float,
    weights: list[Tensor],
    layouts: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that the product of k layers of one input and one rank multiplies with, all layers as one, out = out1 + out2
    + ...: their weights [out, in] decoded below each other, each with its row_scale; A [k r, in] below each other; the
    scaled B [out, k r] along the diagonal with zeros beside them; and (row_scale, m_clamped) [2, out], or [2, 0] where
    m and n are empty lists. Factors are those of `prepare_lora_factors`, `weights` and `layouts` those of
    `dequantize_4bit_joined`.
    """
    norms = zip(m, n, strict=True) if m else [(None, None)] * len(A)
    parts = [prepare_lora_factors(a, b, *mn, scaling, dtype) for a, b, mn in zip(A, B, norms, strict=True)]
    As, Bs, row_scales, ms = zip(*parts, strict=True)
    factors = torch.stack((torch.cat(row_scales), torch.cat(ms)))
    dense = dequantize_4bit_joined(weights, layouts, factors[0] if m else None, dtype)
    return dense, torch.cat(As), torch.block_diag(*Bs), factors


def joined_gradients(
    dy: Tensor,
    B_scaled: Tensor,
    xA: Tensor,
    y: Tensor | None,
    dots: Tensor | None,
    factors: Tensor,
    outs: list[int],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`adapter_gradients` of the layers of `adapted_operands`, of `outs` rows each: v [tokens, k r], dB [out, r] below
    each other, dm [out]. The sums of dm are `dots` where they are given, those of dy y where y is, else dm is empty.
    """
    raw, rank = widened_product(dy.t(), xA), xA.shape[1] // len(outs)
    dB = torch.cat([rows[:, i * rank : (i + 1) * rank] for i, rows in enumerate(raw.split(outs))])
    dB *= scaling if not factors.numel() else (scaling * factors[0]).unsqueeze(1)
    dots = dots if y is None else columnwise_dot(dy, y)
    return dy @ B_scaled, dB, dB.new_empty(0) if dots is None else dots / factors[1]


def adapted_linear(
    x: Tensor,
    x_adapter: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor | None,
    n: Tensor | None,
    base_row_norms: Tensor | None,
    scaling: float,
    weight: list[Tensor],
    layout: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An adapted layer forward: x [tokens, in], x_adapter (x, or x after dropout), A [r, in], B [out, r], m and n [out]
    or None

        -> y [tokens, out] = x W't + xA B_scaledt,   xA [tokens, r] = x_adapter At,   A and B_scaled as
           `prepare_lora_factors` makes them, W' = diag(row_scale) W, and (row_scale, m_clamped, n) as one [3, out];
           [0, out] without m

    n is the `row_norms` where m is given without it. A kernel may make it from `base_row_norms` [out], those of W
    alone.
    """
    if m is not None and n is None:
        n = row_norms_4bit(weight, layout, A, B, scaling)
    A_cast, B_scaled, row_scale, m_clamped = prepare_lora_factors(A, B, m, n, scaling, x.dtype)
    dense = dequantize_4bit(weight, layout, None if m is None else row_scale, x.dtype)
    xA = x_adapter @ A_cast.t()
    factors = B.new_empty(0, layout[0]) if n is None or m is None else torch.stack((row_scale, m_clamped, n))
    return torch.addmm(xA @ B_scaled.t(), x, dense.t()), xA, A_cast, B_scaled, factors


def adapted_linear_backward(
    dy: Tensor,
    saved: list[Tensor],
    y: Tensor | None,
    scaling: float,
    weight: list[Tensor],
    layout: list[int],
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx = dy W' + v A or empty, dA = vt x, dB, dm) with v, dB and dm of `adapter_gradients`; dm is empty without y.

    `saved`: x, and of the forward pass xA, A, B_scaled and the factors.
    """
    x, xA, A_cast, B_scaled, factors = saved
    row_scale, m_clamped = (factors[0], factors[1]) if len(factors) else (None, None)
    v, dB, dm = adapter_gradients(dy, B_scaled, xA, y, row_scale, m_clamped, scaling)
    dx = dy.new_empty(0)
    if needs_x:
        dx = torch.addmm(v @ A_cast, dy, dequantize_4bit(weight, layout, row_scale, dy.dtype))
    return dx, matmul_tn(v, x), dB, dm

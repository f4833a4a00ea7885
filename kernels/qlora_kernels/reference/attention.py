"""Causal attention within the examples of a packed row, in plain PyTorch (arXiv:2205.14135).

    out = softmax(scale q kt) v, each example for itself: example i is rows cu_seqlens[i] to cu_seqlens[i + 1]

Scores of one example live at a time, [heads, length, length]; a kernel has none of that size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from qlora_kernels.reference.common import widened


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k^T of one example in float32, [heads, queries, keys], minus infinity where a key is later than the
    query.
    """
    scores = (
        torch.einsum("qhd,khd->hqk", widened(q), widened(k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))) * scale
    )
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention within each example: q [tokens, heads, D], k, v [tokens, groups, D], example i in rows
    cu_seqlens[i] to cu_seqlens[i + 1].

    -> out [tokens, heads, D] = softmax(scale q k^T) v, and lse [heads, tokens] = log(sum e^(scale q k^T)) in float32.
    Heads h of equal h // (heads / groups) share a key and a value.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for start, stop in pairwise(cu_seqlens):
        part = slice(start, stop)
        scores = _scores(q[part], k[part], scale)
        lse[:, part] = scores.logsumexp(2)
        out[part] = torch.einsum(
            "hqk,khd->qhd", scores.softmax(2), widened(v[part].repeat_interleave(q.shape[1] // k.shape[1], dim=1))
        )
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) with P = e^(scale q k^T - lse) and dS = P (dout v^T - sum(dout out)): dq = scale dS k, dk = scale
    dS^T q, dv = P^T dout.

    dk and dv are summed over the heads that share a key. arXiv:2205.14135, appendix B.
    """
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    for start, stop in pairwise(cu_seqlens):
        part = slice(start, stop)
        P = (_scores(q[part], k[part], scale) - lse[:, part].unsqueeze(2)).exp()
        do, keys, values = widened(dout[part]), *(widened(x[part].repeat_interleave(shared, dim=1)) for x in (k, v))
        delta = (do * widened(out[part])).sum(2).t().unsqueeze(2)
        dS = P * (torch.einsum("qhd,khd->hqk", do, values) - delta) * scale
        dq[part] = torch.einsum("hqk,khd->qhd", dS, keys)
        for gradient, weights, x in ((dk, dS, widened(q[part])), (dv, P, do)):
            gradient[part] = torch.einsum("hqk,qhd->khd", weights, x).unflatten(1, (-1, shared)).sum(2)
    return dq, dk, dv

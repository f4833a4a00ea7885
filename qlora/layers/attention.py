"""Attention over examples that lie end to end in one row, so that padding is never computed.

    tokens   [1, t0 + t1 + ...]     positions restart at 0 with every example     attention: causal within each example

transformers hands a four-dimensional `attention_mask` through to the attention function as it is. Ours is not a mask
but the bounds of the examples (0, t0, t0 + t1, ...) as int64; `attend` runs our own kernel on all of them where there
is one (bf16 on a processor that multiplies it), elsewhere torch's causal kernel on each example, so nothing of size
[tokens, tokens] exists and no product between examples is computed. With any other mask it is transformers' own "sdpa".
The alternative, transformers' block-diagonal mask for restarting positions, takes tokens^2 bytes and the time of all
pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_kernels import backends, ops

NAME = "qlora"  # for `model.set_attn_implementation`


def bounds(lengths: Sequence[int]) -> Tensor:
    """What to pass as `attention_mask` for examples of these lengths: [1, 1, 1, n + 1] int64, on the CPU for every
    device.
    """
    return torch.tensor([0, *accumulate(lengths)]).view(1, 1, 1, -1)


class _Attention(torch.autograd.Function):
    """`ops.attention`; saves what it is given, its result, and one number a token and head."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float) -> Tensor:
        out, lse = ops.attention(q, k, v, bounds, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = bounds, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        return *ops.attention_backward(dout, *ctx.saved_tensors, *ctx.rest), None, None


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """The attention function of transformers' interface: query [b, heads, t, d], key and value [b, groups, t, d] -> [b,
    t, heads, d].

    Raises:
        NotImplementedError: bounds are given and the layer needs what torch's kernel cannot do (a cap on scores,
        biases).
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in ("softcap", "position_bias", "s_aux"):
        if options.get(name) is not None:
            raise NotImplementedError(name)
    edges = attention_mask.view(-1).tolist()
    window, dropout, scale = options.get("sliding_window"), options.get("dropout", 0.0), options.get("scaling")
    lengths = [stop - begin for begin, stop in zip(edges, edges[1:])]
    if backends.supports_attention(query, key, value) and not dropout and (window is None or max(lengths) <= window):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _Attention.apply(*(x[0].transpose(0, 1) for x in (query, key, value)), edges, scale).unsqueeze(0), None
    start, parts = 0, []
    for length, same in groupby(lengths):
        count = len(list(same))  # neighbours of one length go through the kernel together
        part = (
            x[:, :, start : start + count * length].transpose(1, 2).unflatten(1, (count, length))[0].transpose(1, 2)
            for x in (query, key, value)
        )
        mask = None
        if window is not None and length > window:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        if query.is_meta and mask is None and not dropout:  # here torch would choose what keeps [tokens, tokens]
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out = flash(*part, is_causal=True, scale=scale)[0]
            parts.append(out.transpose(1, 2).reshape(count * length, *out.shape[1::2]))
            start += count * length
            continue
        out = scaled_dot_product_attention(
            *part,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(out.transpose(1, 2).reshape(count * length, *out.shape[1::2]))
        start += count * length
    return torch.cat(parts).unsqueeze(0), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

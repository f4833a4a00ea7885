"""Attention over packed examples, so that padding is never computed.

    q [1, heads, T, d], k and v [1, groups, T, d] -> [1, T, heads, d]    causal within each example, T = t0 + t1 + ...

The borders 0, t0, t0 + t1, ... come as keyword arguments, under the names that transformers gives them
(`cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`) and hands from the decoder's forward down to the
attention function. `attend` runs one kernel on all examples where there is one, elsewhere one on those of each length
(`attention_kernels` says which), so no product between examples is computed. Without borders it is transformers' own
"sdpa".

The alternative, the block-diagonal mask that transformers builds when positions restart, takes T^2 bytes and the time
of all pairs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.layers.attention_kernels import by_length, by_varlen, choose, need_of, offer_of
from qlora_kernels import backends

NAME = "qlora"  # for `model.set_attn_implementation`
# The `attention_mask` to pass with borders. transformers hands a mask of four dimensions through as it is; given None,
# it would build one from the positions, and would ask a GPU whether they restart. An architecture that loses the
# borders on the way meets this mask in its attention, which fits no scores: an error, not a wrong number.
NO_MASK = torch.empty(1, 1, 0, 0, dtype=torch.bool)
_UNUSUAL = ("softcap", "position_bias", "s_aux")  # options of transformers' attention functions


class Borders(TypedDict):
    """The keyword arguments of transformers' flash attention that say where packed examples begin and end."""

    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int


def borders(cu_seqlens: Tensor, device: torch.device) -> Borders:
    """What to pass to a decoder, with NO_MASK, for examples with these borders: [n + 1] int32, on the CPU.

    Those of the queries stay there, since they decide what is launched; those of the keys, the same numbers, lie on
    `device`, once for all layers, for the kernel that reads them.
    """
    longest = int(cu_seqlens.diff().max())
    there = cu_seqlens.to(device, non_blocking=True)
    return Borders(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=there, max_length_q=longest, max_length_k=longest)


class _Attention(torch.autograd.Function):
    """`ops.attention`; saves what it is given, its result, and one number a token and head."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], scale: float) -> Tensor:
        out, lse = backends.quickly("attention", q)(q, k, v, cu_seqlens, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = cu_seqlens, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        gradients = backends.quickly("attention_backward", dout)
        return *gradients(dout, *ctx.saved_tensors, *ctx.rest), None, None


def takes_whole(options: dict[str, Any], window: int | None) -> bool:
    """Whether these options of `attend`, and this window, ask for nothing but causal attention within the borders."""
    unusual = any(options.get(name) is not None for name in _UNUSUAL)
    if unusual or options.get("cu_seq_lens_q") is None:
        return False
    return window is None or options["max_length_q"] <= window


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers' interface.

    Args:
        query: [b, heads, t, d]; key and value: [b, groups, t, d].
        options: `scaling`, `dropout`, `sliding_window`, and with packed examples (b = 1) the `Borders`.

    Returns:
        ([b, t, heads, d], None).

    Raises:
        NotImplementedError: borders are given and the layer needs what torch's kernel cannot do (a cap on scores,
            biases), or they did not arrive.
    """
    cu_seqlens = options.get("cu_seq_lens_q")
    if cu_seqlens is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise NotImplementedError("cu_seq_lens_q did not arrive")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in _UNUSUAL:
        if options.get(name) is not None:
            raise NotImplementedError(name)
    edges = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(edges)]
    window, dropout, scale = options.get("sliding_window"), options.get("dropout", 0.0), options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    longest = max(lengths)
    kernel = choose(need_of(query, value, window, longest, dropout), offer_of(query, key, value))
    if kernel == "native":
        tokens = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return _Attention.apply(*tokens, edges, scale).unsqueeze(0), None
    if kernel == "varlen":
        borders_there = options["cu_seq_lens_k"]
        return by_varlen(query, key, value, borders_there, longest, window=window, scale=scale), None
    return by_length(query, key, value, lengths, kernel, window=window, dropout=dropout, scale=scale), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Which kernel computes attention over packed examples, and how torch's are called.

    native     our own on a CPU: all examples in one call
    varlen     FlashAttention on a card, by `torch.nn.attention.varlen`: all examples in one call, windows, shared keys
    flash      FlashAttention by torch's `scaled_dot_product_attention`: a call for each length
    efficient  its kernel for the rest (float32, other heads, cards before Ampere, a window as a mask): each head has
               its keys
    torch      whatever torch has there: a call for each length

`choose` is a pure function, so that what a card would run is tested without one. On a card it never names torch's last
resort, which holds [heads, T, T]; left to itself torch goes there without a word, for shared keys in float32 as for a
mask with shared keys (pytorch/pytorch issue 154363). What flash takes is torch's own rule, in
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from qlora_kernels import backends

Kernel = Literal["native", "varlen", "flash", "efficient", "torch"]
ALIGNED = 8  # elements to which the kernels of a card want heads filled up


@dataclass(frozen=True)
class Need:
    """What decides: where (`kind` of device, a card's compute capability), and what of. `cut`: a window is shorter
    than the longest example.
    """

    kind: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head: int  # elements of a query and a key
    value_head: int
    cut: bool
    dropout: bool


@dataclass(frozen=True)
class Offer:
    """What there is: our kernel for these tensors; FlashAttention in this torch, and its call for many examples."""

    native: bool
    flash: bool
    varlen: bool


def choose(need: Need, offer: Offer) -> Kernel:
    """The fastest kernel that takes it."""
    if offer.native and not need.dropout and not need.cut:
        return "native"
    if need.kind != "cuda":
        return "torch"
    if not (offer.flash and _flash_takes(need)):
        return "efficient"
    if offer.varlen and not need.dropout:
        return "varlen"
    return "efficient" if need.cut else "flash"  # a mask is not flash's


def _flash_takes(need: Need) -> bool:
    large = 192 < need.head and (
        need.head <= 224 or need.dropout
    )  # its gradient takes more shared memory than most have
    return (
        need.dtype in (torch.float16, torch.bfloat16)
        and need.capability is not None
        and need.capability >= (8, 0)
        and need.head == need.value_head <= 256
        and (not large or need.capability in ((8, 0), (9, 0)))
    )


def need_of(q: Tensor, v: Tensor, window: int | None, longest: int, dropout: float) -> Need:
    """Of q [1, heads, T, d] and v [1, groups, T, e] on their device; tensors without one count as the planned."""
    kind, capability = backends.kind_of(q.device), None
    if kind == "cuda":
        capability = (8, 0) if q.is_meta else torch.cuda.get_device_capability(q.device)
    cut = window is not None and longest > window
    return Need(kind, capability, q.dtype, q.shape[-1], v.shape[-1], cut, dropout > 0)


def offer_of(q: Tensor, k: Tensor, v: Tensor) -> Offer:
    """What there is for these tensors. A card that is only planned for has all that its torch has."""
    here = q.is_meta or (torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled())
    return Offer(backends.supports_attention(q, k, v), here, torch_varlen() is not None and torch.version.hip is None)


@functools.cache
def torch_varlen() -> Callable[..., Any] | None:
    """`torch.nn.attention.varlen.varlen_attn`, where it knows windows and shared keys."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


# ---------------------------------------------------------------- the calls


def by_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, *, window: int | None, scale: float
) -> Tensor:
    """[1, heads, T, d] -> [1, T, heads, d]; `cu_seqlens` on the device of q."""
    attention, head = torch_varlen(), q.shape[-1]
    assert attention is not None
    tokens = [_filled(x).squeeze(0).transpose(0, 1) for x in (q, k, v)]
    out = attention(
        *(x if x.stride(-1) == 1 else x.contiguous() for x in tokens),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[..., :head].unsqueeze(0) if head % ALIGNED else out.unsqueeze(0)


def by_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    kernel: Kernel,
    *,
    window: int | None,
    dropout: float,
    scale: float,
) -> Tensor:
    """[1, heads, T, d] -> [1, T, heads, e], a call of torch's kernel for neighbours of one length.

    One split of each tensor: its gradient is one concatenation. A slice for each length would make a gradient of full
    size for each of them.
    """
    groups = [(length, len(list(same))) for length, same in groupby(lengths)]
    sizes, parts = [length * count for length, count in groups], []
    pieces = zip(*(x.split_with_sizes(sizes, dim=2) if len(sizes) > 1 else (x,) for x in (q, k, v)), strict=True)
    for (length, count), piece in zip(groups, pieces, strict=True):
        out = _equal_lengths(
            kernel,
            *(x.squeeze(0).unflatten(1, (count, length)).transpose(0, 1) for x in piece),
            window=window,
            dropout=dropout,
            scale=scale,
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).unsqueeze(0)


def _equal_lengths(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, dropout: float, scale: float
) -> Tensor:
    """Causal attention by torch's kernel, q [n, heads, t, d] -> [n, heads, t, e]; a query sees `window` keys."""
    length, mask, value_head = q.shape[2], None, v.shape[-1]
    if window is not None and length > window:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    if kernel == "efficient":
        q, k, v = _filled(q), *(_filled(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)) for x in (k, v))
    call = _planned if q.is_meta else scaled_dot_product_attention
    out = call(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[..., :value_head]


def _planned(q: Tensor, k: Tensor, v: Tensor, *, attn_mask, is_causal, dropout_p, scale, enable_gqa) -> Tensor:
    """The operator that the planned device would run: on tensors without one torch would choose what keeps [t, t]."""
    aten = torch.ops.aten
    if backends.kind_of(q.device) == "cuda":
        if enable_gqa:
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        shape = (*q.shape[:3], k.shape[2])
        bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(shape)
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is None and not dropout_p:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True, scale=scale)[0]
    return scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
    )


def _filled(x: Tensor) -> Tensor:
    """Its last dimension filled up with zeros: they add nothing to a score, and make elements of the result that are
    cut off again.
    """
    return pad(x, (0, -x.shape[-1] % ALIGNED)) if x.shape[-1] % ALIGNED else x

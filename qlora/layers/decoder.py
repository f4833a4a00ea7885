"""A decoder layer of adapted projections as one autograd Function, on a CPU.

    h = x + o(attention(rotate(q(n), k(n)), v(n)))    n = norm(x)
    y = h + down(act(gate(n')) * up(n'))              n' = norm'(h)

Between two kernels all threads but one wait for Python, whose code and objects the kernels have meanwhile driven out of
the caches: module by module, and a node of the graph for each Function and view, that is 7 % of a step of SmolLM2 in
float32 by two threads. Here a layer is one node, in which the kernels and Functions that a module would call are called
in turn; to the bit they make the same, and keep the same. `fused.ResidualLayer` knows when a layer may be computed so.
The alternative, to record the native calls of a step and replay them, would need every size fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.layers.adapters import AdaptedProduct, Constants, Recomputed, as_matrix
from qlora.layers.functions import GATED_PRODUCTS, GatedLayers
from qlora.layers.joined import OneByOne
from qlora_kernels import backends

Factors = tuple[Tensor, Tensor, Tensor | None]  # A, B and m
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Norm:
    """A frozen RMSNorm: its weight [width] and epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class LayerConstants:
    """What of a decoder layer gets no gradient.

    Attributes:
        norms: before the attention, and before the MLP.
        projections: of each of PROJECTIONS.
        head: elements of a head.
        cos, sin: [tokens, head].
        cu_seqlens, scale: of the attention.
        activation: a name in `GATED_PRODUCTS`.
    """

    norms: tuple[Norm, Norm]
    projections: tuple[Constants, ...]
    head: int
    cos: Tensor
    sin: Tensor
    cu_seqlens: list[int]
    scale: float
    activation: str


class _Part:
    """What a Function finds as its `ctx` where another calls it."""

    def __init__(self, needs: tuple[bool, ...]):
        self.needs_input_grad = needs
        self.saved_tensors: Sequence[Tensor | None] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class DecoderLayer(torch.autograd.Function):
    """y [1, tokens, width] of x [1, tokens, width]. `tensors`: A, B and m of each of PROJECTIONS, which all learn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LayerConstants, *tensors: Tensor | None) -> Tensor:
        (before, behind), (of_q, of_k, of_v, of_o, of_gate, of_up, of_down) = layer.norms, layer.projections
        learn = tuple(part is not None for part in tensors)
        of = [cast(Factors, tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        need_x = ctx.needs_input_grad[0]
        qkv = _Part((need_x, False, *learn[:9]))
        o = _Part((True, True, *learn[9:12], False, False))
        gated = _Part((True, False, False, False, True, *learn[12:15], True, *learn[15:18]))
        down = _Part((True, True, *learn[18:], False, False))

        flat = as_matrix(x)
        n, inverse = backends.quickly("rms_norm", x)(flat, before.weight, before.eps)
        q, k, v = (_heads(y, layer.head) for y in OneByOne.forward(qkv, n, [of_q, of_k, of_v], *tensors[:9]))
        q, k = backends.quickly("rotate", q)(q, k, layer.cos, layer.sin)
        attended, lse = backends.quickly("attention", q)(q, k, v, layer.cu_seqlens, layer.scale)
        of_heads = attended.reshape(flat.shape[0], -1)
        y = AdaptedProduct.forward(o, of_heads, of_heads, *of[3], of_o)
        h, n, inverse_h = backends.quickly("add_rms_norm", x)(flat, y, behind.weight, behind.eps)
        mlp = n, of_gate, of_up, layer.activation
        hidden, *made_of = GatedLayers.forward(gated, *mlp, n, *of[4], n, *of[5])
        again = Recomputed(GATED_PRODUCTS[layer.activation].value, tuple(made_of))
        y = AdaptedProduct.forward(down, hidden, hidden, *of[6], of_down, again)

        ctx.layer, ctx.parts = layer, (qkv, o, gated, down)
        below = (x, inverse) if need_x else (None, None)  # the first layer of a model of which no more learns
        ctx.save_for_backward(
            *below,
            q,
            k,
            v,
            attended,
            lse,
            h,
            inverse_h,
            *(tensor for part in ctx.parts for tensor in part.saved_tensors),
        )
        ctx.counts = [len(part.saved_tensors) for part in ctx.parts]
        for part in ctx.parts:
            part.saved_tensors = ()
        return torch.add(h, y, out=backends.empty(*h.shape, like=h)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        layer: LayerConstants = ctx.layer
        x, inverse, q, k, v, attended, lse, h, inverse_h, *rest = ctx.saved_tensors
        qkv, o, gated, down = ctx.parts
        for part, count in zip(ctx.parts, ctx.counts, strict=True):
            part.saved_tensors, rest = rest[:count], rest[count:]
        (before, behind), dy = layer.norms, as_matrix(dy).contiguous()

        dhidden, _, *of_down = AdaptedProduct.backward(down, dy)[:5]
        dn, _, _, _, _, *of_gate, _, dA, dB, dm = GatedLayers.backward(gated, dhidden, None, None)
        del dhidden
        dh = backends.quickly("rms_norm_backward_add", h)(dn, h, behind.weight, inverse_h, dy)
        dattended, _, *of_o = AdaptedProduct.backward(o, dh)[:5]
        attention_backward = backends.quickly("attention_backward", dy)
        dattended = _heads(dattended, layer.head)
        dq, dk, dv = attention_backward(dattended, q, k, v, attended, lse, layer.cu_seqlens, layer.scale)
        dq, dk = backends.quickly("rotate_backward", dq)(dq, dk, layer.cos, layer.sin)
        dn, _, *of_qkv = OneByOne.backward(qkv, *(part.flatten(1) for part in (dq, dk, dv)))
        dx = None
        if dn is not None:
            dx = backends.quickly("rms_norm_backward_add", x)(dn, as_matrix(x), before.weight, inverse, dh).view(
                x.shape
            )
        for part in ctx.parts:
            part.saved_tensors = ()
        return dx, None, *of_qkv, *of_o, *of_gate, dA, dB, dm, *of_down


def _heads(x: Tensor, head: int) -> Tensor:
    """[tokens, heads * head] -> [tokens, heads, head]"""
    return x.view(x.shape[0], -1, head)

"""A decoder layer of adapted projections as one autograd Function, on a CPU: one call of the native library each way.

    h = x + o(attention(rotate(q(n), k(n)), v(n)))    n = norm(x)
    y = h + down(silu(gate(n')) * up(n'))             n' = norm'(h)

Between two kernels all threads but one wait for Python, whose code and objects the kernels have meanwhile driven out of
the caches: module by module that is 7 to 10 % of a step of SmolLM2 by two threads. To the bit a layer is what its
modules make, and it keeps the same. `fused.ResidualLayer` knows when a layer may be computed so. The alternative, one
Function in which Python calls kernel after kernel, wins a fifth of that (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.layers.adapters import AdaptedLinear, as_matrix
from qlora.layers.linear import frozen_weight
from qlora_kernels import backends
from qlora_kernels.cpu.decoder import Layer, Projection, norms_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def as_projection(layer: AdaptedLinear) -> Projection:
    """An adapted layer as it is now, with n where that is known."""
    base: Any = layer.base
    weight, (A, B, m) = frozen_weight(base), layer.factors()
    n = None if m is None else layer.row_norms.get(layer.version())
    return Projection(*weight.operands, A, B, m, n, base.bias, layer.scaling)


def whole_layer(x: Tensor, layer: Layer, projections: Sequence[AdaptedLinear]) -> Tensor:
    """y [1, tokens, width] of x; the projections keep the n that it makes."""
    tensors = [tensor for part in layer.projections for tensor in (part.A, part.B, part.m)]
    y, factors = DecoderLayer.apply(x, layer, *tensors)
    for one, part, n in zip(projections, layer.projections, norms_of(layer, factors), strict=True):
        if n is not None and part.n is None:
            one.keep_row_norms(n)
    return y


class DecoderLayer(torch.autograd.Function):
    """y [1, tokens, width] of x [1, tokens, width], and DoRA's factors, see `backends.decoder_layer`. `tensors`: A, B
    and m of each of PROJECTIONS, which all learn.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y, kept, factors, ctx.call = backends.decoder_layer(as_matrix(x), layer)
        need_x = ctx.needs_input_grad[0]  # not in the first layer of a model of which nothing below learns
        ctx.save_for_backward(x if need_x else None, kept, factors)
        if factors is not None:
            ctx.mark_non_differentiable(factors)
        ctx.set_materialize_grads(False)
        return y.view(x.shape), factors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, kept, factors = ctx.saved_tensors
        shape, dy = dy.shape, as_matrix(dy).contiguous()
        dx, gradients = backends.decoder_layer_backward(dy, x, kept, factors, ctx.call)
        return None if dx is None else dx.view(shape), None, *gradients

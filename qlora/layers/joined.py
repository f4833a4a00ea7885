"""Adapted layers of one input as one: q, k and v of an attention, gate and up of an MLP, on a card.

    W = [W1; W2; ...]   A = [A1; A2; ...]   B = diag(B1, B2, ...)    below each other, and along a diagonal
    y = x W't + (x At) Bt                                            the equation of `adapters`, once for all of them

So a step launches for three layers what it launches for one: the weights are decoded into one matrix, the factors are
made together, and dx needs no sum. The zeros beside the diagonal cost nothing: a product of r columns takes a tile of
64 anyway. Peak memory: the dense weights of these layers together, where one by one takes the largest.

On a CPU each layer is one kernel, which reads its codes once; nothing is to be gained there. The alternative, one
Function that calls the products of each layer (Unsloth), saves the sums alone: about 90 launches a layer and step where
this has 66.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora.layers.adapters import AdaptedLinear
from qlora.layers.linear import NF4Linear, autocast
from qlora.layers.weight import FrozenWeight, matmul
from qlora_kernels import ops


@dataclass(frozen=True, slots=True)
class Joined:
    """What of the layers gets no gradient: W, s, and for DoRA each n [out]."""

    weights: tuple[FrozenWeight, ...]
    scaling: float
    n: list[Tensor]

    @property
    def outs(self) -> list[int]:
        """The outputs of each layer."""
        return [weight.shape[0] for weight in self.weights]

    def dense(self, dtype: torch.dtype, row_scale: Tensor | None) -> Tensor:
        """diag(row_scale) W [out1 + out2 + ..., in] in `dtype`."""
        parts, layouts = zip(*(weight.operands for weight in self.weights), strict=True)
        return ops.dequantize_4bit_joined(_flat(parts), _flat(layouts), row_scale, dtype)


def _flat(lists: Sequence[list]) -> list:
    return [item for one in lists for item in one]


def _forward(x: Tensor, joined: Joined, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """y [tokens, out1 + out2 + ...], and what `_backward` needs: xA, A, B and the factors of `join_lora_factors`.

    `tensors`: every A, then every B, then for DoRA every m.
    """
    count = len(joined.weights)
    A, B, m = (list(tensors[i * count : (i + 1) * count]) for i in range(3))
    A_cast, B_scaled, factors = ops.join_lora_factors(A, B, m, joined.n, joined.scaling, x.dtype)
    xA = x @ A_cast.t()
    dense = joined.dense(x.dtype, factors[0] if m else None)
    return matmul(x, dense.t(), onto=xA @ B_scaled.t()), [xA, A_cast, B_scaled, factors]


def _backward(
    dy: Tensor,
    x: Tensor,
    saved: Sequence[Tensor],
    sums: tuple[Tensor | None, Tensor | None],
    joined: Joined,
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx, and the gradients of `tensors`. `sums`: for DoRA y, or the dots of `joined_gradients` made elsewhere."""
    xA, A_cast, B_scaled, factors = saved
    outs, row_scale = joined.outs, factors[0] if factors.numel() else None
    v, dB, dm = ops.joined_gradients(dy, B_scaled, xA, *sums, factors, outs, joined.scaling)
    rank = A_cast.shape[0] // len(outs)
    gradients = [*ops.matmul_tn(v, x).split(rank), *dB.split(outs)]
    if len(dm):
        gradients += dm.split(outs)
    return matmul(dy, joined.dense(dy.dtype, row_scale), onto=v @ A_cast) if need_x else None, gradients


class _Products(torch.autograd.Function):
    """y of `_forward`; saves it where there are magnitudes."""

    @staticmethod
    def forward(ctx, x: Tensor, joined: Joined, *tensors: Tensor) -> Tensor:
        y, saved = _forward(x, joined, tensors)
        ctx.joined = joined
        ctx.save_for_backward(x, y if joined.n else None, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, y, *saved = ctx.saved_tensors
        dx, gradients = _backward(dy, x, saved, (y, None), ctx.joined, ctx.needs_input_grad[0])
        return dx, None, *gradients


class _SwiGLU(torch.autograd.Function):
    """silu(gate(x)) * up(x) [tokens, out]; the sums of dm are made where the gradients of gate and up are."""

    @staticmethod
    def forward(ctx, x: Tensor, joined: Joined, *tensors: Tensor) -> Tensor:
        y, saved = _forward(x, joined, tensors)
        ctx.joined = joined
        ctx.save_for_backward(x, y, *saved)
        return ops.swiglu_joined(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor):
        x, y, *saved = ctx.saved_tensors
        dora = bool(ctx.joined.n)
        dy, dots = ops.swiglu_joined_backward(dh, y, dora)
        dx, gradients = _backward(dy, x, saved, (None, dots if dora else None), ctx.joined, ctx.needs_input_grad[0])
        return dx, None, *gradients


# ---------------------------------------------------------------- layers


def joinable(layers: Sequence[nn.Module], biased: bool = True) -> TypeGuard[Sequence[AdaptedLinear]]:
    """Whether these, which get one input, can be one product now: in training, adapters of one kind on quantized
    weights, nothing of which anybody hooks, drops out or writes into. `biased`: biases may be added to what they make.
    """
    first: Any = layers[0]
    return torch.is_grad_enabled() and all(
        isinstance(layer, AdaptedLinear)
        and _plain(layer, biased)
        and layer.scaling == first.scaling
        and layer._parameters["lora_A"].shape == first._parameters["lora_A"].shape  # type: ignore[union-attr]
        and (layer._parameters.get("magnitude") is None) == (first._parameters.get("magnitude") is None)
        for layer in layers
    )


def _plain(layer: Any, biased: bool) -> bool:
    base = layer._modules["base"]
    if type(base) is not NF4Linear or not layer.enabled or layer.copies_output:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or (layer.training and layer.dropout_p > 0):
        return False
    learns = all(p is None or p.requires_grad for p in layer._parameters.values())
    return learns and (biased or base.bias is None)


def _arguments(layers: Sequence[AdaptedLinear]) -> tuple[Joined, list[Tensor]]:
    A, B, m = zip(*(layer.factors() for layer in layers), strict=True)
    magnitudes = [one for one in m if one is not None]
    n = [layer.current_row_norms() for layer in layers] if magnitudes else []
    weights: Any = tuple(layer._modules["base"].frozen for layer in layers)  # type: ignore[union-attr]
    return Joined(weights, layers[0].scaling, n), [*A, *B, *magnitudes]


def products(x: Tensor, layers: Sequence[AdaptedLinear]) -> tuple[Tensor, ...]:
    """What each layer makes of x [..., in]: [..., out], views of one matrix where it has no bias.

    The last, v of an attention, is what the backward pass keeps of them. Where it does not keep that matrix anyway, as
    DoRA does, v is copied: a view would hold q and k as well.
    """
    x = autocast(x)
    joined, tensors = _arguments(layers)
    y = _Products.apply(x.reshape(-1, x.shape[-1]), joined, *tensors)
    parts = y.view(*x.shape[:-1], -1).split(joined.outs, dim=-1)
    parts = parts if joined.n else (*parts[:-1], parts[-1].contiguous())
    biases: Any = [layer._modules["base"].bias for layer in layers]  # type: ignore[union-attr]
    return tuple(part if bias is None else part + bias.to(part.dtype) for part, bias in zip(parts, biases, strict=True))


def swiglu(x: Tensor, gate: AdaptedLinear, up: AdaptedLinear) -> Tensor:
    """silu(gate(x)) * up(x) [..., out] of layers without a bias."""
    x = autocast(x)
    joined, tensors = _arguments((gate, up))
    hidden = _SwiGLU.apply(x.reshape(-1, x.shape[-1]), joined, *tensors)
    return hidden.view(*x.shape[:-1], -1)

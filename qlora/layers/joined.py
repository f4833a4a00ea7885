"""Adapted layers of one input as one: q, k and v of an attention, gate and up of an MLP.

On a card they are one product (`products`, `swiglu`):

    W = [W1; W2; ...]   A = [A1; A2; ...]   B = diag(B1, B2, ...)    below each other, and along a diagonal
    y = x W't + (x At) Bt                                            the equation of `adapters`, once for all of them

So a step launches for three layers what it launches for one: the weights are decoded into one matrix, the factors are
made together, and dx needs no sum. The zeros beside the diagonal cost nothing: a product of r columns takes a tile of
64 anyway. Peak memory: the dense weights of these layers together, where one by one takes the largest.

On a CPU each layer is one kernel, which reads its codes once. There one Function calls the products of each
(`one_by_one`; Unsloth does so on a card, where it saves the sums alone: about 90 launches a layer and step where one
product has 66): what it saves is autograd's and Python's time, in which all threads but one wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora.layers.adapters import AdaptedLinear, Constants, as_matrix, backward_product, forward_product
from qlora.layers.linear import NF4Linear, autocast
from qlora.layers.weight import FrozenWeight
from qlora_kernels import backends, ops


class Joined:
    """What of the layers gets no gradient and stays: their weights as the operators take them, and s. Kept by the first
    of the weights, see `_joined`.

    Attributes:
        parts, layouts: of all weights, in one list each.
        outs: the outputs of each layer.
    """

    __slots__ = ("layouts", "others", "outs", "parts", "scaling")

    def __init__(self, weights: Sequence[FrozenWeight], scaling: float):
        parts, layouts = zip(*(weight.operands for weight in weights), strict=True)
        self.parts: list[Tensor] = _flat(parts)
        self.layouts: list[int] = _flat(layouts)
        self.outs = [weight.shape[0] for weight in weights]
        self.others, self.scaling = tuple(weights[1:]), scaling  # not the first: it would keep itself

    def is_of(self, weights: Sequence[FrozenWeight], scaling: float) -> bool:
        return (
            self.scaling == scaling and len(self.others) == len(weights) - 1 and all(map(is_, self.others, weights[1:]))
        )


def _flat(lists: Sequence[list]) -> list:
    return [item for one in lists for item in one]


def _forward(
    x: Tensor, joined: Joined, n: list[Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """y [tokens, out1 + out2 + ...], and what `_backward` needs: xA, A, B and the factors of `adapted_operands`.

    `tensors`: every A, then every B, then for DoRA every m.
    """
    count = len(joined.outs)
    A, B, m = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
    operands = backends.quickly("adapted_operands", x)
    dense, A_cast, B_scaled, factors = operands(A, B, m, n, joined.scaling, joined.parts, joined.layouts, x.dtype)
    xA = x @ A_cast.t()
    return (xA @ B_scaled.t()).addmm_(x, dense.t()), (xA, A_cast, B_scaled, factors)


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
    v, dB, dm = backends.quickly("joined_gradients", dy)(dy, B_scaled, xA, *sums, factors, outs, joined.scaling)
    rank = A_cast.shape[0] // len(outs)
    gradients = [*ops.matmul_tn(v, x).split(rank), *dB.split(outs)]
    if len(dm):
        gradients += dm.split(outs)
    if not need_x:
        return None, gradients
    decode = backends.quickly("dequantize_4bit_joined", dy)
    dense = decode(joined.parts, joined.layouts, row_scale, dy.dtype)
    return (v @ A_cast).addmm_(dy, dense), gradients


class _Products(torch.autograd.Function):
    """y [tokens, out] of x [..., in] by `_forward`; saves it where there are magnitudes."""

    @staticmethod
    def forward(ctx, x: Tensor, joined: Joined, n: list[Tensor], *tensors: Tensor) -> Tensor:
        y, saved = _forward(as_matrix(x), joined, n, tensors)
        ctx.joined = joined
        ctx.save_for_backward(x, y if n else None, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, y, *saved = ctx.saved_tensors
        dx, gradients = _backward(dy, as_matrix(x), saved, (y, None), ctx.joined, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(x.shape), None, None, *gradients


class _SwiGLU(torch.autograd.Function):
    """silu(gate(x)) * up(x) [tokens, out] of x [..., in]; the sums of dm are made where the gradients of gate and up
    are.
    """

    @staticmethod
    def forward(ctx, x: Tensor, joined: Joined, n: list[Tensor], *tensors: Tensor) -> Tensor:
        y, saved = _forward(as_matrix(x), joined, n, tensors)
        ctx.joined, ctx.dora = joined, bool(n)
        ctx.save_for_backward(x, y, *saved)
        return ops.swiglu_joined(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor):
        x, y, *saved = ctx.saved_tensors
        dy, dots = ops.swiglu_joined_backward(dh, y, ctx.dora)
        sums = (None, dots if ctx.dora else None)
        dx, gradients = _backward(dy, as_matrix(x), saved, sums, ctx.joined, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(x.shape), None, None, *gradients


class _OneByOne(torch.autograd.Function):
    """y [tokens, out] of each layer, of x [..., in]: what `adapters.AdaptedProduct` makes and saves, for all of them.

    `tensors`: A, B and m of the first, then of the next.
    """

    @staticmethod
    def forward(ctx, x: Tensor, constants: list[Constants], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        flat = as_matrix(x)
        made, kept = [], []
        for i, one in enumerate(constants):
            A, B, m = tensors[3 * i : 3 * i + 3]
            y, saved = forward_product(flat, flat, A, B, m, one)  # type: ignore[arg-type]  # m alone may be None
            made.append(y)
            kept += [None if m is None else y, *saved]
        ctx.constants = constants
        ctx.save_for_backward(x, *kept)
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None):
        x, *kept = ctx.saved_tensors
        flat, size = as_matrix(x), len(kept) // len(dys)
        need_x, _, *needs = ctx.needs_input_grad
        dx: Tensor | None = None
        gradients: list[Tensor | None] = []
        for i, (dy, one) in enumerate(zip(dys, ctx.constants, strict=True)):
            if dy is None:
                gradients += [None] * 3
                continue
            y, *saved = kept[size * i : size * (i + 1)]
            wanted = (need_x, False, *needs[3 * i : 3 * i + 3])
            part, _, *own = backward_product(dy, flat, saved, y, one, wanted, True)
            gradients += own
            dx = part if dx is None or part is None else dx.add_(part)
        return None if dx is None else dx.view(x.shape), None, *gradients


# ---------------------------------------------------------------- layers


def joinable(layers: Sequence[nn.Module], biased: bool = True) -> TypeGuard[Sequence[AdaptedLinear]]:
    """Whether these, which get one input, can be one product or Function now: in training, adapters of one kind on
    quantized weights, nothing of which anybody hooks, drops out or writes into. `biased`: biases may be added to what
    they make.
    """
    if not torch.is_grad_enabled():
        return False
    kind: Any = None
    for layer in layers:
        if not isinstance(layer, AdaptedLinear) or not is_plain(layer, biased):
            return False
        A, m = layer._parameters["lora_A"], layer._parameters.get("magnitude")
        own = (layer.scaling, A.shape, m is None)  # type: ignore[union-attr]  # A is there
        if kind is None:
            kind = own
        elif own != kind:
            return False
    return True


def is_plain(layer: Any, biased: bool = True) -> bool:
    """Whether an adapted layer, whose factors all learn, makes nothing but its product, and a bias if `biased`."""
    base = layer._modules["base"]
    if type(base) is not NF4Linear or not layer.enabled or layer.copies_output:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or (layer.training and layer.dropout_p > 0):
        return False
    for parameter in layer._parameters.values():
        if parameter is not None and not parameter.requires_grad:
            return False
    return biased or base.bias is None


def _arguments(layers: Sequence[AdaptedLinear]) -> tuple[Joined, list[Tensor], list[Tensor]]:
    """What is kept of the layers, for DoRA each n, and the tensors that get gradients."""
    own: list[Any] = [layer._parameters for layer in layers]
    tensors = [one["lora_A"] for one in own] + [one["lora_B"] for one in own]
    if own[0].get("magnitude") is None:
        return _joined(layers), [], tensors
    return _joined(layers), [layer.current_row_norms() for layer in layers], tensors + [one["magnitude"] for one in own]


def _joined(layers: Sequence[AdaptedLinear]) -> Joined:
    """Made once for the same weights."""
    weights: Any = [layer._modules["base"].frozen for layer in layers]  # type: ignore[union-attr]
    first, scaling = weights[0], layers[0].scaling
    kept: Joined | None = first.joined
    if kept is None or not kept.is_of(weights, scaling):
        first.joined = kept = Joined(weights, scaling)
    return kept


def products(x: Tensor, layers: Sequence[AdaptedLinear]) -> tuple[Tensor, ...]:
    """What each layer makes of x [..., in]: [..., out], views of one matrix where it has no bias.

    The last, v of an attention, is what the backward pass keeps of them. Where it does not keep that matrix anyway, as
    DoRA does, v is copied: a view would hold q and k as well.
    """
    x = autocast(x)
    joined, n, tensors = _arguments(layers)
    y = _Products.apply(x, joined, n, *tensors)
    parts = (y if x.dim() == 2 else y.view(*x.shape[:-1], -1)).split(joined.outs, dim=-1)
    parts = parts if n else (*parts[:-1], parts[-1].contiguous())
    biases: Any = [layer._modules["base"].bias for layer in layers]  # type: ignore[union-attr]
    if not any(bias is not None for bias in biases):
        return parts
    return tuple(part if bias is None else part + bias.to(part.dtype) for part, bias in zip(parts, biases, strict=True))


def one_by_one(x: Tensor, layers: Sequence[AdaptedLinear]) -> tuple[Tensor, ...]:
    """What each layer makes of x [..., in]: [..., out]."""
    x = autocast(x)
    constants = [layer.constants(x) for layer in layers]
    made = _OneByOne.apply(x, constants, *(tensor for layer in layers for tensor in layer.factors()))
    biases: Any = [layer._modules["base"].bias for layer in layers]  # type: ignore[union-attr]
    made = [y if bias is None else y + bias.to(y.dtype) for y, bias in zip(made, biases, strict=True)]
    return tuple(made) if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in made)


def swiglu(x: Tensor, gate: AdaptedLinear, up: AdaptedLinear) -> Tensor:
    """silu(gate(x)) * up(x) [..., out] of layers without a bias."""
    x = autocast(x)
    joined, n, tensors = _arguments((gate, up))
    hidden = _SwiGLU.apply(x, joined, n, *tensors)
    return hidden if x.dim() == 2 else hidden.view(*x.shape[:-1], -1)

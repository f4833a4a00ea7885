"""What lies between the products of a decoder layer, as autograd Functions of one kernel each way.

    Normalized    y = weight * x / rms(x)              saves x and one number a row        (arXiv:1910.07467)
    SumAndNorm    h = x + y, and its norm              saves h and one number a row
    Gated         act(gate) * up                       saves gate and up, no product       (arXiv:2002.05202)
    GatedLayers   act(gate(x)) * up(x), of adapters    the same, and makes the sums of dm where it has gate and up
    Rotation      q, k turned by their positions       saves cos and sin                   (arXiv:2104.09864)

`fused` has the modules, `decoder` a whole layer. The alternative, PyTorch's chains of elementwise operators, writes and
reads each tensor several times, and keeps some of what lies between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.layers.adapters import Constants, as_matrix, backward_product, forward_product, row_scale_and_m
from qlora_kernels import backends, ops


class Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = backends.quickly("rms_norm", x)(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return backends.quickly("rms_norm_backward", dy)(dy, *ctx.saved_tensors), None, None


class SumAndNorm(torch.autograd.Function):
    """h = x + y, or x itself without y, and its RMSNorm, of one shape [..., n]. Saves h and one number a row; what the
    gradient of h brings is added as that of the norm is made.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        h = x
        if y is None:
            normal, inverse = backends.quickly("rms_norm", x)(as_matrix(x), weight, eps)
        else:
            add_rms_norm = backends.quickly("add_rms_norm", x)
            h, normal, inverse = add_rms_norm(as_matrix(x), as_matrix(y), weight, eps)
            h = h.view(x.shape)
        ctx.save_for_backward(h, weight, inverse)
        ctx.adds = y is not None
        ctx.set_materialize_grads(False)
        return h, normal.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor | None, dnormal: Tensor | None):
        h, weight, inverse = ctx.saved_tensors
        dx = dh
        if dnormal is not None:
            of_norm = (as_matrix(dnormal), as_matrix(h), weight, inverse)
            if dh is None:
                dx = backends.quickly("rms_norm_backward", h)(*of_norm).view(h.shape)
            else:
                dx = backends.quickly("rms_norm_backward_add", h)(*of_norm, as_matrix(dh)).view(h.shape)
        return dx, dx if ctx.adds else None, None, None


class Sum(torch.autograd.Function):
    """x + y, in memory for what comes and goes."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y, out=backends.empty(*x.shape, like=x))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return dy, dy


@dataclass(frozen=True)
class GatedProduct:
    """The operators of act(gate) * up."""

    value: Callable[[Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # of dy, gate, up: those of gate and of up
    gradients_and_dots: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # as `swiglu_backward_dots`


def _geglu_backward_dots(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In passes of their own, which no kernel has joined."""
    dgate, dup = ops.geglu_backward(dy, gate, up)
    return dgate, dup, torch.stack((ops.columnwise_dot(dgate, gate), ops.columnwise_dot(dup, up)))


def _quickly(name: str) -> Callable:
    return lambda *tensors: backends.quickly(name, tensors[0])(*tensors)


GATED_PRODUCTS = {  # by the name of the activation, see `transformers_code.activation_of`
    "silu": GatedProduct(*map(_quickly, ("swiglu", "swiglu_backward", "swiglu_backward_dots"))),
    "gelu_tanh": GatedProduct(_quickly("geglu"), _quickly("geglu_backward"), _geglu_backward_dots),
}


class Gated(torch.autograd.Function):
    """act(gate) * up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return GATED_PRODUCTS[activation].value(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return *GATED_PRODUCTS[ctx.activation].gradients(dy, *ctx.saved_tensors), None


class GatedLayers(torch.autograd.Function):
    """act(gate(x)) * up(x) of two adapted layers: h [tokens, n]; and gate(x) and up(x), without a gradient.

    Of DoRA layers dm_j = sum_t dy_tj y_tj / m_j is summed as the gradients dy of gate and up are made, while both are
    at hand; each layer by itself would save its y and read both again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gate: Constants, up: Constants, activation: str, *tensors: Any):
        """`tensors`: of gate, then of up, the adapter's input, A, B and m; both have an m, or neither."""
        x_gate, x_up = tensors[0], tensors[4]
        A_gate, B_gate, m_gate, A_up, B_up, m_up = *tensors[1:4], *tensors[5:8]
        y_gate, saved_gate = forward_product(x, x_gate, A_gate, B_gate, m_gate, gate)
        y_up, saved_up = forward_product(x, x_up, A_up, B_up, m_up, up)
        ctx.constants, ctx.shared, ctx.activation = (gate, up), (x_gate is x, x_up is x), activation
        ctx.save_for_backward(x_gate, x_up, y_gate, y_up, *saved_gate, *saved_up)
        ctx.saved_by_gate, ctx.scaled = len(saved_gate), m_gate is not None
        ctx.mark_non_differentiable(y_gate, y_up)
        ctx.set_materialize_grads(False)
        return GATED_PRODUCTS[activation].value(y_gate, y_up), y_gate, y_up

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor, _gate: None, _up: None):
        x_gate, x_up, y_gate, y_up, *saved = ctx.saved_tensors
        of_gate, of_up = saved[: ctx.saved_by_gate], saved[ctx.saved_by_gate :]
        product = GATED_PRODUCTS[ctx.activation]
        gradients = product.gradients_and_dots if ctx.scaled else product.gradients
        dgate, dup, *dots = gradients(dh, y_gate, y_up)
        need_x, _, _, _, *needs = ctx.needs_input_grad
        (gate, up), (gate_shared, up_shared) = ctx.constants, ctx.shared
        wanted: tuple[bool, ...] = (need_x, *needs[4:7], False)
        dx_up, *up_gradients, _ = backward_product(dup, x_up, of_up, None, up, wanted, up_shared)
        del dup
        wanted = (need_x, *needs[:3], False)
        dx, *gate_gradients, _ = backward_product(dgate, x_gate, of_gate, None, gate, wanted, gate_shared)
        if dx is not None and dx_up is not None:
            dx += dx_up
        dm_gate = dm_up = None
        if ctx.scaled:
            m_gate, m_up = (cast(Tensor, row_scale_and_m(part)[1]) for part in (of_gate, of_up))
            dm_gate, dm_up = dots[0][0] / m_gate, dots[0][1] / m_up
        return dx, None, None, None, *gate_gradients, dm_gate, *up_gradients, dm_up


class Rotation(torch.autograd.Function):
    """x cos + rotate_half(x) sin, rotate_half(a, b) = (-b, a), of q [b, heads, t, D] and k [b, groups, t, D]; the
    gradient is turned back.

    cos, sin [b or 1, t, D]. In memory the results are [b, t, heads, D], as attention reads them best.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        cos, sin = (x.reshape(-1, x.shape[-1]) for x in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return _by_head(backends.quickly("rotate", q)(_by_token(q), _by_token(k), cos, sin), q.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor):
        turn_back = backends.quickly("rotate_backward", dq)
        turned = turn_back(_by_token(dq), _by_token(dk), *ctx.saved_tensors)
        return *_by_head(turned, dq.shape[0]), None, None


def _by_token(x: Tensor) -> Tensor:
    """[b, heads, t, D] -> [b t, heads, D]"""
    return x.transpose(1, 2).flatten(0, 1)


def _by_head(parts: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    return tuple(x.unflatten(0, (batch, -1)).transpose(1, 2) for x in parts)

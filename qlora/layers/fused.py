"""RMSNorm, the gated product of an MLP and the rotation of an attention in one kernel each, in place of transformers'
chains of elementwise operations.

    RMSNorm          y = weight * x / rms(x)             saves x and one number a row        (arXiv:1910.07467)
    GatedMLP         y = down(act(gate(x)) * up(x))      saves gate(x) and up(x), no product (arXiv:2002.05202)
    RotaryAttention  q, k turned by their positions      saves cos and sin                   (arXiv:2104.09864)
    ResidualLayer    x + attention(norm(x)), likewise the MLP: a sum and its norm in one pass, on a CPU

Where gate and up are adapted, one autograd Function owns both (`GatedLayers`): it sums the gradients of their
magnitudes in the pass over gate and up that the gradient of the product makes anyway. Adapters of one input are one
Function, and on a card one product (`joined`).

`fuse` replaces a module where the code of its forward is known (`transformers_code`), so what is replaced computes the
same by construction and no list of architectures is kept. The alternative, `torch.compile` of these modules, is as fast
but takes long at the first step of every process and needs a compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora.layers import joined, transformers_code
from qlora.layers.adapters import (
    AdaptedLinear,
    Constants,
    Recomputed,
    as_matrix,
    backward_product,
    forward_product,
    row_scale_and_m,
)
from qlora.layers.linear import autocast
from qlora.models.transformers_seam import attention_implementation
from qlora_kernels import backends, ops


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = backends.quickly("rms_norm", x)(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return backends.quickly("rms_norm_backward", dy)(dy, *ctx.saved_tensors), None, None


class _SumAndNorm(torch.autograd.Function):
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


class _Sum(torch.autograd.Function):
    """x + y, in memory for what comes and goes."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y, out=backends.empty(*x.shape, like=x))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return dy, dy


class RMSNorm(nn.Module):
    """[..., n] -> [..., n], over the last dimension. `weight` is frozen."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:  # somebody unfroze it: torch's own, which knows its gradient
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


def sum_and_norm(x: Tensor, y: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """h = x + y, or x without y, and norm(h)."""
    alike = x.dtype == norm.weight.dtype and (y is None or (y.dtype == x.dtype and y.shape == x.shape))
    if not alike or norm.weight.requires_grad or norm._forward_hooks or norm._forward_pre_hooks:
        h = x if y is None else x + y
        return h, norm(h)
    return _SumAndNorm.apply(x, y, norm.weight, norm.eps)


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


class _Gated(torch.autograd.Function):
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
    def forward(ctx, x: Tensor, gate: Constants, up: Constants, activation: str, *tensors: Tensor):
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


class GatedMLP(nn.Module):
    """[..., width] -> [..., width]; the projections are the original's and keep their names.

    `activation` is a name in `GATED_PRODUCTS`: silu, or in Gemma's models gelu by its tanh approximation. (Their
    RMSNorm, (1 + weight) x / rms(x), is another function and left alone.)
    """

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: str, join: bool = False
    ):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.activation = gate_proj, up_proj, down_proj, activation
        self.join = join and activation == "silu"

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if self.join and joined.joinable((gate, up), biased=False):
            return self.down_proj(_in_eager(joined.swiglu)(x, gate, up))
        if torch.is_grad_enabled() and _gateable(gate) and _gateable(up) and _scaled(gate) == _scaled(up):
            hidden, *made_of = _in_eager(gated_layers)(x, gate, up, self.activation)
        else:
            made_of = [gate(x), up(x)]
            hidden = _Gated.apply(*made_of, self.activation)
        down = self.down_proj
        if not (isinstance(down, AdaptedLinear) and torch.is_grad_enabled()) or down._forward_pre_hooks:
            del made_of  # else they are held until down has run
            return down(hidden)
        value = GATED_PRODUCTS[self.activation].value
        return down(hidden, Recomputed(value, tuple(as_matrix(part.detach()) for part in made_of)))


def gated_layers(x: Tensor, gate: AdaptedLinear, up: AdaptedLinear, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """act(gate(x)) * up(x) [..., n] of `_gateable` layers, and gate(x) and up(x) [tokens, n]."""
    x = autocast(x)
    flat = as_matrix(x)
    constants, tensors = [], []
    for layer in (gate, up):
        constants.append(layer.constants(flat))
        tensors += [layer.adapter_input(flat), *layer.factors()]
    hidden, *made_of = GatedLayers.apply(flat, *constants, activation, *tensors)
    return hidden.view(*x.shape[:-1], -1), *made_of


def _in_eager(function: Callable) -> Callable:
    """What a graph of torch.compile calls from outside of itself, see `adapters`."""
    return _not_compiled[function] if torch.compiler.is_compiling() else function


_not_compiled = {
    function: torch.compiler.disable(function)
    for function in (gated_layers, joined.products, joined.one_by_one, joined.swiglu)
}


def _gateable(layer: nn.Module) -> TypeGuard[AdaptedLinear]:
    """Whether the output of this layer is the adapted product itself, and its m, if it has one, learns."""
    if not isinstance(layer, AdaptedLinear) or not layer.enabled or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    magnitude = layer._parameters.get("magnitude")
    return layer.base.bias is None and (magnitude is None or magnitude.requires_grad)


def _scaled(layer: AdaptedLinear) -> bool:
    return layer._parameters.get("magnitude") is not None


class _Rotation(torch.autograd.Function):
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


class RotaryAttention:
    """Mixed into an attention class of transformers (`_fused_class`): its forward, with the rotation in one kernel.

    The module keeps its class, parameters, hooks and names, so whatever looks for the class finds it.
    """

    form: transformers_code.AttentionForm
    join: bool

    def forward(
        self: Any, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
    ):
        shape, form = (*hidden_states.shape[:-1], -1, self.head_dim), self.form
        q, k, v = (part.view(shape) for part in self.projected(hidden_states))
        if form.norms:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = self.rotated(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if form.window == "config":
            kwargs["sliding_window"] = getattr(self.config, "sliding_window", None)
        elif form.window == "module":
            kwargs["sliding_window"] = self.sliding_window
        eager = self.home().eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(attention_implementation(self), eager)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attention(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*shape[:-2], -1).contiguous()), weights

    def projected(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        layers = self.q_proj, self.k_proj, self.v_proj
        if joined.joinable(layers):
            return _in_eager(joined.products if self.join else joined.one_by_one)(x, layers)
        return tuple(layer(x) for layer in layers)

    def rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        whole = cos.dim() == 3 and cos.shape[1:] == q.shape[2:] and cos.shape[0] in (1, q.shape[0])
        if whole and q.dtype == k.dtype == cos.dtype:
            return _Rotation.apply(q, k, cos, sin)
        return self.home().apply_rotary_pos_emb(q, k, cos, sin)  # a part of each head, mixed types: as before

    @classmethod
    def home(cls) -> Any:
        """The file of transformers that the class comes from."""
        return sys.modules[cls.__mro__[2].__module__]

    def __reduce_ex__(self, protocol):  # a class made here has no name to be pickled by
        return _rebuild, (RotaryAttention, type(self).__mro__[2], self.form, super().__reduce_ex__(protocol)[2])


class ResidualLayer:
    """Mixed into a decoder layer's class of transformers, as RotaryAttention into an attention: its forward, with each
    sum in one pass with the norm behind it, and the sum's gradient with the norm's.
    """

    form: None

    def forward(
        self: Any,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        kwargs |= {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
        }
        x, before, behind = hidden_states, self.input_layernorm, self.post_attention_layernorm
        norms = isinstance(before, RMSNorm) and isinstance(behind, RMSNorm)
        if not norms or not backends.has_sum_and_norm(x.device) or torch.compiler.is_compiling():
            return super().forward(x, **kwargs)  # type: ignore[misc]  # of the class that this is mixed into
        x, normal = sum_and_norm(x, None, before)
        attended, _ = self.self_attn(hidden_states=normal, **kwargs)
        x, normal = sum_and_norm(x, attended, behind)
        y = self.mlp(normal)
        return _Sum.apply(x, y) if y.dtype == x.dtype and y.shape == x.shape else x + y

    def __reduce_ex__(self, protocol):
        return _rebuild, (ResidualLayer, type(self).__mro__[2], self.form, super().__reduce_ex__(protocol)[2])


Form = transformers_code.AttentionForm | None
_classes: dict[type, type] = {}


def _fused_class(mixin: type, base: type, form: Form) -> type:
    """The class of `base` with the forward of `mixin`: made once, so that modules of one class share it."""
    if base not in _classes:
        _classes[base] = type(f"{mixin.__name__}Of{base.__name__}", (mixin, base), {"form": form})
    return _classes[base]


def _rebuild(mixin: type, base: type, form: Form, state: dict[str, Any]) -> nn.Module:
    module: Any = object.__new__(_fused_class(mixin, base, form))
    module.__setstate__(state)
    return module


def fuse(model: nn.Module, join: bool = False) -> nn.Module:
    """Replace, in place, every RMSNorm, gated MLP, rotary attention and decoder layer whose code is known; returns
    `model`.

    `join`: adapted layers of one input are one product, see `joined`; `backends.has_joined_products` knows where.
    """
    for name, module in list(model.named_modules()):
        kind = transformers_code.kind_of(module)
        if kind == "rms_norm":
            _replace(model, name, RMSNorm(module.weight, module.variance_epsilon))
        elif isinstance(kind, transformers_code.GatedForm):
            _replace(model, name, GatedMLP(module.gate_proj, module.up_proj, module.down_proj, kind.activation, join))
        elif isinstance(kind, transformers_code.AttentionForm):
            module.__class__ = _fused_class(RotaryAttention, type(module), kind)
            module.join = join
        elif kind == "residual":
            module.__class__ = _fused_class(ResidualLayer, type(module), None)
    return model


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    model.set_submodule(name, replacement.train(model.get_submodule(name).training))

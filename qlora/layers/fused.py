"""RMSNorm, the gated product of an MLP and the rotation of an attention in one kernel each, in place of transformers'
chains of elementwise operations.

    RMSNorm          y = weight * x / rms(x)             saves x and one number a row        (arXiv:1910.07467)
    GatedMLP         y = down(act(gate(x)) * up(x))      saves gate(x) and up(x), no product (arXiv:2002.05202)
    RotaryAttention  q, k turned by their positions      saves cos and sin                   (arXiv:2104.09864)
    ResidualLayer    x + attention(norm(x)), likewise the MLP: on a CPU a sum and its norm in one pass, and in
                     training the whole layer in one Function (`decoder`)

Where gate and up are adapted, one autograd Function owns both (`GatedLayers`): it sums the gradients of their
magnitudes in the pass over gate and up that the gradient of the product makes anyway. Adapters of one input are one
Function, and on a card one product (`joined`). The Functions are in `functions`; here is when a module may call them.

`fuse` replaces a module where the code of its forward is known (`transformers_code`), so what is replaced computes the
same by construction and no list of architectures is kept. The alternative, `torch.compile` of these modules, is as fast
but takes long at the first step of every process and needs a compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora.layers import joined, transformers_code
from qlora.layers.adapters import AdaptedLinear, Recomputed, as_matrix
from qlora.layers.attention import NAME, takes_whole
from qlora.layers.decoder import PROJECTIONS, as_projection, whole_layer
from qlora.layers.functions import GATED_PRODUCTS, Gated, GatedLayers, Normalized, Rotation, Sum, SumAndNorm
from qlora.layers.linear import autocast
from qlora.models.transformers_seam import attention_implementation
from qlora_kernels import backends
from qlora_kernels.cpu.decoder import Layer, Norm


class RMSNorm(nn.Module):
    """[..., n] -> [..., n], over the last dimension. `weight` is frozen."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:  # somebody unfroze it: torch's own, which knows its gradient
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return Normalized.apply(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


def sum_and_norm(x: Tensor, y: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """h = x + y, or x without y, and norm(h)."""
    alike = x.dtype == norm.weight.dtype and (y is None or (y.dtype == x.dtype and y.shape == x.shape))
    if not alike or norm.weight.requires_grad or norm._forward_hooks or norm._forward_pre_hooks:
        h = x if y is None else x + y
        return h, norm(h)
    return SumAndNorm.apply(x, y, norm.weight, norm.eps)


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
            hidden = Gated.apply(*made_of, self.activation)
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
        if form.window:
            kwargs["sliding_window"] = self.window()
        eager = self.home().eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(attention_implementation(self), eager)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attention(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*shape[:-2], -1).contiguous()), weights

    def is_of_borders(self: Any, x: Tensor, options: dict[str, Any]) -> bool:
        """Whether with these options, for x [b, t, width], the attention comes down to the rotation and
        `ops.attention` of packed examples.
        """
        positions = options["position_embeddings"]
        if positions is None or options["past_key_values"] is not None or x.dim() != 3:
            return False
        cos, _ = positions
        rotates = cos.shape == (1, x.shape[1], self.head_dim) and cos.dtype == x.dtype
        if not rotates or x.shape[0] != 1 or x.shape[2] < self.head_dim or (self.training and self.attention_dropout):
            return False
        return attention_implementation(self) == NAME and takes_whole(options, self.window())

    def window(self: Any) -> int | None:
        """How many tokens a token sees; None: all before it."""
        if self.form.window == "config":
            return getattr(self.config, "sliding_window", None)
        return self.sliding_window if self.form.window else None

    def projected(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        layers = self.q_proj, self.k_proj, self.v_proj
        if joined.joinable(layers):
            return _in_eager(joined.products if self.join else joined.one_by_one)(x, layers)
        return tuple(layer(x) for layer in layers)

    def rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        whole = cos.dim() == 3 and cos.shape[1:] == q.shape[2:] and cos.shape[0] in (1, q.shape[0])
        if whole and q.dtype == k.dtype == cos.dtype:
            return Rotation.apply(q, k, cos, sin)
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
        layer = self.as_a_whole(x, kwargs)
        if layer is not None:
            return whole_layer(x, layer, _projections(self))
        x, normal = sum_and_norm(x, None, before)
        attended, _ = self.self_attn(hidden_states=normal, **kwargs)
        x, normal = sum_and_norm(x, attended, behind)
        y = self.mlp(normal)
        return Sum.apply(x, y) if y.dtype == x.dtype and y.shape == x.shape else x + y

    def as_a_whole(self: Any, x: Tensor, options: dict[str, Any]) -> Layer | None:
        """The layer as one `DecoderLayer` computes it, or None: in training, with adapters on all projections, and
        nothing that anybody hooks, drops out, or has given another form.
        """
        known = isinstance(self.self_attn, RotaryAttention) and isinstance(self.mlp, GatedMLP)
        if not known or not torch.is_grad_enabled() or not backends.has_decoder_layer(x):
            return None
        attention, mlp, projections = self.self_attn, self.mlp, _projections(self)
        before, behind = self.input_layernorm, self.post_attention_layernorm
        if mlp.activation != "silu" or attention.join or mlp.join:
            return None
        if not all(isinstance(one, AdaptedLinear) and joined.is_plain(one) for one in projections):
            return None
        biases = [one.base.bias for one in projections]
        if any(bias is not None and bias.requires_grad for bias in biases):
            return None
        of_heads = (attention.q_norm, attention.k_norm) if attention.form.norms else ()
        norms = (before, behind, *of_heads)
        if not all(isinstance(norm, RMSNorm) and not norm.weight.requires_grad for norm in norms):
            return None
        if autocast(x) is not x:
            return None
        modules = (attention, mlp, *norms, *projections)
        if has_any_global_hook() or any(map(_is_hooked, modules)) or not attention.is_of_borders(x, options):
            return None
        cos, sin = (part[0] for part in options["position_embeddings"])
        layer = Layer(
            (*(Norm(norm.weight, norm.eps) for norm in norms), *(() if of_heads else (None, None))),
            [as_projection(one) for one in projections],
            attention.head_dim,
            cos,
            sin,
            options["cu_seq_lens_q"].tolist(),
            attention.scaling,
        )
        return layer if backends.supports_decoder_layer(as_matrix(x), layer) else None

    def __reduce_ex__(self, protocol):
        return _rebuild, (ResidualLayer, type(self).__mro__[2], self.form, super().__reduce_ex__(protocol)[2])


def _projections(layer: nn.Module) -> tuple[Any, ...]:
    """Those of `decoder.PROJECTIONS`; past `Module.__getattr__`, since each layer is asked in each step."""
    modules = layer._modules
    parts = {**modules["self_attn"]._modules, **modules["mlp"]._modules}  # type: ignore[union-attr]  # both are there
    return tuple(parts.get(name) for name in PROJECTIONS)


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what goes through a module, or has put another forward on it."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


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

"""RMSNorm and the gated product of an MLP in one kernel each, in place of transformers' chains of elementwise
operations.

    RMSNorm    y = weight * x / rms(x)             saves x and one number a row        (arXiv:1910.07467)
    GatedMLP   y = down(silu(gate(x)) * up(x))     saves gate(x) and up(x)             (arXiv:2002.05202)
               and sums DoRA's magnitude gradients of gate and up in the pass over them that its gradient makes anyway
    rotation   y = x cos + (-x2, x1) sin           saves cos and sin                      (arXiv:2104.09864)

PyTorch has no fused CPU kernel for any, and its chains save three to five tensors each. `fuse` replaces a module only
if the replacement computes what the module computes, which it tries, so no list of architectures is kept. The
alternative, `torch.compile` of these modules, is as fast but takes 20 seconds and a compiler at the first step of every
process.
"""

from __future__ import annotations

from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_kernels import ops


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = ops.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return ops.rms_norm_backward(dy, *ctx.saved_tensors), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Where gate and up are DoRA's y, also the gradients of their magnitudes, from the guarded m that
    made them:
    dm_j = sum_t dy_tj y_tj / m_j, summed while both are at hand (`adapters.AdaptedProduct` would save y and read both
    again).
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, gate_m=None, up_m=None, gate_safe=None, up_safe=None) -> Tensor:
        ctx.save_for_backward(gate, up, gate_safe, up_safe)
        return ops.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up, gate_safe, up_safe = ctx.saved_tensors
        if gate_safe is None:
            return *ops.swiglu_backward(dy, gate, up), None, None, None, None
        width = gate.shape[-1]
        dgate, dup, dots = ops.swiglu_backward_dots(*(part.reshape(-1, width) for part in (dy, gate, up)))
        return dgate.view(gate.shape), dup.view(up.shape), dots[0] / gate_safe, dots[1] / up_safe, None, None


class _Rotation(torch.autograd.Function):
    """x cos + rotate_half(x) sin, rotate_half(a, b) = (-b, a), of q [b, heads, t, D] and k [b, groups, t, D]; the
    gradient is turned back.

    cos, sin [b or 1, t, D]. In memory the results are [b, t, heads, D], as attention reads them best. arXiv:2104.09864.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        cos, sin = (x.reshape(-1, x.shape[-1]) for x in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return _by_head(ops.rotate(_by_token(q), _by_token(k), cos, sin), q.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor):
        return *_by_head(ops.rotate_backward(_by_token(dq), _by_token(dk), *ctx.saved_tensors), dq.shape[0]), None, None


def _by_token(x: Tensor) -> Tensor:
    """[b, heads, t, D] -> [b t, heads, D]"""
    return x.transpose(1, 2).flatten(0, 1)


def _by_head(parts: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    return tuple(x.unflatten(0, (batch, -1)).transpose(1, 2) for x in parts)


class RMSNorm(nn.Module):
    """[..., n] -> [..., n], over the last dimension. `weight` is frozen."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:  # somebody unfroze it: torch's own, which knows its gradient
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


class GatedMLP(nn.Module):
    """[..., width] -> [..., width]; the projections are the original's and keep their names."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if torch.is_grad_enabled() and all(getattr(part, "lends", bool)() for part in (gate, up)):
            lent: list[Tensor] = []
            hidden = _SwiGLU.apply(gate(x, lend=lent), up(x, lend=lent), gate.magnitude, up.magnitude, *lent)
        else:
            hidden = _SwiGLU.apply(gate(x), up(x))
        return self.down_proj(hidden)


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """Replace, in place, every RMSNorm and SwiGLU module and rotation of `model` whose result we reproduce; returns the
    model.
    """
    for name, module in list(model.named_modules()):
        _rotate_in(module)
        replacement = _rms_norm(module) or _gated_mlp(module)
        if replacement is not None:
            model.set_submodule(name, replacement.train(module.training))
    return model


def _rms_norm(module: nn.Module) -> RMSNorm | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or isinstance(module, RMSNorm) or not isinstance(eps, float):
        return None
    if set(module._parameters) != {"weight"} or module.weight.dim() != 1 or module._buffers:
        return None
    fused = RMSNorm(module.weight, eps)
    return fused if _agree(module, fused, module.weight.shape[0], module.weight) else None


def _gated_mlp(module: nn.Module) -> GatedMLP | None:
    names = ("gate_proj", "up_proj", "down_proj")
    if (
        isinstance(module, GatedMLP)
        or set(module._modules) - {"act_fn"} != set(names)
        or module._parameters
        or module._buffers
    ):
        return None
    projections = [module._modules[name] for name in names]
    fused = GatedMLP(*projections)
    # The projections stay out of the comparison: three different factors stand in for them.
    for part in (module, fused):
        part._modules.update(zip(names, map(_Times, (2.0, 3.0, 5.0))))
    agree = _agree(module, fused, 16, next(projections[0].parameters(), torch.empty(0)))
    for part in (module, fused):
        part._modules.update(zip(names, projections))
    return fused if agree else None


def _rotate_in(module: nn.Module) -> None:
    """Let `forward` of this module alone call ours in the place of its file's `apply_rotary_pos_emb`, where the two
    agree.

    The alternative, to put ours into that file's module, would change every model of the process.
    """
    name, forward = "apply_rotary_pos_emb", type(module).forward
    if name not in getattr(getattr(forward, "__code__", None), "co_names", ()) or name not in forward.__globals__:
        return
    theirs = forward.__globals__[name]

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest, **named):
        whole = cos.dim() == 3 and cos.shape[1:] == q.shape[2:] and cos.shape[0] in (1, q.shape[0])
        if rest or named or not whole or not q.dtype == k.dtype == cos.dtype:  # a part of each head, mixed types
            return theirs(q, k, cos, sin, *rest, **named)
        return _Rotation.apply(q, k, cos, sin)

    x = torch.linspace(-3, 2, 240).view(2, 3, 5, 8)
    try:
        expected = theirs(x, x[:, :1], *x[:, 1:].unbind(1))
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it takes other arguments
        return
    if all(map(torch.allclose, rotated(x, x[:, :1], *x[:, 1:].unbind(1)), expected)):
        copy = FunctionType(
            forward.__code__,
            {**forward.__globals__, name: rotated},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        copy.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(copy, module)


class _Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _agree(module: nn.Module, fused: nn.Module, width: int, like: Tensor) -> bool:
    dtype = like.dtype if like.dtype.is_floating_point else torch.float32
    device = "cpu" if like.is_meta else like.device  # `plan` fuses a model without values
    x = torch.linspace(-3, 2, 3 * width, dtype=dtype, device=device).view(3, width)
    try:
        expected = module(x)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it takes more than one tensor
        return False
    found = fused(x)
    # Of what is told apart here, the least differs by thousandths; the exponential of a GPU by 1e-6.
    closeness = max(4 * torch.finfo(dtype).eps, 4e-6 if dtype == torch.float32 else 0)
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=closeness, atol=closeness / 4)

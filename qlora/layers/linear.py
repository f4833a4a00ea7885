"""Linear layers over a frozen weight that may be quantized.

    y = x Wt + bias        dx = dy W        (W is frozen: nothing flows into it)

`NF4Linear` keeps the parts of a quantized weight as buffers; its autograd Function remembers the codes, never a dense
weight, and decodes again in the backward pass. Plain buffers need one special case: `_apply` must not cast the float32
constants when a model is cast to bfloat16. `NF4Linear.from_linear` and `quantize_` quantize what is in memory; loading
a checkpoint quantizes tensor by tensor (`models.quantize`). The alternative, a tensor subclass, see `weight`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from qlora.errors import UserError, problem
from qlora.layers import nf4, transformers_code
from qlora.layers.weight import FrozenWeight
from qlora.models.saver import saves_what_loads
from qlora.specs import Quantization
from qlora_kernels.weight import NESTED_BLOCKSIZE, QuantizedWeight

DEFAULT = Quantization()


class NF4Linear(nn.Module):
    """`nn.Linear` with a frozen NF4 weight. Input [..., in], output [..., out] in the input's dtype.

    Buffers as bitsandbytes names them: `weight` (the codes), `absmax`, `nested_absmax`, `nested_offset`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, blocksize: int = 64, double_quant: bool = True
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.blocksize = blocksize
        elements = in_features * out_features
        blocks = -(-elements // blocksize)
        self.register_buffer("weight", torch.empty((elements + 1) // 2, 1, dtype=torch.uint8))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32))
        nested = -(-blocks // NESTED_BLOCKSIZE)
        self.register_buffer("nested_absmax", torch.empty(nested) if double_quant else None)
        self.register_buffer("nested_offset", torch.empty(()) if double_quant else None)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, layer: nn.Module, quantization: Quantization = DEFAULT, name: str = "weight") -> NF4Linear:
        """The NF4 form of `nn.Linear` or `Conv1D`; the bias is shared, not copied.

        Raises:
            UserError: see `nf4.quantize`; `name` stands in its messages.
        """
        given = quantization.resolved()
        dense, scales = frozen_weight(layer).dense_weight.contiguous(), given.scales or "absmax"
        weight = nf4.quantize(dense, given.blocksize, given.double_quant, name, scales)
        out, columns = weight.shape
        with torch.device("meta"):
            made = cls(columns, out, blocksize=given.blocksize, double_quant=given.double_quant)
        made.quantized = weight
        bias: nn.Parameter | None = getattr(layer, "bias", None)
        if bias is not None:
            bias.requires_grad_(False)
            made.bias = bias
        return made.train(layer.training)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight; shares the buffers' memory."""
        weight = self.frozen.quantized
        assert weight is not None
        return weight

    @quantized.setter
    def quantized(self, weight: QuantizedWeight) -> None:
        self.weight, self.absmax = weight.packed, weight.absmax
        self.nested_absmax, self.nested_offset = weight.nested_absmax, weight.nested_offset
        self.blocksize = weight.blocksize

    @property
    def frozen(self) -> FrozenWeight:
        """The view of the weight that products use, made anew only when a buffer was replaced (by a load, `.to()`, the
        setter): a training step asks twice a layer.
        """
        buffers: dict[str, Any] = self._buffers
        view = self.__dict__.get("_view")
        found = (buffers["weight"], buffers["absmax"], buffers["nested_absmax"], buffers["nested_offset"])
        if view is None or any(map(_differ, found, view[0])):
            constants = found[1:] if found[2] is not None else found[1:2]
            shape = (self.out_features, self.in_features)
            view = found, FrozenWeight(QuantizedWeight.of(found[0], constants, shape, self.blocksize))
            self.__dict__["_view"] = view
        return view[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_view"}

    def _apply(self, fn, recurse: bool = True):
        # `model.to(bfloat16)` casts floating buffers. The constants must stay float32, so they pass through as bytes.
        constants = {name: b for name, b in self._buffers.items() if b is not None and b.dtype == torch.float32}
        for name, buffer in constants.items():
            self._buffers[name] = buffer.reshape(-1).view(torch.uint8)
        super()._apply(fn, recurse)
        for name, buffer in constants.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = moved.view(torch.float32).view(buffer.shape)
        return self

    def forward(self, x: Tensor) -> Tensor:
        x, weight = autocast(x), self.frozen
        if weight.uses_gemv(x):
            y = weight.gemv(x.reshape(-1))
            y = y if self.bias is None else y + self.bias
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        return _FrozenLinear.apply(x, weight, self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, blocksize={self.blocksize}"


def _differ(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not two


LINEAR = (nn.Linear, NF4Linear, Conv1D)  # the layers that can be quantized or adapted, see `is_linear`


def is_linear(module: nn.Module) -> bool:
    """Whether this module computes x Wt + bias and no more: one of LINEAR, or a subclass whose forward is its own.

    Routers of transformers are subclasses that return more; the output layer of torch's attention is one whose weight
    is read past its forward.
    """
    kind: Any = type(module)
    if kind in LINEAR:
        return True
    if isinstance(module, NonDynamicallyQuantizableLinear) or not isinstance(module, LINEAR):
        return False
    own = kind.forward in (nn.Linear.forward, NF4Linear.forward, Conv1D.forward)
    return own or transformers_code.is_linear_code(kind)


def frozen_weight(layer: nn.Module) -> FrozenWeight:
    """The weight [out, in] of `nn.Linear`, `NF4Linear`, or GPT-2's `Conv1D`, which stores it transposed."""
    if isinstance(layer, NF4Linear):
        return layer.frozen
    weight: Tensor = cast(Tensor, layer.weight).detach()
    return FrozenWeight(weight.t() if isinstance(layer, Conv1D) else weight)


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer but the output head and what is `left_alone`."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head, alone = None if find is None else find(), left_alone(model)
    return [
        name
        for name, module in model.named_modules()
        if name and is_linear(module) and module is not head and name not in alone
    ]


def no_linear(model: nn.Module) -> str:
    """The line that refuses a module without a layer for us."""
    rule = "has no linear layer beneath it but its output head"
    return problem("model", type(model).__name__, rule, "Give the whole model; a layer alone: nn.Sequential(layer)")


READ = "the model's own code reads its weight"
TIED = "it shares its weight with another layer"


def left_alone(model: nn.Module) -> dict[str, str]:
    """The linear layers that are neither quantized nor adapted, by name, and why.

    Code that reads `layer.weight` would find codes in it, and go past the adapter (Mamba's mixers, the indexers of
    DeepSeek-V3.2). transformers ties parameters, and codes are none (Zamba's shared block).
    """
    modules = dict(model.named_modules())
    found = {name for name, module in modules.items() if is_linear(module)}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    embeddings = {name for name, module in modules.items() if isinstance(module, nn.Embedding)}
    ends = [{layer.removesuffix(".weight") for layer in pair} for pair in tied.items()]
    reasons = {layer: TIED for pair in ends for layer in pair if layer in found and not pair & embeddings}
    for name, module in modules.items():
        for path, whole in transformers_code.weights_read(module.__class__):
            inner = f"{name}." if name else ""
            if whole:
                reasons |= {layer: READ for layer in (inner + path,) if layer in found}
            else:
                reasons |= {
                    layer: READ for layer in found if layer.startswith(inner) and f".{layer}".endswith(f".{path}")
                }
    return reasons


def quantize_(module: nn.Module, quantization: Quantization = DEFAULT) -> nn.Module:
    """Quantize every linear layer of a module in memory but its output head, in place; returns the module.

    Peak memory: the module, and one layer twice. What is quantized already stays.

    Raises:
        UserError: a weight holds NaN or inf (named), the options are impossible, or there is nothing to quantize.
    """
    problems, names = quantization.problems_of_nf4(), linear_names(module)
    if not names:
        problems.append(no_linear(module))
    if problems:
        raise UserError(problems)
    for name in names:
        layer = module.get_submodule(name)
        if not isinstance(layer, NF4Linear):
            module.set_submodule(name, NF4Linear.from_linear(layer, quantization, f"{name}.weight"))
    saves_what_loads(module)
    return module


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = weight.matmul(x.reshape(-1, x.shape[-1]), transposed=True)
        y = y if bias is None else y.add_(bias.to(x.dtype))
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.weight.matmul(dy.reshape(-1, dy.shape[-1]), transposed=False).view(*dy.shape[:-1], -1)
        return dx, None, None


def autocast(x: Tensor) -> Tensor:
    """`x` in the autocast dtype where autocast is on (custom Functions are not on its list), else unchanged."""
    kind = x.device.type
    if kind == "meta":  # knows no autocast; `plan` runs the layers there
        return x
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

"""LoRA and DoRA: the mathematics once, as functions; the modules only hold parameters.

    W [out, in] frozen, A [r, in], B [out, r], m [out], s = alpha / r (alpha / sqrt(r) with rsLoRA), x [tokens, in]
    LoRA (arXiv:2106.09685)   y = x Wt + s (x At) Bt + bias
    DoRA (arXiv:2402.09353)   y = g * (x Wt + s (x At) Bt) + bias,   g = m / n,   n_j = ||W_j + s B_j A||
                              n is constant in the graph (section 4.3); m starts at ||W_j|| of the weight really used,
                              so a fresh adapter is the base
    norm without a dense B A  n_j^2 = ||W_j||^2 + 2 s sum_k (W At)_jk B_jk + s^2 sum_k (B (A At))_jk B_jk
    row fold                  diag(g) W has the codes of W with scaled constants, so for a quantized base
                              y = s (x At) (gB)t + x (gW)t costs the matrix products of LoRA. Backward, v = s dy (gB):
                              dx = v A + dy (gW),  dA = vt x,  dB = s g (dyt (x At)),  dm_j = sum_t dy_tj y_tj / m_j

A dense base is not copied to be scaled: y and dy are multiplied by g instead, one more pass over [tokens, out] each. In
bf16 that rounds a |g - 1| below 0.2 % away (as in PEFT); an NF4 weight has no grid to fall back onto, so the fold keeps
it. When n is computed, and by whom, is in `norms`. Dropout acts on the low-rank path alone. The alternative, PEFT's sum
of a base result and corrections, keeps three [tokens, out] tensors and decodes the weight four times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora.layers.dropout import Draws, dropout
from qlora.layers.linear import NF4Linear, autocast, frozen_weight
from qlora.layers.norms import RowNormCache, Version, version_of
from qlora.layers.weight import FrozenWeight, matmul
from qlora.specs import AdapterSpec
from qlora_kernels import backends, ops, reference

# ---------------------------------------------------------------- the mathematics


def row_norms(weight: FrozenWeight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """n [out] = ||W_j + s B_j A||, in the dtype of A (float32, or float64 in tests), by the three sums of the module
    head.

    The arithmetic is `qlora_kernels.reference.row_norms`; for a quantized weight one operator decodes and sums, a block
    of rows at a time.
    """
    if weight.quantized is None:
        return reference.row_norms(weight.chunks(A.dtype), A, B, scaling)
    return backends.quickly("row_norms_4bit", A)(*weight.operands, A, B, scaling)


def merged_weight(
    weight: FrozenWeight, A: Tensor, B: Tensor, m: Tensor | None, scaling: float, dtype: torch.dtype
) -> Tensor:
    """W + s B A, or g (W + s B A) where m is given: dense [out, in] in `dtype`, computed in float32 a chunk of rows at
    a time.
    """
    row_scale = None
    if m is not None:
        m, n = reference.clamp_magnitude(m, row_norms(weight, A, B, scaling))
        row_scale = (m / n).unsqueeze(1)
    merged = torch.empty(weight.shape, dtype=dtype, device=A.device)
    for part, W in weight.chunks(A.dtype):
        rows = torch.addmm(W, B[part], A, alpha=scaling)
        merged[part] = rows if row_scale is None else rows * row_scale[part]
    return merged


@dataclass(slots=True)  # not frozen: that takes three times as long to make, and each forward pass makes one
class Constants:
    """What of an adapted layer gets no gradient: W, s, and n, or ||W_j|| of which a fused product makes n; `keep` is
    then called with n.
    """

    weight: FrozenWeight
    scaling: float
    n: Tensor | None = None
    base_row_norms: Tensor | None = None
    keep: Callable[[Tensor], None] | None = None


def one_token(x: Tensor, A: Tensor, B: Tensor, m: Tensor | None, constants: Constants) -> Tensor:
    """y [out] before the bias for a single token x [in], in float32, without a graph: for generation.

    The weight is multiplied as it is decoded (`FrozenWeight.gemv`), so g goes onto y, where it is not rounded either.
    """
    y = torch.addmv(constants.weight.gemv(x), B, A @ x.to(A.dtype), alpha=constants.scaling)
    if m is not None and constants.n is not None:
        m, n = reference.clamp_magnitude(m, constants.n)
        y *= m / n
    return y


def forward_product(
    x: Tensor, x_adapter: Tensor, A: Tensor, B: Tensor, m: Tensor | None, constants: Constants
) -> tuple[Tensor, list[Tensor]]:
    """y [tokens, out] before the bias, and what the backward pass needs: xA = x_adapter At [tokens, r], A and s g B in
    the dtype of x, and float32 g and the m that is safe to divide by, [out] each and empty without m. On a card these
    are one [2, out], of a fused product one [3, out] with n, or [0, out].

    Both products are rounded together: in one sum where one kernel makes them, elsewhere the low-rank product comes
    first and the large one is accumulated onto it. In bf16 this matters: the large product rounded first already lies
    on bf16's grid, and an update smaller than half a step of that grid, as every update is early in training, then
    vanishes (docs/log.md).
    """
    weight, scaling, n = constants.weight, constants.scaling, constants.n
    if weight.supports_fused_gemm(x):
        adapted_linear = backends.quickly("adapted_linear", x)
        y, *saved = adapted_linear(x, x_adapter, A, B, m, n, constants.base_row_norms, scaling, *weight.operands)
        if constants.keep is not None:
            constants.keep(saved[-1][2])
        return y, saved
    if weight.has_operands(x):
        return product_of_operands(x, x_adapter, A, B, m, constants)
    if backends.is_widened(x):
        wide = x.float()
        y, saved = forward_product(wide, wide if x_adapter is x else x_adapter.float(), A, B, m, constants)
        return y.to(x.dtype), saved
    fold = m is not None and weight.quantized is not None
    A_cast, B_scaled, row_scale, m_clamped = ops.prepare_lora_factors(
        A, B, m if fold else None, n if fold else None, scaling, x.dtype
    )
    if m is not None and n is not None and not fold:
        m_clamped, n = reference.clamp_magnitude(m, n)
        row_scale = m_clamped / n
    xA = x_adapter @ A_cast.t()
    y = matmul(x, weight.scratch(x.dtype, row_scale if fold else None).t(), onto=xA @ B_scaled.t())
    if m is not None and not fold:
        y *= row_scale.to(x.dtype)
    return y, [xA, A_cast, B_scaled, row_scale, m_clamped]


def product_of_operands(
    x: Tensor, x_adapter: Tensor, A: Tensor, B: Tensor, m: Tensor | None, constants: Constants
) -> tuple[Tensor, list[Tensor]]:
    """`forward_product` of a quantized weight where one operator makes all that is multiplied, as on a card: there an
    operator costs the host as much as a product does.
    """
    m_and_n = ([], []) if m is None or constants.n is None else ([m], [constants.n])
    operands = backends.quickly("adapted_operands", x)
    dense, A_cast, B_scaled, factors = operands(
        [A], [B], *m_and_n, constants.scaling, *constants.weight.operands, x.dtype
    )
    xA = x_adapter @ A_cast.t()
    return (xA @ B_scaled.t()).addmm_(x, dense.t()), [xA, A_cast, B_scaled, factors]


def row_scale_and_m(saved: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """g and the m that is safe to divide by, [out] each, from what `forward_product` saves; (None, None) without m."""
    _, _, _, *factors = saved
    g_and_m = factors if len(factors) == 2 else list(factors[0][:2])
    return (g_and_m[0], g_and_m[1]) if g_and_m and len(g_and_m[0]) else (None, None)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def backward_product(
    dy: Tensor,
    x_adapter: Tensor,
    saved: list[Tensor],
    y: Tensor | None,
    constants: Constants,
    needs: tuple[bool, ...],
    shared: bool,
) -> Gradients:
    """(dx, dx_adapter, dA, dB, dm) of `forward_product`; dm only with y, which is kept where m learns.

    Args:
        needs: of x, x_adapter, A, B, m, whether their gradient is wanted.
        shared: x_adapter is x; the whole gradient is dx then.
    """
    weight, scaling = constants.weight, constants.scaling
    xA, A_cast, B_scaled = saved[:3]
    need_x, need_xa, need_A, need_B, need_m = needs
    if shared and len(saved) == 4 and weight.supports_fused_gemm(dy):  # a fused product made these
        gradients = backends.quickly("adapted_linear_backward", dy)
        dx, dA, dB, dm = gradients(dy, [x_adapter, *saved], y, scaling, *weight.operands, need_x)
        return dx if need_x else None, None, dA if need_A else None, dB if need_B else None, dm if need_m else None
    if backends.is_widened(dy):
        wide, y = [part.float() for part in saved], None if y is None else y.float()
        dx, dxa, dA, dB, dm = backward_product(dy.float(), x_adapter.float(), wide, y, constants, needs, shared)
        dx, dxa = (None if part is None else part.to(dy.dtype) for part in (dx, dxa))
        return dx, dxa, dA, dB, dm
    dx = dxa = dA = dm = None
    row_scale, m_clamped = row_scale_and_m(saved)
    if row_scale is not None and weight.quantized is None:
        dm = ops.columnwise_dot(dy, y) / m_clamped if need_m else None
        dy, y, row_scale = dy * row_scale.to(dy.dtype), None, None
    v, dB, sums = ops.adapter_gradients(dy, B_scaled, xA, y, row_scale, m_clamped, scaling)
    if y is not None:
        dm = sums
    if need_A:
        dA = ops.matmul_tn(v, x_adapter)
    if need_xa:
        dxa = v @ A_cast
    if need_x and shared:
        dx, dxa = matmul(dy, weight.scratch(dy.dtype, row_scale), onto=dxa), None
    elif need_x:
        dx = weight.matmul(dy, False, row_scale)
    return dx, dxa, dA, dB if need_B else None, dm


@dataclass(frozen=True, slots=True)
class Recomputed:
    """How the backward pass makes a layer's input again: x = function(*tensors). The tensors are kept by others anyway,
    so x need not be.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


class AdaptedProduct(torch.autograd.Function):
    """y [tokens, out] of `forward_product` from x [..., in], the adapter's input (x after dropout, or x itself), A, B
    and m.

    Saves what `forward_product` says, the adapter's input or the tensors it is `recomputed` from, and y where m learns;
    the base weight is decoded again in the backward pass. A, B and m are float32, and so are their gradients. x
    is made a matrix here, below the graph: a view of it in the graph would be a node more for each layer.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        x_adapter: Tensor,
        A: Tensor,
        B: Tensor,
        m: Tensor | None,
        constants: Constants,
        recomputed: Recomputed | None = None,
    ):
        shared = x_adapter is x
        ctx.constants, ctx.shared, ctx.shape = constants, shared, x.shape
        ctx.again, inputs = (None, (x_adapter,)) if recomputed is None else (recomputed.function, recomputed.tensors)
        x = as_matrix(x)
        y, saved = forward_product(x, x if shared else as_matrix(x_adapter), A, B, m, constants)
        ctx.count = len(inputs)
        ctx.save_for_backward(y if ctx.needs_input_grad[4] else None, *saved, *inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        tensors = ctx.saved_tensors
        (y, *saved), inputs = tensors[: -ctx.count], tensors[-ctx.count :]
        x_adapter = as_matrix(inputs[0] if ctx.again is None else ctx.again(*inputs))
        needs = ctx.needs_input_grad[:5]
        dx, dxa, *rest = backward_product(dy, x_adapter, saved, y, ctx.constants, needs, ctx.shared)
        return _shaped(dx, ctx.shape), _shaped(dxa, ctx.shape), *rest, None, None


def as_matrix(x: Tensor) -> Tensor:
    """x [..., n] as [tokens, n]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _shaped(gradient: Tensor | None, shape: torch.Size) -> Tensor | None:
    return gradient if gradient is None or len(shape) == 2 else gradient.view(shape)


# ---------------------------------------------------------------- the module


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update. Input [..., in], output [..., out].

    `lora_A` [r, in] starts as `spec.init` says, `lora_B` [out, r] zero, `magnitude` [out] (DoRA only) at the row norms;
    all float32. A and dropout are drawn from `draws`, or from torch's global generators.
    """

    def __init__(self, base: nn.Module, spec: AdapterSpec, draws: Draws | None = None):
        super().__init__()
        weight = frozen_weight(base)
        dtype = torch.float64 if _dtype(base) == torch.float64 else torch.float32
        self.base = base
        self.scaling, self.dropout_p = spec.scaling, spec.dropout
        self.enabled = True
        self.draws = draws
        self.copies_output = False  # the model writes into what this layer returns, and the backward pass needs that
        self.lora_A = nn.Parameter(torch.empty(spec.rank, weight.shape[1], device=weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], spec.rank, device=weight.device, dtype=dtype))
        generator = None if draws is None else draws.on(weight.device)
        if spec.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / spec.rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.magnitude: nn.Parameter | None = None
        if spec.method == "dora":  # ||W_j||, computed as n is while B = 0, so that g is exactly 1
            norms = row_norms(weight, self.lora_A.detach(), self.lora_B.detach(), self.scaling)
            self.magnitude = nn.Parameter(norms)
        self.row_norms = RowNormCache()
        if self.magnitude is not None:
            self.row_norms.put_base(self.version(), self.magnitude.detach().clone())
        self.register_load_state_dict_post_hook(_forget_row_norms)

    def version(self) -> Version:
        """What n was or would be computed from. Asked for each layer twice a step, so it goes past
        `Module.__getattr__`, as `forward` does.
        """
        parameters: dict[str, Any] = self._parameters
        base: Any = self._modules["base"]
        W = base._buffers["weight"] if "weight" in base._buffers else base._parameters["weight"]
        return version_of(parameters["lora_A"], parameters["lora_B"], W)

    def current_row_norms(self) -> Tensor:
        """n [out] of A, B and W as they are now; see `norms` for what counts as a change."""
        version = self.version()
        n = self.row_norms.get(version)
        if n is None:
            with torch.no_grad():
                n = row_norms(frozen_weight(self.base), self.lora_A, self.lora_B, self.scaling)
            self.row_norms.put(version, n)
        return n

    def base_row_norms(self) -> Tensor:
        """||W_j|| [out], of which n is made in training; to the bit the n of B = 0."""
        version = self.version()
        norms = self.row_norms.get_base(version)
        if norms is None:
            with torch.no_grad():
                B = torch.zeros_like(self.lora_B)
                norms = row_norms(frozen_weight(self.base), self.lora_A, B, self.scaling)
            self.row_norms.put_base(version, norms)
        return norms

    def forget_row_norms(self) -> None:
        """Compute n anew at the next use."""
        self.row_norms = RowNormCache()

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and m, what a kind of adapter comes down to; gradients flow into them."""
        parameters: dict[str, Any] = self._parameters
        return parameters["lora_A"], parameters["lora_B"], parameters.get("magnitude")

    def constants(self, x: Tensor) -> Constants:
        """What else the product of x [..., in] takes."""
        base: Any = self._modules["base"]
        weight = frozen_weight(base)
        if self._parameters.get("magnitude") is None:
            return Constants(weight, self.scaling)
        n = self.row_norms.get(self.version())
        if n is None and weight.supports_fused_gemm(as_matrix(x)):
            return Constants(weight, self.scaling, None, self.base_row_norms(), self.keep_row_norms)
        return Constants(weight, self.scaling, self.current_row_norms() if n is None else n)

    def adapter_input(self, x: Tensor) -> Tensor:
        """x after dropout, or x itself."""
        return dropout(x, self.dropout_p, self.draws) if self.training and self.dropout_p > 0 else x

    def keep_row_norms(self, n: Tensor) -> None:
        """Keep the n [out] that a fused product made on its way."""
        self.row_norms.put(self.version(), n)

    def forward(self, x: Tensor, recomputed: Recomputed | None = None) -> Tensor:
        """`recomputed`: how x [..., in] is made, where the caller keeps of what; x is then not kept."""
        if not self.enabled:
            return self.base(x)
        return _not_compiled(self, x, recomputed) if torch.compiler.is_compiling() else self._adapted(x, recomputed)

    def _adapted(self, x: Tensor, recomputed: Recomputed | None) -> Tensor:
        given, x = x, autocast(x)
        shape = x.shape
        if self.training and self.dropout_p > 0:
            x = as_matrix(x)  # what is dropped of which token does not depend on how it lies
        x_adapter, constants, (A, B, m) = self.adapter_input(x), self.constants(x), self.factors()
        bias = cast(Any, self._modules["base"]).bias
        if x_adapter is x and constants.weight.uses_gemv(x):
            y = one_token(x.reshape(-1), A, B, m, constants)
            return (y if bias is None else y + bias).to(x.dtype).view(*shape[:-1], -1)
        if x is not given or x_adapter is not x:
            recomputed = None
        y = AdaptedProduct.apply(x, x_adapter, A, B, m, constants, recomputed)
        y = y if bias is None else y + bias.to(y.dtype)
        y = y.clone() if self.copies_output else y
        return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])

    def _apply(self, fn, recurse: bool = True):
        # `model.to(bfloat16)` must not round what was trained, so A, B and m pass through as bytes.
        own = {name: p for name, p in self._parameters.items() if p is not None}
        for name in own:
            self._parameters[name] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters.update(own)
        for name, parameter in own.items():
            self._parameters[name] = _moved(parameter, fn)
        self.forget_row_norms()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "row_norms": RowNormCache(), "draws": None}

    def extra_repr(self) -> str:
        method = "lora" if self.magnitude is None else "dora"
        sizes = f"rank={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout_p:g}"
        return f"method={method}, {sizes}"


def _forget_row_norms(layer: AdaptedLinear, keys: object) -> None:  # by its name, so that a layer can be pickled
    layer.forget_row_norms()


# A graph ends before an adapted layer and goes on behind it: what version its n is of changes with every step, and a
# compiler would compile anew for each.
_not_compiled = torch.compiler.disable(AdaptedLinear._adapted)


def _moved(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """`fn` applied to a parameter and its gradient, but never a cast: the same object wherever torch allows it."""
    data = _as_bytes(parameter.data, fn)
    if data.is_meta == parameter.is_meta:
        parameter.data = data
    else:
        parameter = nn.Parameter(data, parameter.requires_grad)
    if parameter.grad is not None:
        parameter.grad.data = _as_bytes(parameter.grad.data, fn)
    return parameter


def _as_bytes(values: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    return fn(values.reshape(-1).view(torch.uint8)).view(values.dtype).view(values.shape)


def _dtype(base: nn.Module) -> torch.dtype:
    return torch.float32 if isinstance(base, NF4Linear) else frozen_weight(base).dense_weight.dtype

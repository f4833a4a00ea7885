"""LoRA and DoRA: the mathematics once, as functions; the modules only hold parameters.

    W [out, in] frozen, A [r, in], B [out, r], m [out], s = alpha / r (alpha / sqrt(r) with rsLoRA), x [tokens, in]
    LoRA (arXiv:2106.09685)   y = x Wt + s (x At) Bt + bias
    DoRA (arXiv:2402.09353)   y = g * (x Wt + s (x At) Bt) + bias,   g = m / n,   n_j = ||W_j + s B_j A||, constant in the graph
                              (section 4.3); m starts at ||W_j|| of the weight really used, so a fresh adapter is the
                              base
    norm without a dense B A  n_j^2 = ||W_j||^2 + 2 s sum_k (W At)_jk B_jk + s^2 sum_k (B (A At))_jk B_jk
    row fold                  diag(g) W has the codes of W with scaled constants, so for an NF4 base
                              y = s (x At) (gB)t + x (gW)t costs the matrix products of LoRA. Backward, with v = s dy
                              (gB):
                              dx = v A + dy (gW),  dA = vt x,  dB = s g (dyt (x At)),  dm_j = sum_t dy_tj y_tj / m_j
A dense base is not copied to be scaled: y and dy are multiplied by g instead, one more pass over [tokens, out] each. In
bf16 that rounds a |g - 1| below 0.2 % away (as in PEFT); an NF4 weight has no grid to fall back onto, so the fold keeps
it.

n changes only when A, B or W do, so it is computed once per optimizer step, not per micro-batch nor in the
recomputation of a
checkpointed layer: on a GPU of all layers before a forward pass (`compute_norms`), on a CPU with AMX in the product
that decodes W anyway, elsewhere a layer at a time. What counts as a change is in `AdaptedLinear.norm`. Dropout acts on
the low-rank path alone. The alternative, PEFT's sum of a base result and corrections, keeps three [tokens, out] tensors
and decodes the weight four times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from qlora.layers.linear import FrozenWeight, NF4Linear, autocast, product
from qlora.specs import AdapterSpec
from qlora_kernels import ops, reference

LINEAR = (nn.Linear, NF4Linear, Conv1D)


def row_norms(weight: FrozenWeight, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """n [out] = ||W_j + s B_j A||, in the dtype of A (float32, or float64 in tests), by the three sums of the module
    head.

    The arithmetic is `qlora_kernels.reference.row_norms`; for an NF4 weight one operator decodes and sums, a block of
    rows at a time.
    """
    if weight.nf4 is None:
        return reference.row_norms(weight.chunks(A.dtype), A, B, scaling)
    *constants, rows, columns, blocksize, nested_blocksize = weight.parts()
    return ops.row_norms_nf4(*constants, A, B, scaling, rows, columns, blocksize, nested_blocksize)


def merged_weight(
    weight: FrozenWeight, A: Tensor, B: Tensor, m: Tensor | None, scaling: float, dtype: torch.dtype
) -> Tensor:
    """W + s B A, or g (W + s B A) where m is given: dense [out, in] in `dtype`, computed in float32 a chunk of rows at
    a time.
    """
    gain = None
    if m is not None:
        m, n = reference.guarded(m, row_norms(weight, A, B, scaling))
        gain = (m / n).unsqueeze(1)
    merged = torch.empty(weight.shape, dtype=dtype, device=A.device)
    for part, W in weight.chunks(A.dtype):
        rows = torch.addmm(W, B[part], A, alpha=scaling)
        merged[part] = rows if gain is None else rows * gain[part]
    return merged


def one_token(
    weight: FrozenWeight, x: Tensor, A: Tensor, B: Tensor, m: Tensor | None, n: Tensor | None, scaling: float
) -> Tensor:
    """y [out] of the module head before the bias for a single token x [in], in float32, without a graph: for
    generation.

    The weight is multiplied as it is decoded (`FrozenWeight.times`), so the gain goes onto y, where it is not rounded
    either.
    """
    y = torch.addmv(weight.times(x), B, A @ x.to(A.dtype), alpha=scaling)
    if m is not None:
        m, n = reference.guarded(m, n)
        y *= m / n
    return y


class AdaptedProduct(torch.autograd.Function):
    """y [tokens, out] of the module head from x, the adapter's input (x after dropout, or x itself), A, B, m and n.

    Where `weight.multiplies(x)` it may be `fused` to one operator each way, and n may be None: it is made on the way
    from `base`, the norms of W, and the last row of what `kept.n` is then.

    Saves x, u = x At, A and s gB in the dtype of x, and y before the bias where m learns; the base weight is decoded
    again in the backward pass. A, B and m are float32, and so are their gradients.

    Both products are rounded together: in one sum where fused, elsewhere the low-rank product comes first and the large
    one is accumulated onto it. In bf16 this matters: the large product rounded first already lies on bf16's grid, and
    an update smaller than half a step of that grid, as every update is early in training, then vanishes altogether
    (measured on SmolLM2: of what a first step of B should gain, 100 % arrive, 60 % the other way round).
    """

    @staticmethod
    def forward(
        ctx,
        x,
        x_adapter,
        A,
        B,
        m,
        n,
        bias,
        weight: FrozenWeight,
        scaling: float,
        lend=None,
        fused=False,
        base=None,
        kept=None,
    ):
        dtype, learns = x.dtype, ctx.needs_input_grad[4]
        ctx.weight, ctx.scaling, ctx.shared, ctx.fused = weight, scaling, x_adapter is x, fused
        if fused:
            y, u, down, up, factors = ops.adapted_product(x, x_adapter, A, B, m, n, base, scaling, *weight.parts())
            if m is not None and n is None:
                kept.n = factors
            safe = factors[1] if lend is not None else None
        else:
            fold = m is not None and weight.folds
            down, up, gain, safe = ops.fold_factors(A, B, m if fold else None, n if fold else None, scaling, dtype)
            if m is not None and not fold:
                safe, n = reference.guarded(m, n)
                gain = safe / n
            factors = gain.new_empty(0) if m is None else torch.stack((gain, safe))
            u = x_adapter @ down.t()
            y = product(x, weight.scratch(dtype, gain if fold else None).t(), onto=u @ up.t())
            if m is not None and not fold:
                y *= gain.to(dtype)
        ctx.save_for_backward(x_adapter, down, up, u, y if learns else None, factors)
        if lend is not None:
            lend.append(safe)
        return y if bias is None else y + bias.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_adapter, down, up, u, y, factors = ctx.saved_tensors
        weight, shared = ctx.weight, ctx.shared
        need_x, need_xa, need_A, need_B, need_m = ctx.needs_input_grad[:5]
        dx = dxa = dA = dm = None
        if shared and ctx.fused:
            dx, dA, dB, dm = ops.adapted_product_backward(
                dy, x_adapter, down, up, u, y, factors, ctx.scaling, *weight.parts(), need_x
            )
            return (
                dx if need_x else None,
                None,
                dA if need_A else None,
                dB if need_B else None,
                dm if need_m else None,
                *[None] * 8,
            )
        gain, safe = factors[:2] if len(factors) else (None, None)
        if gain is not None and not weight.folds:
            dm = ops.column_dots(dy, y) / safe if need_m else None
            dy, y, gain = dy * gain.to(dy.dtype), None, None
        v, dB, sums = ops.adapter_gradients(dy, up, u, y, gain, safe, ctx.scaling)
        if y is not None:
            dm = sums
        if need_A:
            dA = ops.token_product(v, x_adapter)
        if need_xa:
            dxa = v @ down
        if need_x and shared:
            dx, dxa = product(dy, weight.scratch(dy.dtype, gain), onto=dxa), None
        elif need_x:
            dx = weight.product(dy, False, gain)
        return dx, dxa, dA, dB if need_B else None, dm, *[None] * 8


_optimizer_steps = 0  # steps of any optimizer in this process: see AdaptedLinear.norm


def _count_step(optimizer, args, kwargs) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


@dataclass(slots=True)
class _Norms:
    """What a layer keeps of its norms, and what each was computed from. An object of its own, because setting an
    attribute of a module is slow.
    """

    state: tuple | None = None
    n: Tensor | None = None  # n is the last row of this matrix
    base_state: tuple | None = None
    base: Tensor | None = None  # ||W_j||


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update. Input [..., in], output [..., out].

    `lora_A` [r, in] starts as `spec.init` says, `lora_B` [out, r] zero, `magnitude` [out] (DoRA only) at the row norms; all
    float32.
    """

    def __init__(self, base: nn.Module, spec: AdapterSpec):
        super().__init__()
        weight = FrozenWeight(base)
        dtype = torch.float64 if _dtype(base) == torch.float64 else torch.float32
        self.base = base
        self.scaling, self.dropout_p = spec.scaling, spec.dropout
        self.lora_A = nn.Parameter(torch.empty(spec.rank, weight.shape[1], device=weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], spec.rank, device=weight.device, dtype=dtype))
        if spec.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / spec.rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = None
        if spec.method == "dora":  # ||W_j||, computed as `norm` does while B = 0, so that g is exactly 1
            self.magnitude = nn.Parameter(row_norms(weight, self.lora_A.detach(), self.lora_B.detach(), self.scaling))
        self.forget_norm()
        if self.magnitude is not None:
            self._norms.base_state, self._norms.base = self.norm_state()[-2:], self.magnitude.detach().clone()
        self.register_load_state_dict_post_hook(lambda module, keys: module.forget_norm())

    def norm_state(self) -> tuple:
        """What n was or would be computed from. Asked for each layer twice a step, so it goes past
        `Module.__getattr__`, as `forward` does.
        """
        A, B, base = self._parameters["lora_A"], self._parameters["lora_B"], self._modules["base"]
        W = base._buffers["weight"] if "weight" in base._buffers else base._parameters["weight"]
        return (_optimizer_steps, A._version, A.data_ptr(), B._version, B.data_ptr(), W._version, W.data_ptr())

    def norm(self) -> Tensor:
        """n [out], kept until A, B or the base may have changed.

        Counted as a change: any optimizer's step (the fused AdamW does not bump `Tensor._version`), an in-place write
        that torch sees, a replaced tensor, `load_state_dict`, a move to another device. Writes that torch cannot see
        (numpy, ctypes, through `.data`) need `refresh_norms(model)`.
        """
        state, kept = self.norm_state(), self._norms
        if state != kept.state:
            with torch.no_grad():
                kept.n = row_norms(FrozenWeight(self.base), self.lora_A, self.lora_B, self.scaling).unsqueeze(0)
            kept.state = state
        return kept.n[-1]

    def lends(self) -> bool:
        """Whether `forward` can lend: the output is y itself, and m learns."""
        magnitude, hooks = self._parameters.get("magnitude"), self._forward_hooks or self._forward_pre_hooks
        return magnitude is not None and magnitude.requires_grad and self._modules["base"].bias is None and not hooks

    def forget_norm(self) -> None:
        """Compute n anew at the next use."""
        self._norms = _Norms()

    def base_norm(self, state: tuple) -> Tensor:
        """||W_j|| [out], of which n is made in training; to the bit the n of B = 0. `state` is what `norm_state` says
        now.
        """
        kept = self._norms
        if kept.base_state != state[-2:]:
            with torch.no_grad():
                kept.base = row_norms(FrozenWeight(self.base), self.lora_A, torch.zeros_like(self.lora_B), self.scaling)
            kept.base_state = state[-2:]
        return kept.base

    def forward(self, x: Tensor, lend: list[Tensor] | None = None) -> Tensor:
        """`lend` takes the guarded m; its owner sees to the gradient of `magnitude`, sum_t dy_tj y_tj / m_j: see
        `fused.GatedMLP`.
        """
        x, base = autocast(x), self._modules["base"]
        flat, weight, bias = x.reshape(-1, x.shape[-1]), FrozenWeight(base), base.bias
        adapter_input = (
            torch.nn.functional.dropout(flat, self.dropout_p) if self.training and self.dropout_p > 0 else flat
        )
        A, B, magnitude = self._parameters["lora_A"], self._parameters["lora_B"], self._parameters.get("magnitude")
        fused = weight.multiplies(flat)
        norm, base_norm, kept = None, None, self._norms
        if magnitude is not None:
            state = self.norm_state()
            if fused and state != kept.state:
                base_norm = self.base_norm(state)
            else:
                norm = self.norm()
        if adapter_input is flat and weight.takes_one_token(x):
            y = one_token(weight, flat[0], A, B, magnitude, norm, self.scaling)
            return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], -1)
        if lend is not None:
            magnitude = magnitude.detach()
        y = AdaptedProduct.apply(
            flat, adapter_input, A, B, magnitude, norm, bias, weight, self.scaling, lend, fused, base_norm, kept
        )
        if base_norm is not None:
            kept.state = state
        return y.view(*x.shape[:-1], y.shape[-1])

    def _apply(self, fn, recurse: bool = True):
        # `model.to(bfloat16)` must not round the trainable parameters, so they are cast back to what they were.
        kept = {name: p.dtype for name, p in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        self.forget_norm()
        return self

    def __getstate__(self):
        return {**super().__getstate__(), "_norms": _Norms()}

    def extra_repr(self) -> str:
        return f"method={'lora' if self.magnitude is None else 'dora'}, rank={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout_p:g}"


def _dtype(base: nn.Module) -> torch.dtype:
    return torch.float32 if isinstance(base, NF4Linear) else base.weight.dtype

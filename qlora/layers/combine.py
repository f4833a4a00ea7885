"""A weighted sum of adapters as one adapter, exactly.

    W' = W + sum_i w_i (W'_i - W)          W'_i = g_i (W + s_i B_i A_i), the weight of adapter i; g_i = 1 for LoRA
       = G (W + B A)                       G = 1 + sum_i w_i (g_i - 1)
    A = [A_1; A_2; ...]   B = [b_1, b_2, ...],  b_i = w_i s_i g_i B_i / G,  scaling 1,  m = G ||W + B A||

The ranks add up. For LoRA G is 1 and this is the sum of the updates; where an adapter is DoRA, the sum is one too,
whatever the others are. The alternative, PEFT's "linear", adds the A and the B by themselves, which is another update
(B_1 A_2 is in it) and not defined for magnitudes. TIES and DARE work on entries of the updates, which A and B do not
hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlora.errors import UserError, problem
from qlora.layers.adapters import AdaptedLinear, row_norms
from qlora.layers.attach import Adapter, adapters_of, attach, bare, forget_row_norms, settle, unknown_adapters
from qlora.layers.linear import frozen_weight
from qlora.layers.mixed import gain
from qlora.specs import AdapterSpec

LEAST_GAIN = 1e-3  # |G| of a row: below it, its update would be divided by all but nothing


@torch.no_grad()
def combine(model: nn.Module, weights: Mapping[str, float], name: str) -> nn.Module:
    """Attach the weighted sum of adapters of `model` as another one of this name, now active; returns `model`.

    Args:
        model: with these adapters.
        weights: of each adapter by name. {"a": 0.5, "b": 0.5} is half of what a changes and half of what b changes.
        name: of the sum.

    Raises:
        UserError: in one list: no such adapter, a weight that is no finite number, an adapter of this name, an adapter
            that began by undoing the error of its base (a sum would undo it several times); a row that vanishes.
    """
    adapters = adapters_of(model)
    problems = unknown_adapters(model, weights)
    problems += [
        problem("weights", f"{key}: {value}", "must be a finite number other than 0", "Leave it out, or correct it")
        for key, value in weights.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not value
    ]
    problems += [
        problem("adapter", key, "began by undoing the error of the 4-bit base", "Combine adapters that began at zero")
        for key in weights
        if key in adapters and adapters[key].start is not None
    ]
    if not weights:
        problems.append(problem("weights", "(none)", "names no adapter", "Give for example {'a': 0.5, 'b': 0.5}"))
    if name in adapters:
        problems.append(problem("name", name, "the model has an adapter of this name", "Detach it, or give another"))
    if problems:
        raise UserError(problems)
    parts = [(weight, adapters[key]) for key, weight in weights.items()]
    found = {module for _, adapter in parts for module in adapter.layers}
    modules = tuple(module for module, _ in model.named_modules() if module in found)
    rank = sum(adapter.spec.rank for _, adapter in parts)
    method = "dora" if any(adapter.spec.method == "dora" for _, adapter in parts) else "lora"
    with bare(model):
        for _, adapter in parts:
            settle(model, adapter)
        sums = {module: _sum(module, parts) for module in modules}  # before anything is attached: it may refuse
        attach(model, AdapterSpec(method, rank, float(rank), targets=modules), name)
        for module, (A, B, G) in sums.items():
            layer = adapters[name].layers[module]
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
            if layer.magnitude is not None:
                layer.magnitude.copy_(G * row_norms(frozen_weight(layer.base), A, B, 1.0))
    forget_row_norms(model)
    return model


def _sum(module: str, parts: list[tuple[float, Adapter]]) -> tuple[Tensor, Tensor, Tensor]:
    """(A [R, in], B [out, R], G [out]) of one layer. An adapter that leaves it alone has zeros there.

    Raises:
        UserError: a row whose gain all but vanishes.
    """
    layers: list[tuple[float, AdaptedLinear | None, int]] = [
        (weight, adapter.layers.get(module), adapter.spec.rank) for weight, adapter in parts
    ]
    one = next(layer for _, layer, _ in layers if layer is not None)
    gains = [None if layer is None else gain(layer).double() for _, layer, _ in layers]
    G = torch.ones(len(one.lora_B), dtype=torch.float64, device=one.lora_B.device)
    for (weight, _, _), g in zip(layers, gains, strict=True):
        if g is not None:
            G += weight * (g - 1)
    if bool((G.abs() < LEAST_GAIN).any()):
        row = int(G.abs().argmin())
        rule = f"row {row} of {module} all but vanishes in this sum (its gain is {G[row].item():.1e})"
        raise UserError(problem("weights", [weight for weight, _ in parts], rule, "Give smaller weights"))
    As, Bs = [], []
    for (weight, layer, rank), g in zip(layers, gains, strict=True):
        if layer is None or g is None:
            As.append(one.lora_A.new_zeros(rank, one.lora_A.shape[1]))
            Bs.append(one.lora_B.new_zeros(len(one.lora_B), rank))
            continue
        As.append(layer.lora_A)
        Bs.append((layer.lora_B.double() * (weight * layer.scaling * g / G).unsqueeze(1)).to(layer.lora_B.dtype))
    return torch.cat(As), torch.cat(Bs, dim=1), G.to(one.lora_B.dtype)

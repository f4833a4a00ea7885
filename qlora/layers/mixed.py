"""Several adapters in one batch: each row of it by an adapter of its own, or by the base.

    A = [A_1; A_2; ...]   B = [s_1 B_1, s_2 B_2, ...]     the adapters of the batch side by side, R ranks in all
    y_t = g_a (x_t Wt + (k_a * (x_t At)) Bt) + bias       of a token t in a row of adapter a: k_a keeps the ranks of a,
                                                          g_a = m_a / n_a for DoRA, else 1

So W is decoded and multiplied once for the whole batch, and sum and update are rounded together, as in `adapters`. The
gain is multiplied onto y, since the rows of a batch share the decoded W: in bf16 that rounds a |g - 1| below 0.2 %
away, as on a base of 16 bits. With gradients or dropout each group of rows runs through its own layer in turn.
The alternative, that for all cases, decodes W once for each adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import UserError, problem
from qlora.layers.adapters import AdaptedLinear
from qlora.layers.attach import adapters_of, bare, settle, unknown_adapters
from qlora.layers.linear import autocast, frozen_weight
from qlora.layers.weight import matmul
from qlora_kernels import reference


@contextmanager
def mixed(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """While entered, row i of every batch runs with the adapter `names[i]`, or with the base where that is None.

    A batch must have len(names) rows. The adapter that was active comes back; no byte of the base is touched.

    Raises:
        UserError: a name that no adapter has; later, a batch with another number of rows, or a layer that does not see
            rows (experts, which get tokens).
    """
    names = list(names)
    used = list(dict.fromkeys(name for name in names if name is not None))
    problems = unknown_adapters(model, used)
    if not names:
        problems.append(problem("names", "(none)", "names no row", "Give a name, or None, for each row of the batch"))
    if problems:
        raise UserError(problems)
    adapters = adapters_of(model)
    owners = torch.tensor([-1 if name is None else used.index(name) for name in names])
    with bare(model):
        for name in used:
            settle(model, adapters[name])
        modules = dict.fromkeys(module for name in used for module in adapters[name].layers)
        bases = {module: model.get_submodule(module) for module in modules}
        try:
            for module, base in bases.items():
                layers = [adapters[name].layers.get(module) for name in used]
                model.set_submodule(module, MixedLinear(base, module, layers, owners))
            yield model
        finally:
            for module, base in bases.items():
                model.set_submodule(module, base)


class MixedLinear(nn.Module):
    """A linear layer in a batch of several adapters. Input [rows, ..., in], output [rows, ..., out].

    `layers`: those of the adapters, None where one leaves this layer alone; `owners` [rows]: which of them a row has,
    -1 for none. They stand beside the module, not in it: the model's parameters are those of its base.
    """

    def __init__(self, base: nn.Module, name: str, layers: Sequence[AdaptedLinear | None], owners: Tensor):
        super().__init__()
        self.base = base
        self.name, self.owners, self.layers = name, owners, tuple(layers)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 3 or x.shape[0] != len(self.owners):
            rule = f"the batch has {len(self.owners)} rows, and {self.name} gets an input of shape {list(x.shape)}"
            remedy = "Give a name for each row; a layer that gets tokens without their rows takes one adapter at a time"
            raise UserError(problem("names", len(self.owners), rule, remedy))
        apart = torch.is_grad_enabled() or (self.training and any(layer and layer.dropout_p for layer in self.layers))
        return self._apart(x) if apart else self._together(x)

    def _apart(self, x: Tensor) -> Tensor:
        """Each group of rows by its own layer."""
        groups = [(self.owners == owner).nonzero().squeeze(1).to(x.device) for owner in range(-1, len(self.layers))]
        runs = [self.base, *(self.base if layer is None else layer for layer in self.layers)]
        parts = [run(x.index_select(0, rows)) for run, rows in zip(runs, groups, strict=True) if len(rows)]
        return torch.cat(parts).index_select(0, torch.cat(groups).argsort())

    def _together(self, x: Tensor) -> Tensor:
        """All rows in one product, see the module head."""
        x, base = autocast(x), self.base
        weight, owners = frozen_weight(base), self.owners.to(x.device)
        flat, each = x.reshape(-1, x.shape[-1]), x[0].numel() // x.shape[-1]
        there = [(number, layer) for number, layer in enumerate(self.layers) if layer is not None]
        A = torch.cat([layer.lora_A for _, layer in there])
        B = torch.cat([layer.scaling * layer.lora_B for _, layer in there], dim=1)
        ranks = torch.cat([torch.full((len(layer.lora_A),), number, device=x.device) for number, layer in there])
        keep = (owners.unsqueeze(1) == ranks).to(x.dtype).repeat_interleave(each, dim=0)
        xA = (flat @ A.to(x.dtype).t()) * keep
        y = matmul(flat, weight.scratch(x.dtype).t(), onto=xA @ B.to(x.dtype).t()).view(x.shape[0], each, -1)
        if any(layer.magnitude is not None for _, layer in there):
            gains = torch.ones(
                len(self.layers) + 1, y.shape[-1], dtype=A.dtype, device=x.device
            )  # the last: no adapter
            for number, layer in there:
                gains[number] = gain(layer)
            y *= gains[owners].unsqueeze(1).to(y.dtype)
        bias: Any = base.bias
        y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


def gain(layer: AdaptedLinear) -> Tensor:
    """g [out] of a layer: m / n for DoRA, ones for LoRA."""
    if layer.magnitude is None:
        return torch.ones_like(layer.lora_B[:, 0]).detach()
    m, n = reference.clamp_magnitude(layer.magnitude.detach(), layer.current_row_norms())
    return m / n

"""A model whose adapters start by undoing the error of its quantized base, from the text that it will be trained on.

    adapters of zero effect -> moments of their inputs -> closed form, layer by layer -> B A undoes the error

`error_start` has the mathematics, `moments` takes the moments. A layer whose weighted error would not fall keeps the
zero start, so the start never makes a layer worse on the text it was made from. A layer is corrected for what it is fed
by the quantized model, since that is what it will see in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlora.calibrate.error_start import LayerError, RowForms, error_factors, row_forms
from qlora.calibrate.moments import input_moments
from qlora.layers.adapters import AdaptedLinear
from qlora.layers.attach import adapters_of, named_adapters
from qlora.layers.linear import NF4Linear, frozen_weight
from qlora.models.originals import Originals

DAMPING = 0.03  # of the moments: what the text did not show counts so much of the mean
ROWS = 1 << 20  # values of a weight that are looked at together, about
EXACT = 1e-10  # a share of error that is rounding in float32


def start_by_error(
    model: torch.nn.Module, weights: Originals, batches: Sequence[Tensor], done: Callable[[], None] = lambda: None
) -> dict[str, LayerError]:
    """Give every adapter of a quantized layer the start that undoes its error, in place; what came of it, by layer.

    The start itself is kept with the adapter (`attach.Adapter.start`), since a merge onto the 16-bit weights has to
    take it off again. Layers without a 16-bit weight, or that the text never reaches, keep the zero start.

    Args:
        model: in evaluation mode, adapters fresh.
        weights: of the base before it was quantized.
        batches: token ids [b, t] without padding.
        done: is called after each layer.
    """
    layers = {
        name: layer
        for name, layer in named_adapters(model)
        if isinstance(layer.base, NF4Linear) and name in weights.there
    }
    widths = {name: layer.lora_A.shape[1] for name, layer in layers.items()}
    found: dict[str, LayerError] = {}
    for name, H in input_moments(model, widths, batches, rounded=True):
        found[name] = start_layer(layers[name], weights.weight(name, H.device), H[0])
        done()
    keep_start(model)
    return found


@torch.no_grad()
def start_layer(layer: AdaptedLinear, W: Tensor, H: Tensor) -> LayerError:
    """Start one fresh adapter by the error of its base against W [out, in] under H [in, in]; zero if that is no better.

    In memory are E [out, in] and E H in float32 and a few rows of all else. Damped is E H, so that nothing of H's size
    is made.
    """
    quantized = frozen_weight(layer.base)
    E, EH = (torch.empty(quantized.shape, device=H.device) for _ in range(2))
    WHA = torch.empty(quantized.shape[0], len(layer.lora_A), device=H.device)
    parts, found = [], []
    for part, Q in quantized.chunks(elements=ROWS):
        dense = W[part].float()
        torch.sub(dense, Q, out=E[part])
        torch.mm(E[part], H, out=EH[part])
        found.append(row_forms(dense, H, E[part], EH[part]))
        parts.append(part)
    forms = RowForms(*(torch.cat(rows) for rows in zip(*((f.ww, f.we, f.ee) for f in found), strict=True)))
    before, size = float(forms.ee.sum()), float(forms.ww.sum())
    if not 0 < before < math.inf or before <= EXACT * size:  # nothing to undo, no inputs, or no numbers
        return LayerError(0.0, 0.0)
    mean_square = float(H.diagonal().mean())
    damping = DAMPING * mean_square
    A, B = error_factors(E, EH.add_(E, alpha=damping), mean_square + damping, layer.lora_A, layer.scaling)
    AH = A @ H
    for part in parts:
        torch.mm(W[part].float(), AH.t(), out=WHA[part])
    EHA = EH @ A.t() - damping * (E @ A.t())
    forms = forms.less(*(x.double() for x in (layer.scaling * B, WHA, EHA, AH @ A.t())))
    gains = None if layer.magnitude is None else forms.gains()
    after = float((forms.ee if gains is None else forms.scaled(gains)).sum())
    if not after < before:
        return LayerError(before / size, before / size)
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    layer.forget_row_norms()
    if layer.magnitude is not None and gains is not None:
        layer.magnitude.copy_(layer.current_row_norms() * gains.float())
    return LayerError(before / size, after / size)


def keep_start(model: torch.nn.Module) -> None:
    """Remember the parameters of the active adapter as its start."""
    adapters = adapters_of(model)
    assert adapters.active is not None
    adapters[adapters.active].start = {
        f"{name}.{part}": parameter.detach().clone().cpu()
        for name, layer in named_adapters(model)
        for part, parameter in layer.named_parameters(recurse=False)
    }

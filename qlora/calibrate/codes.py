"""A quantized model whose codes are chosen by what its layers are fed: another 4-bit base of the same kind and size.

    base in NF4, nearest codes -> moments, layer by layer -> GPTQ's codes in place -> the next layer

`gptq` has the mathematics, `moments` takes the moments. A layer whose weighted error would not fall keeps its nearest
codes, and so does one whose width is no multiple of the block size. The alternative, a pass over the checkpoint that
holds one layer at a time, saves the 4-bit model in memory but would need a loader for each architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qlora.calibrate.error_start import LayerError, weighted_error
from qlora.calibrate.gptq import gptq
from qlora.calibrate.moments import input_moments
from qlora.layers.linear import NF4Linear
from qlora.layers.weight import FrozenWeight
from qlora.models.originals import Originals
from qlora_kernels.weight import QuantizedWeight

WIDEST = 8192  # inputs whose H is taken whole: 268 MB
ROWS = 1 << 20  # values of a weight that are looked at together, about


@torch.no_grad()
def choose_codes_of(
    model: nn.Module,
    weights: Originals,
    batches: Sequence[Tensor],
    widest: int = WIDEST,
    done: Callable[[], None] = lambda: None,
) -> dict[str, LayerError]:
    """Give the quantized layers of a base the codes of GPTQ, in place; what came of it, by layer.

    Layers without a 16-bit weight, or that the text never reaches, keep the nearest codes.

    Args:
        model: in evaluation mode, without adapters.
        weights: of the model before it was quantized.
        batches: token ids [b, t] without padding.
        widest: inputs among which errors are fed on; of more, within blocks of at most so many.
        done: is called after each layer.
    """
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear) and name in weights.there
    }
    widths = {name: layer.in_features for name, layer in layers.items()}
    found: dict[str, LayerError] = {}
    for name, H in input_moments(model, widths, batches, widest):
        found[name] = choose_layer(layers[name], weights.weight(name, H.device), H)
        done()
    return found


def choose_layer(layer: NF4Linear, W: Tensor, H: Tensor) -> LayerError:
    """GPTQ's codes of W [out, in] for a layer, if its error under H [parts, width, width] falls by them."""
    was = layer.quantized
    size, before = _error(W, None, H), _error(W, was, H)
    if not 0 < before < math.inf or not 0 < size < math.inf:
        return LayerError(0.0, 0.0)
    made = gptq(was, W, H)
    after = before if made is was else _error(W, made, H)
    if not after < before:
        return LayerError(before / size, before / size)
    layer.quantized = made
    return LayerError(before / size, after / size)


def _error(W: Tensor, quantized: QuantizedWeight | None, H: Tensor) -> float:
    """tr(E H Et) for E = W - Q (None: 0), some rows at a time."""
    total = 0.0
    for part, values in FrozenWeight(W if quantized is None else quantized).chunks(elements=ROWS):
        E = values if quantized is None else W[part].float() - values
        for within, block in zip(E.split(H.shape[1], dim=1), H, strict=True):
            total += weighted_error(within, block)
    return total

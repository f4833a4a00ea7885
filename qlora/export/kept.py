"""What a format keeps of an adapted model, computed in memory: what its files must decode to.

    kept = FORMATS[to].keeps(found, spec)     how the format rounds a layer, and whatever is no layer
    kept.settle(base)                         a dense model of these values, in the place of its base: the export is it

An export in 4 bits may be far from the adapted model and yet be whole. It is never far from this one: only the order of
sums differs. So damage shows here that rounding would hide. The layers are those of the loaded model, with its
names and order of rows; nothing is taken from the files. The alternative, checksums of what was written,
would find a changed byte and no mistake of the writer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.export.adapted_source import AdaptedSource, AdaptedWeights
from qlora.layers.linear import frozen_weight
from qlora.layers.weight import FrozenWeight
from qlora.models.load import load_source
from qlora.specs import Quantization


@dataclass(frozen=True)
class Kept:
    """What of an adapted model a format keeps.

    Attributes:
        found: the adapted model.
        weights: of the base that it is exported onto; prepared.
        layer: (name, W) of a linear layer -> what it is to compute with, [out, in], its adapter included.
        other: (name, value) of another parameter -> what becomes of it.
    """

    found: AdaptedSource
    weights: AdaptedWeights
    layer: Callable[[str, FrozenWeight], Tensor]
    other: Callable[[str, Tensor], Tensor]

    @property
    def on_trained(self) -> bool:
        """Whether it is exported onto the very values that the training saw, or onto those of the checkpoint."""
        return self.weights.layers.quantization.bits == 4 and self.found.files.base.dtype is not None

    def load_base(self, dtype: str) -> nn.Module:
        """The base with the values of the checkpoint, in `dtype` on the CPU.

        Raises:
            UserError: see `load_source`.
        """
        source, four_bit = self.found.source, self.weights.layers.quantization.bits == 4
        recipe = self.found.files.base.quantization(source.packed) if four_bit else Quantization(16)
        return load_source(source, recipe, dtype=dtype, device="cpu")

    @torch.no_grad()
    def settle(self, base: Any) -> None:
        """Give a base without adapters the values that are kept, a layer at a time."""
        dtype, done = base.get_input_embeddings().weight.dtype, set()
        for layer in sorted(self.weights.layers.shapes.keys() | self.weights.adapted):
            module: Any = base.get_submodule(layer)
            dense = self.layer(layer, frozen_weight(module)).to(dtype)
            with torch.device("meta"):
                replacement = nn.Linear(dense.shape[1], dense.shape[0], module.bias is not None)
            replacement.weight, replacement.bias = nn.Parameter(dense, requires_grad=False), module.bias
            base.set_submodule(layer, replacement)
            done.add(f"{layer}.weight")
        for name, parameter in base.named_parameters():
            if name not in done:
                parameter.copy_(self.other(name, parameter))


def prepared(found: AdaptedSource, base: str) -> AdaptedWeights:
    """The weights of a base, its layers noted."""
    weights = AdaptedWeights(found, base)
    weights.prepare(found.empty())
    return weights

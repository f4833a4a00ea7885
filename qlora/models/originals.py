"""The 16-bit weights of a base whose layers are quantized in memory: read from the checkpoint when they are asked for.

    originals(source) -> Originals        .weight(layer) -> [out, in], one tensor at a time

A name in the model is looked for as it is, and without or with the prefix of the base model, as in GPT-2's own files.
Where a checkpoint names its tensors otherwise, or is a pickle, the layer is not `there`. The alternative, to keep the
weights as they stream by, would hold the model in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.models.gguf import gguf_tensors
from qlora.models.packed import stored_slices
from qlora.models.quantize import QuantizePass
from qlora.models.source import Source, load_config
from qlora.specs import Quantization


class Originals:
    """The weights of the linear layers, unquantized.

    Attributes:
        shapes: (out, in) by layer of the model.
        there: the layers whose weights can be read.
    """

    def __init__(self, stored: Mapping[str, Any], layers: QuantizePass, prefix: str):
        self.shapes, self._transposed = layers.shapes, layers.transposed
        self._found = {}
        for layer in self.shapes:
            names = (layer, layer.removeprefix(f"{prefix}."), f"{prefix}.{layer}")
            held = [stored[f"{name}.weight"] for name in names if f"{name}.weight" in stored]
            if held and self._fits(layer, held[0]):
                self._found[layer] = held[0]

    def _fits(self, layer: str, tensor: Any) -> bool:
        if not hasattr(tensor, "get_shape"):
            return True  # a GGUF file's, checked as it was loaded
        shape = tuple(tensor.get_shape())
        return (shape[::-1] if layer in self._transposed else shape) == self.shapes[layer]

    @property
    def there(self) -> frozenset[str]:
        return frozenset(self._found)

    def weight(self, layer: str, device: torch.device | str = "cpu") -> Tensor:
        """W [out, in] of a layer that is `there`, in the type it is stored in."""
        tensor: Tensor = self._found[layer][...].to(device)
        return tensor.t() if layer in self._transposed else tensor


def originals(source: Source) -> Originals:
    """The 16-bit weights of a source; none of them is there for a checkpoint that is NF4 already."""
    config = load_config(source)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    layers = QuantizePass(source, Quantization(4 if source.packed else 16))
    layers.note(empty)
    if source.packed:
        stored: Mapping[str, Any] = {}
    elif source.gguf is not None:
        stored = gguf_tensors(source.gguf, config, torch.float32)
    else:
        stored = stored_slices(source)
    return Originals(stored, layers, empty.base_model_prefix)

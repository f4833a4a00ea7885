"""TODO head of models.quantize."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora.errors import UserError, problem
from qlora.layers import nf4
from qlora.layers.linear import LINEAR, NF4Linear, linear_names
from qlora.models.packed import PackedTensor, packed_layers
from qlora.models.source import Source
from qlora.specs import Quantization
from qlora_kernels.weight import QuantizedWeight


@dataclass(frozen=True)
class BaseRecipe:
    """Where a base came from and how it was made: enough to make it again. `fingerprint` identifies the weights.

    `scales` is None for a checkpoint that was NF4 already, which does not tell. Adapters from before that field had
    absmax.
    """

    model: str
    revision: str | None
    bits: int
    blocksize: int
    double_quant: bool
    dtype: str
    fingerprint: str
    scales: str | None = "absmax"

    def quantization(self, source: Source) -> Quantization:
        """What makes these weights from `source` again."""
        if self.bits != 4 or source.packed:
            return Quantization(self.bits)
        return Quantization(4, self.blocksize, self.double_quant, self.scales)


class LinearLayers:
    """The linear weights of a model as they stream by: which there are, their NF4 form, and a fingerprint of them all.

    An option that is None is 64, True or "absmax" for weights to quantize, and what the file holds for a checkpoint
    that is NF4 already (`scales` stays None there: the file does not tell). The resolved values are those of the
    attribute `quantization`.

    Raises:
        UserError: an option was given that is impossible, has no effect on 16 bits, or contradicts the checkpoint.
    """

    def __init__(self, source: Source, quantization: Quantization):
        self.packed = packed_layers(source) if source.packed else None
        given = dataclasses.asdict(quantization)
        bits = given.pop("bits")
        held = [dict(zip(given, (*layer, None), strict=True)) for layer in (self.packed or {}).values()]
        problems = []
        if bits not in (4, 16):
            problems.append(problem("bits", bits, "must be 4 or 16", "4 quantizes to NF4, 16 keeps 16-bit weights"))
        if self.packed is not None and bits == 16:
            problems.append(
                problem("bits", bits, "this checkpoint is NF4 already", "Use --bits 4, or the 16-bit original")
            )
        for name, value in given.items():
            found = {layer[name] for layer in held} - {value}
            if value is not None and bits == 16:
                problems.append(
                    problem(name, value, "has no effect on 16-bit weights", "Leave it out, or use --bits 4")
                )
            elif value is not None and found:
                what = "" if found == {None} else f" with {name}={', '.join(map(str, sorted(found)))}"
                problems.append(
                    problem(
                        name, value, f"this checkpoint is NF4 already{what}", "Leave it out, or use the 16-bit original"
                    )
                )
        defaults = held[0] if held else {"blocksize": 64, "double_quant": True, "scales": "absmax"}
        made = {name: defaults[name] if value is None else value for name, value in given.items()}
        if not held:
            problems += Quantization(bits if bits in (4, 16) else 4, **made).problems()
        if problems:
            raise UserError(problems)
        self.quantization = Quantization(bits, **made)  # resolved
        self.shapes: dict[str, tuple[int, int]] = {}  # [out, in] by layer
        self.transposed: set[str] = set()
        self.samples: dict[str, bytes] = {}

    def note(self, model: nn.Module) -> None:
        """Note the linear layers of the empty model."""
        for name in linear_names(model) if self.packed is None else self.packed:
            layer = model.get_submodule(name)
            if not isinstance(layer, LINEAR):
                raise UserError(
                    problem(
                        "model",
                        name,
                        "is quantized in the checkpoint but is no linear layer of the model",
                        "Use the 16-bit original",
                    )
                )
            self.shapes[name] = (layer.weight.shape[0], layer.weight.shape[1])
            if isinstance(layer, Conv1D):
                self.transposed.add(name)
                self.shapes[name] = self.shapes[name][::-1]

    def prepare(self, model: nn.Module) -> None:
        """Note them and, with 4 bits, put NF4Linear in their places."""
        self.note(model)
        if self.quantization.bits == 4:
            for name, (out, columns) in self.shapes.items():
                layer = model.get_submodule(name)
                blocksize, double_quant = (
                    (self.quantization.blocksize, self.quantization.double_quant)
                    if self.packed is None
                    else self.packed[name]
                )
                with torch.device("meta"):
                    replacement = NF4Linear(columns, out, layer.bias is not None, blocksize, double_quant)
                if layer.bias is not None:
                    replacement.bias = layer.bias
                model.set_submodule(name, replacement)

    def wants(self, name: str) -> bool:
        """Whether the parameter `name` belongs to a layer noted here (its weight or, once quantized, a constant of it)."""
        layer, _, part = name.rpartition(".")
        return layer in self.shapes and part != "bias"

    def quantized(self, name: str, value) -> QuantizedWeight:
        """The NF4 form of the weight parameter `name`; records its sample."""
        layer = name.removesuffix(".weight")
        if isinstance(value, PackedTensor):
            weight = value.load()
            step = nf4.row_chunk(weight, 1)
            self.sample(layer, nf4.dequantize(nf4.rows(weight, 0, step)))
            return weight
        oriented = value.t().contiguous() if layer in self.transposed else value
        if oriented.shape != self.shapes[layer]:
            raise UserError(
                problem(
                    name,
                    tuple(oriented.shape),
                    f"the model needs {self.shapes[layer]}",
                    "Get the checkpoint that belongs to this config",
                )
            )
        self.sample(layer, oriented)
        made = self.quantization
        return nf4.quantize(oriented, made.blocksize, made.double_quant, name, made.scales)

    def sample(self, layer: str, weight: Tensor) -> None:
        """Remember the first values of `weight` [out, in] for the fingerprint."""
        values = weight[0, :256].to(torch.bfloat16).contiguous().cpu()
        self.samples[layer] = str(tuple(weight.shape[1:])).encode() + values.view(torch.uint8).numpy().tobytes()

    def visit(self, name: str, value) -> dict[str, Tensor]:
        """For `stream`: the buffers of the NF4 layer, or the weight as it is."""
        layer = name.removesuffix(".weight")
        if self.quantization.bits == 16:
            self.sample(layer, value.t() if layer in self.transposed else value)
            return {name: value}
        weight = self.quantized(name, value)
        parts = {name: weight.packed, f"{layer}.absmax": weight.absmax}
        if weight.nested_absmax is not None:
            parts |= {f"{layer}.nested_absmax": weight.nested_absmax, f"{layer}.nested_offset": weight.nested_offset}
        return parts

    def fingerprint(self) -> str:
        """A hash over names, widths and first values of every linear weight: tells bases apart, not every byte of them."""
        digest = hashlib.sha256()
        for name in sorted(self.samples):
            digest.update(name.encode() + self.samples[name])
        return digest.hexdigest()[:32]

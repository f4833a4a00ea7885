"""The pass over a model's linear weights as they stream by: which there are, their NF4 form, and a fingerprint of all.

    resolve_quantization(source, asked)     what an option that was not given means for this source
    QuantizePass.prepare, .wants, .on_tensor    the three functions that `load.load_streaming` calls
    Fingerprint                             a hash over names, widths and first values: tells bases apart

`merge` and `qlora quantize` use the pass without `prepare` and `on_tensor`: they note the layers, and write what
`quantized` returns. The alternative, to quantize the loaded model, would hold it in 16 bits first.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora.errors import UserError, problem
from qlora.layers import nf4
from qlora.layers.linear import NF4Linear, is_linear, left_alone, linear_names
from qlora.models.device import DTYPES
from qlora.models.info import BaseInfo
from qlora.models.packed import PackedTensor, packed_layers
from qlora.models.source import Source
from qlora.specs import Quantization, ResolvedQuantization
from qlora_kernels.weight import QuantizedWeight

Packed = dict[str, tuple[int, bool]]  # by layer: its block size, and whether its scales are double-quantized


def resolve_quantization(source: Source, quantization: Quantization) -> ResolvedQuantization:
    """What each option of `quantization` is for the weights of `source`.

    An option that is None is 64, True or "absmax" for weights to quantize, and what the file holds for a checkpoint
    that is NF4 already (`scales` stays None there: the file does not tell).

    Raises:
        UserError: an option was given that is impossible, has no effect on 16 bits, or contradicts the checkpoint.
    """
    return _resolved(packed_layers(source) if source.packed else None, quantization)


def _resolved(packed: Packed | None, quantization: Quantization) -> ResolvedQuantization:
    given = dataclasses.asdict(quantization)
    bits, cast_to = given.pop("bits"), given.pop("cast_to")
    held = [dict(zip(given, (*layer, None), strict=True)) for layer in (packed or {}).values()]
    problems = quantization.problems()
    if packed is not None and bits == 16:
        problems.append(problem("bits", bits, "this checkpoint is NF4 already", "Use `bits=4`, or the 16-bit original"))
    for name, value in given.items():
        if value is not None and bits == 16:
            problems.append(problem(name, value, "has no effect on 16-bit weights", "Leave it out, or use `bits=4`"))
        elif value is not None:
            problems += _contradiction(name, value, [layer[name] for layer in held])
    if problems:
        raise UserError(problems)
    made: dict[str, Any] = held[0] if held else {}
    made |= {name: value for name, value in given.items() if value is not None}
    return ResolvedQuantization(bits, cast_to=cast_to, **made)


def _contradiction(name: str, value: object, held: list[int | bool | None]) -> list[str]:
    """The line for an option that is not what the layers of a checkpoint hold (None: it does not tell)."""
    others = [layer for layer in dict.fromkeys(held) if layer != value]
    if not others:
        return []
    told = sorted(layer for layer in others if layer is not None)
    what = f" with {name}={', '.join(map(str, told))}" if told else ""
    rule = f"this checkpoint is NF4 already{what}"
    return [problem(name, value, rule, "Leave it out, or use the 16-bit original")]


class Fingerprint:
    """Hashes over samples of the weights: tells bases apart, not every byte of them.

    "<linear>-<others>": of every linear weight its name, width and first 256 values, and likewise of what is not
    quantized or adapted (embedding with its vocabulary, head, norms, biases). Adapters from before the second have the
    first alone.
    """

    def __init__(self) -> None:
        self._samples: dict[str, bytes] = {}
        self._others: dict[str, bytes] = {}

    def add(self, layer: str, weight: Tensor) -> None:
        """Remember the width and the first 256 values of `weight` [out, in]."""
        self._samples[layer] = str(tuple(weight.shape[1:])).encode() + _first(weight[0])

    def add_other(self, name: str, value: Tensor) -> None:
        """Remember the shape and the first 256 values of another parameter."""
        row = value[(0,) * (value.dim() - 1)] if value.dim() > 1 else value.reshape(-1)
        self._others[name] = str(tuple(value.shape)).encode() + _first(row)

    def digest(self, parameters: Iterable[str]) -> str:
        """32 and 32 hexadecimal digits, the same in whatever order the weights came; without the second where another
        parameter of the model (`parameters`: all their names) did not come.
        """
        layers = {f"{name}.weight" for name in self._samples}
        others = [name for name in parameters if name not in layers]
        linear = _digest(self._samples)
        if not all(name in self._others for name in others):
            return linear
        return f"{linear}-{_digest({name: self._others[name] for name in others})}"


def _first(row: Tensor) -> bytes:
    values = row[:256].to(torch.bfloat16).contiguous().cpu()
    return values.view(torch.uint8).numpy().tobytes()


def _digest(samples: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()[:32]


def same_weights(one: BaseInfo, two: BaseInfo) -> bool:
    """Whether two fingerprints are of the same base, as far as both tell. What fp16 rounded is not compared in full."""
    first, second = (str(base.fingerprint).split("-") for base in (one, two))
    rounded = "fp16" in (one.dtype, two.dtype)
    return all(a == b for a, b in zip(first[: 1 if rounded else 2], second, strict=False))


class QuantizePass:
    """The linear weights of one model as they stream by.

    Attributes:
        quantization: the options, resolved.
        shapes: (out, in) by layer, once the empty model was noted.
        transposed: the layers that store [in, out] (GPT-2's Conv1D).
        fingerprint: of the weights that have passed.
        types: of the weights that were quantized, as they came.

    Raises:
        UserError: see `resolve_quantization`.
    """

    def __init__(self, source: Source, quantization: Quantization):
        self.packed = packed_layers(source) if source.packed else None
        self.quantization = _resolved(self.packed, quantization)
        self.shapes: dict[str, tuple[int, int]] = {}
        self.transposed: set[str] = set()
        self.fingerprint = Fingerprint()
        self.types: set[torch.dtype] = set()

    @property
    def stored(self) -> str | None:
        """The type of the weights that were quantized, before any cast; fp32 where there were several; None where none
        was.
        """
        names = [name for name, dtype in DTYPES.items() if {dtype} == self.types]
        return None if not self.types else names[0] if names else "fp32"

    def reads_stored(self, name: str) -> bool:
        """Whether the parameter `name` is to be read in the type that the checkpoint has it in."""
        return self.quantization.bits == 4 and self.wants(name)

    def note(self, model: nn.Module) -> None:
        """Note the linear layers of the empty model.

        Raises:
            UserError: a layer has no weights, or the checkpoint quantizes one that is not linear or must stay dense.
        """
        modules, alone = dict(model.named_modules()), {} if self.packed is None else left_alone(model)
        problems = []
        for name in linear_names(model) if self.packed is None else self.packed:
            layer: Any = modules.get(name)
            if layer is None or not is_linear(layer) or name in alone:
                why = f"which must stay dense: {alone[name]}" if name in alone else "which is no linear layer of it"
                rule = f"the checkpoint quantizes {name}, {why}"
                problems.append(problem("model", type(model).__name__, rule, "Use the 16-bit original"))
                continue
            rows, columns = layer.weight.shape
            if isinstance(layer, Conv1D):
                self.transposed.add(name)
                rows, columns = columns, rows
            self.shapes[name] = (rows, columns)
        empty = [name for name, shape in self.shapes.items() if 0 in shape]
        if empty:
            rule = f"its config describes layers without weights, {empty[0]} for one"
            problems.append(problem("model", type(model).__name__, rule, "Get the whole checkpoint again"))
        if problems:
            raise UserError(problems)

    def prepare(self, model: nn.Module) -> None:
        """Note them and, with 4 bits, put NF4Linear in their places."""
        self.note(model)
        if self.quantization.bits != 4:
            return
        made = self.quantization
        for name, (out, columns) in self.shapes.items():
            bias = getattr(model.get_submodule(name), "bias", None)
            blocksize, double_quant = (self.packed or {}).get(name, (made.blocksize, made.double_quant))
            with torch.device("meta"):
                replacement = NF4Linear(columns, out, bias is not None, blocksize, double_quant)
            if bias is not None:
                replacement.bias = bias
            model.set_submodule(name, replacement)

    def wants(self, name: str) -> bool:
        """Whether the parameter `name` belongs to a noted layer (its weight or, once quantized, a constant of it)."""
        layer, _, part = name.rpartition(".")
        return layer in self.shapes and part != "bias"

    def on_tensor(self, name: str, value: Tensor | PackedTensor) -> dict[str, Tensor]:
        """The buffers of the NF4 layer, or the weight as it is, by full name."""
        if self.quantization.bits == 16 and isinstance(value, Tensor):
            self.dense(name, value)
            return {name: value}
        layer, weight = name.removesuffix(".weight"), self.quantized(name, value)
        parts = {name: weight.packed, f"{layer}.absmax": weight.absmax}
        if weight.nested_absmax is not None and weight.nested_offset is not None:
            parts |= {f"{layer}.nested_absmax": weight.nested_absmax, f"{layer}.nested_offset": weight.nested_offset}
        return parts

    def dense(self, name: str, value: Tensor) -> Tensor:
        """The weight parameter `name` as [out, in], unquantized; adds it to the fingerprint.

        Raises:
            UserError: another shape than the model has.
        """
        layer = name.removesuffix(".weight")
        weight = value.t() if layer in self.transposed else value
        self._check_shape(name, weight.shape)
        self.fingerprint.add(layer, weight)
        return weight

    def quantized(self, name: str, value: Tensor | PackedTensor) -> QuantizedWeight:
        """The NF4 form of the weight parameter `name`; adds it to the fingerprint.

        Raises:
            UserError: another shape than the model has, or NaN or inf in it.
        """
        layer = name.removesuffix(".weight")
        if isinstance(value, PackedTensor):
            weight = value.load()
            self._check_shape(name, weight.shape)
            step = nf4.row_chunk(weight, 1)
            self.fingerprint.add(layer, nf4.dequantize(nf4.rows(weight, 0, step)))
            return weight
        oriented = value.t().contiguous() if layer in self.transposed else value
        self._check_shape(name, oriented.shape)
        self.fingerprint.add(layer, oriented)
        made = self.quantization
        if oriented.dtype not in DTYPES.values():
            oriented = oriented.float()
        self.types.add(oriented.dtype)
        if made.cast_to is not None:
            oriented = oriented.to(DTYPES[made.cast_to])
        return nf4.quantize(oriented, made.blocksize, made.double_quant, name, made.scales or "absmax")

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        needed = self.shapes[name.removesuffix(".weight")]
        if tuple(shape) != needed:
            rule, remedy = f"the model needs {needed}", "Get the checkpoint that belongs to this config"
            raise UserError(problem(name, tuple(shape), rule, remedy))


def check_finite(model: nn.Module) -> None:
    """Look at every weight that stayed in 16 or 32 bits; those that were quantized have been looked at.

    Raises:
        UserError: NaN or inf in one of them, by name.
    """
    bad = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    if bad:
        rule, remedy = (
            "a weight must be finite, and holds NaN or inf",
            "The checkpoint is damaged or diverged; load another",
        )
        raise UserError([problem("model", name, rule, remedy) for name in bad])


def is_finite(values: Tensor) -> bool:
    """Whether every value is a finite number: by the smallest and the largest, which NaN reaches too. One pass, and no
    tensor of its size (but for floats of one byte, which torch does not compare).
    """
    if values.numel() == 0 or values.is_meta or not values.is_floating_point():
        return True
    comparable = values if values.element_size() > 1 else values.float()
    return all(bool(end.isfinite()) for end in comparable.detach().aminmax())

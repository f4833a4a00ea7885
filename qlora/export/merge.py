"""Base + adapter to an ordinary Hugging Face folder, tensor by tensor into shards.

    source -> transform(name, tensor) -> writer      an adapted W becomes g (W + s B A) (DoRA) or W + s B A (LoRA)

Nothing is kept: each tensor is written as it comes, and peak memory is about two tensors. W is by default the
dequantized NF4 weight, because the adapter was trained on that; `base="original"` merges onto the checkpoint's own
weight instead; of an adapter that began by undoing the quantization error (`start`) that beginning is taken off first,
since these weights have no such error:

    W + s (B A - B0 A0),   m ||W_j|| / m0_j in the place of m        so that an untrained adapter changes nothing

The result is written in float32 arithmetic with one rounding to the output dtype. Merging and
quantizing again, as others offer, is not: it rounds the update onto the 4-bit grid again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora.errors import UserError, problem
from qlora.export.peft import KEYS, PREFIX, TENSORS, read_adapter_info, read_start
from qlora.export.shards import Written, check_new_folder, write_model
from qlora.layers.adapters import merged_weight
from qlora.layers.weight import FrozenWeight
from qlora.models.device import DTYPES
from qlora.models.info import BaseInfo
from qlora.models.quantize import QuantizePass
from qlora.models.source import resolve
from qlora.specs import AdapterSpec, Quantization


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str = "dequantized",
    dtype: str = "bf16",
    model: str | None = None,
    shard_size: int = 10**9,
    trust_remote_code: bool = False,
) -> Path:
    """Merge an adapter folder into its base and write a model that plain transformers loads; returns the folder.

    Args:
        adapter: the adapter's folder.
        output: the folder to write, new or empty.
        base: "dequantized" (the weights that training saw) or "original" (those of the checkpoint).
        dtype: of the merged weights: bf16, fp16 or fp32.
        model: where the base lies now if it has moved since the training; its weights must be the same.
        shard_size: bytes of the largest file.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        UserError: the output is not empty, the base is not the one of the training, an adapted layer is not in it, or
            the disk is full.
    """
    trained, spec = read_adapter_info(adapter)
    name = model or trained.model
    problems = _option_problems(name, base, dtype, trained)
    try:
        folder = check_new_folder(output)
    except UserError as error:
        problems += error.problems
    if problems or name is None:
        raise UserError(problems)
    source = resolve(name, trained.revision if model is None else None, trust_remote_code=trust_remote_code)
    if source.packed and base == "original":
        rule = f"{name} is quantized itself and holds no original weights"
        raise UserError(problem("base", base, rule, "Use `base=dequantized`, or `model` with the original"))
    quantized = base == "dequantized" and (trained.bits == 4 or source.packed)
    layers = QuantizePass(source, trained.quantization(source.packed) if quantized else Quantization(16))
    start = None if quantized else read_start(adapter)
    transform = _Merge(layers, spec, load_file(Path(adapter).expanduser() / TENSORS), DTYPES[dtype], start)
    return write_model(
        source,
        folder,
        transform,
        Written(
            dtype=DTYPES[dtype],
            read_as=DTYPES[trained.dtype] if quantized and trained.dtype else "auto",
            shard_size=shard_size,
        ),
        prepare=layers.note,
        finish=lambda merged: transform.check_all(name, trained),
    )


def _option_problems(name: str | None, base: str, dtype: str, trained: BaseInfo) -> list[str]:
    """What is wrong with the options, before anything is looked for."""
    problems = []
    if name is None:
        rule = "the adapter does not say which base it belongs to"
        problems.append(problem("model", None, rule, "Name it with `model`"))
    if base not in ("dequantized", "original"):
        problems.append(problem("base", base, "must be dequantized or original", "dequantized is what was trained"))
    if dtype not in DTYPES:
        problems.append(problem("dtype", dtype, f"must be one of {', '.join(DTYPES)}", "bf16 is the default"))
    if trained.bits is None and base == "dequantized":
        rule = "the adapter was not made here and does not say how its base was quantized"
        problems.append(problem("base", base, rule, "Use `base=original`"))
    return problems


def _parts(tensors: dict[str, Tensor], layer: str) -> list[Tensor | None]:
    """A, B and m of a layer."""
    return [tensors.get(f"{PREFIX}{layer}.{KEYS[part]}") for part in ("lora_A", "lora_B", "magnitude")]


class _Merge:
    """transform(name, tensor) -> what to write: linear weights merged, everything else in the output dtype."""

    def __init__(
        self,
        layers: QuantizePass,
        spec: AdapterSpec,
        tensors: dict[str, Tensor],
        target: torch.dtype,
        start: dict[str, Tensor] | None = None,
    ):
        self.layers, self.spec, self.tensors, self.dtype, self.start = layers, spec, tensors, target, start
        self.unmerged = set(spec.modules)

    def __call__(self, parameter: str, value: Any) -> dict[str, Tensor]:
        layer = parameter.removesuffix(".weight")
        if parameter == layer or not (layer in self.layers.shapes or layer in self.spec.modules):
            return {parameter: value.to(self.dtype)}
        weight = self._base_weight(parameter, layer, value)
        result = self._merged(layer, weight) if layer in self.spec.modules else weight.dense(self.dtype)
        return {parameter: result.t().contiguous() if layer in self.layers.transposed else result}

    def _base_weight(self, parameter: str, layer: str, value: Any) -> FrozenWeight:
        """W [out, in]: as training had it, or of the checkpoint."""
        if layer not in self.layers.shapes:  # a head that was adapted
            return FrozenWeight(value)
        if self.layers.quantization.bits == 4:
            return FrozenWeight(self.layers.quantized(parameter, value))
        return FrozenWeight(self.layers.dense(parameter, value))

    def _merged(self, layer: str, weight: FrozenWeight) -> Tensor:
        """W with its adapter [out, in], in the output dtype."""
        self.unmerged.discard(layer)
        A, B, m = _parts(self.tensors, layer)
        if A is None or B is None:
            rule = "the adapter file holds only a part of its tensors"
            raise UserError(problem("adapter", layer, rule, "Use another copy of the adapter"))
        if weight.shape != (B.shape[0], A.shape[1]):
            rule = f"fits a weight of {(B.shape[0], A.shape[1])}, the base has {weight.shape}"
            raise UserError(problem("adapter", layer, rule, "Name the base it was trained on"))
        A, B, magnitude = A.float(), B.float(), None if m is None else m.float()
        if self.start is not None:
            weight, magnitude = self._without_start(layer, weight, magnitude)
        return merged_weight(weight, A, B, magnitude, self.spec.scaling, self.dtype)

    def _without_start(self, layer: str, weight: FrozenWeight, m: Tensor | None) -> tuple[FrozenWeight, Tensor | None]:
        """The original weight without what the start will add to it, in float32, and m as it would be there."""
        A, B, m_start = _parts(self.start or {}, layer)
        assert A is not None and B is not None  # `read_start` looked
        dense = weight.dense(torch.float32)
        if m is not None and m_start is not None:
            m = m * dense.norm(dim=1) / m_start.where(m_start != 0, torch.ones_like(m_start))
        return FrozenWeight(torch.addmm(dense, B, A, alpha=-self.spec.scaling)), m

    def check_all(self, name: str, trained: BaseInfo) -> None:
        """Once every tensor has passed.

        Raises:
            UserError: an adapted layer was not in the base, or the base has other weights than that of the training.
        """
        remedy = "Name the base it was trained on with `model`"
        if self.unmerged:
            rule = f"is no layer of {name}"
            raise UserError([problem("adapter", layer, rule, remedy) for layer in sorted(self.unmerged)])
        if trained.fingerprint is not None and self.layers.fingerprint.digest() != trained.fingerprint:
            rule = "its weights are not those the adapter was trained on"
            remedy = f"Give the base of the training ({trained.model}) with `model`"
            raise UserError(problem("model", name, rule, remedy))

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
from torch import Tensor, nn

from qlora.data.chat import stop_ids
from qlora.errors import UserError, problem
from qlora.export.peft import AdapterFiles, adapter_tokenizer, file_key, read_adapter
from qlora.export.shards import Written, check_new_folder, in_dtype, write_model
from qlora.layers.adapters import merged_weight
from qlora.layers.weight import FrozenWeight
from qlora.models.device import DTYPES
from qlora.models.info import BaseInfo
from qlora.models.quantize import QuantizePass, same_weights
from qlora.models.source import load_tokenizer, resolve
from qlora.specs import Quantization


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
        UserError: the output is not empty, or something else appears there in the meantime (the result is then beside
            it); whatever `load_adapter` refuses; the base is not the one of the training; a value is beyond the range
            of `dtype`, or no finite number; the disk is full.
    """
    files = read_adapter(adapter)
    trained = files.base
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
    transform = _Merge(layers, files, DTYPES[dtype], start=None if quantized else files.start)
    own = adapter_tokenizer(files.folder, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source) if own is None else own
    return write_model(
        source,
        folder,
        transform,
        Written(
            dtype=DTYPES[dtype],
            read_as=DTYPES[trained.dtype] if quantized and trained.dtype else "auto",
            shard_size=shard_size,
            stops=tuple(stop_ids(tokenizer)),
        ),
        tokenizer,
        prepare=transform.prepare,
        finish=lambda merged: transform.check_all(merged, name),
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


class _Merge:
    """transform(name, tensor) -> what to write: linear weights merged, everything else in the output dtype."""

    def __init__(
        self, layers: QuantizePass, files: AdapterFiles, target: torch.dtype, start: dict[str, Tensor] | None = None
    ):
        self.layers, self.files, self.spec, self.dtype, self.start = layers, files, files.spec, target, start
        self.unmerged = set(files.spec.modules)

    def prepare(self, empty: nn.Module) -> None:
        """Hold the adapter against the base before any of its tensors is read.

        Raises:
            UserError: what does not fit, in the lines of `load_adapter`.
        """
        self.layers.note(empty)
        problems = self.files.misfits(empty)
        if problems:
            raise UserError(problems)

    def __call__(self, parameter: str, value: Any) -> dict[str, Tensor]:
        layer = parameter.removesuffix(".weight")
        if parameter == layer or layer not in self.layers.shapes:
            self.layers.fingerprint.add_other(parameter, value)
        if parameter == layer or not (layer in self.layers.shapes or layer in self.spec.modules):
            return {parameter: in_dtype(parameter, value, self.dtype)}
        weight = self._base_weight(parameter, layer, value)
        result = self._merged(layer, weight) if layer in self.spec.modules else weight.dense(self.dtype)
        in_dtype(parameter, result, self.dtype)
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
        A, B, m = self._parts(self.files.tensors, layer)
        if self.start is not None:
            weight, m = self._without_start(layer, weight, m, self.start)
        return merged_weight(weight, A, B, m, self.spec.scaling, self.dtype)

    def _parts(self, tensors: dict[str, Tensor], layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and m of a layer, in float32."""
        m = tensors[file_key(f"{layer}.magnitude")].float() if self.spec.method == "dora" else None
        return tensors[file_key(f"{layer}.lora_A")].float(), tensors[file_key(f"{layer}.lora_B")].float(), m

    def _without_start(
        self, layer: str, weight: FrozenWeight, m: Tensor | None, start: dict[str, Tensor]
    ) -> tuple[FrozenWeight, Tensor | None]:
        """The original weight without what the start will add to it, in float32, and m as it would be there."""
        A, B, m_start = self._parts(start, layer)
        dense = weight.dense(torch.float32)
        if m is not None and m_start is not None:
            m = m * dense.norm(dim=1) / m_start.where(m_start != 0, torch.ones_like(m_start))
        return FrozenWeight(torch.addmm(dense, B, A, alpha=-self.spec.scaling)), m

    def check_all(self, merged: nn.Module, name: str) -> None:
        """Once every tensor has passed.

        Raises:
            UserError: an adapted layer was not in the base, or the base has other weights than that of the training.
        """
        remedy = "Name the base it was trained on with `model`"
        if self.unmerged:
            rule = f"is no layer of {name}"
            raise UserError([problem("adapter", layer, rule, remedy) for layer in sorted(self.unmerged)])
        trained = self.files.base
        prints = self.layers.fingerprint.digest([parameter for parameter, _ in merged.named_parameters()])
        if trained.fingerprint is not None and not same_weights(trained, BaseInfo(fingerprint=prints)):
            rule = "its weights are not those the adapter was trained on"
            remedy = f"Give the base of the training ({trained.model}) with `model`"
            raise UserError(problem("model", name, rule, remedy))

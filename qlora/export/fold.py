"""A DoRA adapter as a 4-bit base with rescaled constants and a plain LoRA adapter: exact, for servers without DoRA.

    y = g (W x + s B A x) = (diag(g) W) x + s (g B) A x,   g = m / n,   n_j = ||W_j + s B_j A||
    codes stay; absmax'_jb = absmax_jb g_j in float32; lora_B' = g B; lora_A as it is      LoRA is the case g = 1
    folder/            the base in bitsandbytes' layout: 0.5 + 4/64 bytes a weight (0.516 with double quantization)
    folder/adapter/    the LoRA adapter in PEFT's layout

Every block of a row has the row's g only where blocks lie inside rows: a width that is no multiple of the block size
does not fold. The alternatives lose: `bnb.write_requantized` rounds the update onto the 4-bit grid again, and dropping
m, as some converters do, is another model. What each loses is measured in tests/export/test_fold.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.errors import UserError, problem
from qlora.export.adapted_source import AdaptedSource, AdaptedWeights
from qlora.export.bnb import left_dense, state_four_bit
from qlora.export.kept import Kept, prepared
from qlora.export.peft import PEFT_CONFIG, TENSORS, file_key
from qlora.export.peft_write import peft_config
from qlora.export.shards import in_dtype, write_into
from qlora.files import write_json
from qlora.layers import nf4
from qlora.layers.weight import FrozenWeight
from qlora.models.device import DTYPES
from qlora.specs import ExportSpec
from qlora_kernels import ops, reference
from qlora_kernels.weight import QuantizedWeight

ADAPTER = "adapter"  # beside the base, not in its folder: transformers would take that for an adapter of another base


def write_folded(found: AdaptedSource, spec: ExportSpec, folder: Path) -> None:
    """Write the base with its constants rescaled, and the LoRA adapter that belongs to it, into an empty folder.

    Raises:
        UserError: a DoRA layer does not fold; the adapter does not fit its base, or that is not the one of the
            training; a value is beyond the range of `dtype`, or no finite number.
    """
    weights = AdaptedWeights(found, "dequantized")
    form = found.written(spec, weights)
    dense: list[str] = []
    tensors: dict[str, Tensor] = {}

    def prepare(empty: nn.Module) -> None:
        weights.prepare(empty)
        problems = _unfoldable(weights)
        if problems:
            raise UserError(problems)
        dense.extend(left_dense(empty, weights.layers.shapes))

    def transform(parameter: str, value: Any) -> dict[str, Tensor]:
        layer = weights.layer_of(parameter, value)
        weight = None if layer is None else weights.frozen(parameter, layer, value)
        gain = None
        if layer is not None and weight is not None and layer in weights.adapted:
            A, B, _ = weights.parts(layer)
            gain = weights.gain(layer, weight)
            tensors[file_key(f"{layer}.lora_A")] = A.contiguous()
            tensors[file_key(f"{layer}.lora_B")] = (B if gain is None else gain.unsqueeze(1) * B).contiguous()
        if weight is None or weight.quantized is None:
            return {parameter: in_dtype(parameter, value, form.dtype)}
        scaled = rescaled(weight.quantized, gain, double_quant=spec.double_quant)
        return {parameter + suffix: part for suffix, part in nf4.to_bitsandbytes(scaled, form.dtype).items()}

    def finish(written: PreTrainedModel) -> None:
        weights.check_all(written)
        state_four_bit(written, form.dtype, spec.double_quant, dense)

    write_into(folder, found.source, transform, form, found.tokenizer, prepare=prepare, finish=finish)
    (folder / ADAPTER).mkdir()
    save_file(tensors, folder / ADAPTER / TENSORS, metadata={"format": "pt"})
    config = peft_config(dataclasses.replace(weights.spec, method="lora"), weights.names)
    write_json(folder / ADAPTER / PEFT_CONFIG, config)


def keep_folded(found: AdaptedSource, spec: ExportSpec) -> Kept:
    """What `write_folded` keeps: all but what `double_quant` takes of the constants, and the dtype of the rest."""
    weights, dtype = prepared(found, "dequantized"), DTYPES[spec.dtype]

    def layer(name: str, weight: FrozenWeight) -> Tensor:
        adapted = name in weights.adapted
        gain = weights.gain(name, weight) if adapted else None
        if weight.quantized is None:
            W = weight.dense(dtype).float()
        else:
            W = nf4.dequantize(rescaled(weight.quantized, gain, double_quant=spec.double_quant))
        if not adapted:
            return W
        A, B, _ = weights.parts(name)
        return torch.addmm(W, B if gain is None else gain.unsqueeze(1) * B, A, alpha=weights.spec.scaling)

    return Kept(found, weights, layer, other=lambda name, value: value.to(dtype))


def rescaled(weight: QuantizedWeight, gain: Tensor | None, *, double_quant: bool) -> QuantizedWeight:
    """diag(gain) W with the codes of W. Blocks must lie inside rows where there is a gain [out]."""
    absmax = reference.decode_absmax(weight)
    if gain is not None:
        absmax = absmax * gain.repeat_interleave(weight.shape[1] // weight.blocksize)
    scales = ops.quantize_absmax(absmax, weight.nested_blocksize) if double_quant else (absmax,)
    return QuantizedWeight.of(weight.packed, tuple(scales), weight.shape, weight.blocksize, weight.nested_blocksize)


def _unfoldable(weights: AdaptedWeights) -> list[str]:
    """A line for every DoRA layer whose rows cannot be rescaled."""
    if weights.spec.method != "dora":
        return []
    remedy, problems, layers = "Use `to=hf`, which merges it", [], weights.layers
    for layer in sorted(weights.adapted):
        shape = layers.shapes.get(layer)
        if shape is None:
            problems.append(problem(layer, "(dense)", "is not in 4 bits, and has no constants to rescale", remedy))
            continue
        blocksize, _ = (layers.packed or {}).get(layer, (layers.quantization.blocksize, True))
        if shape[1] % blocksize:
            rule = f"does not fold: its width is no multiple of the block size {blocksize}, so rows share constants"
            problems.append(problem(layer, list(shape), rule, remedy))
    return problems

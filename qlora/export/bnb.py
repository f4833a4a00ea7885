"""A 4-bit checkpoint in bitsandbytes' layout, tensor by tensor into shards.

    source -> transform(name, tensor) -> writer      a linear weight P becomes P.weight (codes), P.weight.absmax, ...

`quantize_checkpoint` writes a base; `write_requantized` a base with its adapter merged, which rounds the update onto
the 4-bit grid: what that costs, its verification says. transformers loads both through bitsandbytes, and `load_base` as
they are. With `codes="gptq"` the quantized model is in memory first, its codes are chosen (`calibrate.codes`), and each
layer is written as it is there. The alternative, to let transformers quantize and save, holds the whole model and needs
bitsandbytes' kernels.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from qlora.errors import UserError, problem
from qlora.export.adapted_source import AdaptedSource, AdaptedWeights
from qlora.export.kept import Kept, prepared
from qlora.export.shards import CPU, Written, check_new_folder, in_dtype, write_into, write_model
from qlora.layers import nf4
from qlora.layers.linear import NF4Linear, is_linear
from qlora.layers.weight import FrozenWeight
from qlora.models.device import DTYPES, resolve_dtype
from qlora.models.quantize import QuantizePass
from qlora.models.source import Source, load_tokenizer, resolve
from qlora.specs import ExportSpec, Quantization


def quantize_checkpoint(
    model: str,
    output: str | Path,
    *,
    quantization: Quantization | None = None,
    dtype: str = "auto",
    shard_size: int = 10**9,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Path:
    """Write a 4-bit checkpoint that transformers loads through bitsandbytes, and `load_base` as it is.

    Linear layers but the head become NF4 (see `nf4.quantize`; None: the default options), everything else `dtype`
    ("auto": bf16 where this machine computes in it, else fp32).

    Returns:
        The folder.

    Raises:
        UserError: the output is not empty, the model is quantized already, a weight holds NaN or inf, or the disk is
            full.
    """
    quantization = quantization or Quantization()
    problems = ExportSpec(shard_size=shard_size).problems() + quantization.problems_of_nf4()
    if problems:
        raise UserError(problems)
    folder = check_new_folder(output)
    source = resolve(model, revision, trust_remote_code=trust_remote_code)
    return write_quantized(source, folder, quantization, dtype=dtype, shard_size=shard_size)


def write_quantized(
    source: Source,
    folder: Path,
    quantization: Quantization,
    *,
    dtype: str = "auto",
    shard_size: int = 10**9,
    chosen: tuple[nn.Module, str] | None = None,
) -> Path:
    """`quantize_checkpoint` of a model that was found already, into a folder that was looked at.

    Args:
        chosen: the same model in NF4, whose layers are written in the place of those that would be quantized here, and
            a hash of what decided its codes.

    Raises:
        UserError: see `quantize_checkpoint`.
    """
    if source.packed:
        raise UserError(problem("model", source.name, "is NF4 already", "Use it as it is"))
    target = DTYPES[resolve_dtype(dtype, CPU)]
    layers = QuantizePass(source, quantization)
    skipped: list[str] = []

    def prepare(empty: nn.Module) -> None:
        layers.note(empty)
        skipped.extend(left_dense(empty, layers.shapes))

    def transform(parameter: str, value: Any) -> dict[str, Tensor]:
        layer = parameter.removesuffix(".weight")
        if layer not in layers.shapes or parameter == layer:
            return {parameter: in_dtype(parameter, value, value.dtype)}
        held = None if chosen is None else chosen[0].get_submodule(layer)
        weight = held.quantized if isinstance(held, NF4Linear) else layers.quantized(parameter, value)
        parts = {key: part.cpu() for key, part in nf4.to_bitsandbytes(weight, target).items()}
        return {parameter + suffix: tensor for suffix, tensor in parts.items()}

    def finish(written: PreTrainedModel) -> None:
        state_four_bit(written, target, bool(layers.quantization.double_quant), skipped)
        if chosen is not None:
            written.config.qlora = {"codes": "gptq", "made_by": chosen[1]}

    form = Written(dtype=target, read_as=target, shard_size=shard_size, as_stored=layers.reads_stored)
    return write_model(source, folder, transform, form, load_tokenizer(source), prepare=prepare, finish=finish)


def left_dense(empty: nn.Module, quantized: Collection[str]) -> list[str]:
    """The linear layers that a 4-bit checkpoint keeps dense, which its config must name."""
    return [name for name, module in empty.named_modules() if is_linear(module) and name not in quantized]


def state_four_bit(written: PreTrainedModel, dtype: torch.dtype, double_quant: bool, dense: list[str]) -> None:
    """Say in a model's config that its linear layers but `dense` are NF4, to be computed in `dtype`."""
    written.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=dense,
    ).to_dict()


def write_requantized(found: AdaptedSource, spec: ExportSpec, folder: Path) -> None:
    """Write the merged model, quantized as its base was, into an empty folder.

    Raises:
        UserError: the adapter does not fit its base, or that is not the one of the training; a value is beyond the
            range of `dtype`, or no finite number.
    """
    weights, made = AdaptedWeights(found, spec.base), found.recipe
    form = found.written(spec, weights)
    dense: list[str] = []

    def prepare(empty: nn.Module) -> None:
        weights.prepare(empty)
        dense.extend(left_dense(empty, weights.layers.shapes))

    def transform(parameter: str, value: Any) -> dict[str, Tensor]:
        layer = weights.layer_of(parameter, value)
        if layer is None:
            return {parameter: in_dtype(parameter, value, form.dtype)}
        weight = weights.frozen(parameter, layer, value)
        if layer not in weights.layers.shapes:
            return {parameter: in_dtype(parameter, weights.merged(layer, weight, form.dtype), form.dtype)}
        again = weight.quantized if layer not in weights.adapted else None  # what has no adapter keeps its codes
        if again is None:
            whole, scales = weights.merged(layer, weight, torch.float32), made.scales or "absmax"
            again = nf4.quantize(whole, made.blocksize, made.double_quant, parameter, scales)
        return {parameter + suffix: part for suffix, part in nf4.to_bitsandbytes(again, form.dtype).items()}

    def finish(written: PreTrainedModel) -> None:
        weights.check_all(written)
        state_four_bit(written, form.dtype, made.double_quant, dense)

    write_into(folder, found.source, transform, form, found.tokenizer, prepare=prepare, finish=finish)


def keep_requantized(found: AdaptedSource, spec: ExportSpec) -> Kept:
    """What `write_requantized` keeps: the 4-bit grid of what is quantized again, one dtype of the rest."""
    weights, dtype, made = prepared(found, spec.base), DTYPES[spec.dtype], found.recipe

    def layer(name: str, weight: FrozenWeight) -> Tensor:
        if name not in weights.layers.shapes:
            return weights.merged(name, weight, dtype)
        whole = weights.merged(name, weight, torch.float32)
        if name not in weights.adapted and weight.quantized is not None:
            return whole
        return nf4.dequantize(nf4.quantize(whole, made.blocksize, made.double_quant, name, made.scales or "absmax"))

    return Kept(found, weights, layer, other=lambda name, value: value.to(dtype))

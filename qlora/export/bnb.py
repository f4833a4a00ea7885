"""TODO head of export.bnb."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from qlora.errors import UserError, problem
from qlora.export.shards import CPU, ShardWriter, check_new_folder, placeholder, write_config
from qlora.files import whole_folder
from qlora.layers import nf4
from qlora.layers.linear import LINEAR
from qlora.models.device import DTYPES, resolve_dtype
from qlora.models.load import stream
from qlora.models.quantize import LinearLayers
from qlora.models.source import load_tokenizer, resolve
from qlora.specs import Quantization


def quantize_checkpoint(
    model: str,
    output: str | Path,
    *,
    blocksize: int | None = None,
    double_quant: bool | None = None,
    scales: str | None = None,
    dtype: str = "auto",
    shard_size: int = 10**9,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Path:
    """Write a 4-bit checkpoint that transformers loads through bitsandbytes, and `load_base` as it is; returns the
    folder.

    Linear layers but the head become NF4 (`blocksize`, `double_quant`, `scales`: see `nf4.quantize`; None: its
    defaults), everything else `dtype` ("auto": bf16 where this machine computes in it, else fp32).

    Raises:
        UserError: the output is not empty, the model is quantized already, a weight holds NaN or inf, or the disk is
        full.
    """
    folder = check_new_folder(output)
    source = resolve(model, revision, trust_remote_code=trust_remote_code)
    if source.packed:
        raise UserError(problem("model", model, "is NF4 already", "Use it as it is"))
    target = DTYPES[resolve_dtype(dtype, CPU)]
    layers = LinearLayers(source, Quantization(4, blocksize, double_quant, scales))
    skipped: list[str] = []

    def note(empty: torch.nn.Module) -> None:
        layers.note(empty)
        skipped.extend(
            name for name, module in empty.named_modules() if isinstance(module, LINEAR) and name not in layers.shapes
        )

    with whole_folder(folder) as part:
        writer = ShardWriter(part, shard_size)

        def visit(parameter: str, value: Tensor) -> dict[str, Tensor]:
            layer = parameter.removesuffix(".weight")
            if layer in layers.shapes and parameter != layer:
                for suffix, tensor in nf4.to_bitsandbytes(layers.quantized(parameter, value), target).items():
                    writer.add(parameter + suffix, tensor)
            else:
                writer.add(parameter, value)
            return {parameter: placeholder(value)}

        written = stream(source, visit, dtype=target, device=CPU, prepare=note)
        writer.close()
        written.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=layers.quantization.double_quant,
            bnb_4bit_compute_dtype=target,
            llm_int8_skip_modules=skipped,
        ).to_dict()
        write_config(written, part, target)
        load_tokenizer(source).save_pretrained(part)
    return folder

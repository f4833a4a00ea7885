"""Base + adapter to an ordinary Hugging Face folder, and a base to a 4-bit one, tensor by tensor into shards.

    merge                each tensor of the base streams by; an adapted one becomes g (W + s B A) (DoRA) or W + s B A (LoRA)
    quantize_checkpoint  each linear weight becomes the tensors of a bitsandbytes 4-bit checkpoint

Nothing is kept: each tensor is written as it comes, and peak memory is about two tensors. W is by default the
dequantized NF4 weight, because the adapter was trained on that; `base="original"` merges onto the checkpoint's own
weight instead. The result is written in float32 arithmetic with one rounding to the output dtype. Merging and
quantizing again, as others offer, is not: it rounds the update onto the 4-bit grid again.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from qlora.errors import UserError, problem
from qlora.export.peft import KEYS, PREFIX, TENSORS, read_adapter_recipe
from qlora.export.shards import CPU, ShardWriter, check_new_folder, placeholder, write_config
from qlora.files import whole_folder
from qlora.layers.adapters import merged_weight
from qlora.layers.weight import FrozenWeight
from qlora.models.device import DTYPES
from qlora.models.load import stream
from qlora.models.quantize import LinearLayers
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

    `model` says where the base lies now if it has moved since the training; its weights must be the same.

    Raises:
        UserError: the output is not empty, the base is not the one of the training, an adapted layer is not in it, or
        the disk is full.
    """
    problems = []
    recipe, spec = read_adapter_recipe(adapter)
    name = model or recipe.model
    if name is None:
        problems.append(
            problem("model", None, "the adapter does not say which base it belongs to", "Name it with --model")
        )
    if base not in ("dequantized", "original"):
        problems.append(problem("base", base, "must be dequantized or original", "dequantized is what was trained"))
    if dtype not in DTYPES:
        problems.append(problem("dtype", dtype, f"must be one of {', '.join(DTYPES)}", "bf16 is the default"))
    if recipe.bits is None and base == "dequantized":
        problems.append(
            problem(
                "base",
                base,
                "the adapter was not made here and does not say how its base was quantized",
                "Use --base original",
            )
        )
    try:
        folder = check_new_folder(output)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    source = resolve(name, recipe.revision if model is None else None, trust_remote_code=trust_remote_code)
    if source.packed and base == "original":
        raise UserError(
            problem(
                "base",
                base,
                f"{name} is quantized itself and holds no original weights",
                "Use --base dequantized, or --model with the original",
            )
        )

    quantized = base == "dequantized" and (recipe.bits == 4 or source.packed)
    layers = LinearLayers(source, recipe.quantization(source) if quantized else Quantization(16))
    tensors = load_file(Path(adapter).expanduser() / TENSORS)
    parts = {
        module: {part: tensors.get(f"{PREFIX}{module}.{key}") for part, key in KEYS.items()} for module in spec.modules
    }
    target = DTYPES[dtype]
    unmerged = set(spec.modules)

    with whole_folder(folder) as part:
        writer = ShardWriter(part, shard_size)

        def visit(parameter: str, value) -> dict[str, Tensor]:
            layer = parameter.removesuffix(".weight")
            if parameter == layer or (layer not in layers.shapes and layer not in parts):
                writer.add(parameter, value.to(target))
                return {parameter: placeholder(value)}
            transposed = layer in layers.transposed
            if quantized and layer in layers.shapes:
                weight = FrozenWeight(layers.quantized(parameter, value))
            else:
                weight = FrozenWeight(value.t() if transposed else value)
                if layer in layers.shapes:
                    layers.sample(layer, weight.dense_weight)
            if layer in parts:
                unmerged.discard(layer)
                A, B, m = (parts[layer][key] for key in ("lora_A", "lora_B", "magnitude"))
                if weight.shape != (B.shape[0], A.shape[1]):
                    raise UserError(
                        problem(
                            "adapter",
                            layer,
                            f"fits a weight of {(B.shape[0], A.shape[1])}, the base has {weight.shape}",
                            "Name the base it was trained on",
                        )
                    )
                result = merged_weight(
                    weight, A.float(), B.float(), None if m is None else m.float(), spec.scaling, target
                )
            else:
                result = weight.dense(target)
            stored = result.t().contiguous() if transposed else result
            writer.add(parameter, stored)
            return {parameter: placeholder(stored)}

        merged = stream(
            source,
            visit,
            dtype=DTYPES[recipe.dtype] if quantized and recipe.dtype else "auto",
            device=CPU,
            prepare=layers.note,
        )
        if unmerged:
            raise UserError(
                [
                    problem("adapter", layer, f"is no layer of {name}", "Name the base it was trained on with --model")
                    for layer in sorted(unmerged)
                ]
            )
        if recipe.fingerprint is not None and layers.fingerprint() != recipe.fingerprint:
            raise UserError(
                problem(
                    "model",
                    name,
                    "its weights are not those the adapter was trained on",
                    f"Give the base of the training ({recipe.model}) with --model",
                )
            )
        writer.close()
        write_config(merged, part, target)
        load_tokenizer(source).save_pretrained(part)
    return folder

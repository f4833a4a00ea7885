"""Base + adapter to an ordinary Hugging Face folder, and a base to a 4-bit one, tensor by tensor into shards.

    merge                each tensor of the base streams by; an adapted one becomes g (W + s B A) (DoRA) or W + s B A (LoRA)
    quantize_checkpoint  each linear weight becomes the tensors of a bitsandbytes 4-bit checkpoint

Nothing is kept: each tensor is written as it comes, and peak memory is about two tensors. W is by default the
dequantized NF4 weight, because the adapter was trained on that; `base="original"` merges onto the checkpoint's own
weight instead. The result is written in float32 arithmetic with one rounding to the output dtype. Merging and
quantizing again, as others offer, is not: it rounds the update onto the 4-bit grid again.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BitsAndBytesConfig

from qlora import nf4
from qlora.adapter_files import KEYS, PREFIX, TENSORS, read_adapter_recipe
from qlora.adapters import LINEAR, merged_weight
from qlora.errors import UserError, problem
from qlora.files import whole_folder
from qlora.linear import FrozenWeight
from qlora.model import DTYPES, LinearLayers, resolve_dtype, stream
from qlora.sources import STORED, load_tokenizer, resolve

CPU = torch.device("cpu")
NAMES = {dtype: name for name, dtype in STORED.items()}


class ShardWriter:
    """Safetensors files of about `shard_size` bytes and their index, in Hugging Face's naming.

    A tensor goes to the disk as it comes, behind room for the header, which is written when the shard is full. The
    format has no gaps and its readers want aligned tensors, so one whose size is no multiple of 8 bytes waits for the
    end of its shard.
    """

    HEADER = 2**20 - 8  # bytes for some 5000 tensors; what is not used is spaces, as the format allows

    def __init__(self, folder: Path, shard_size: int):
        self.folder, self.shard_size = folder, shard_size
        self.total_bytes = 0
        self.shards: list[list[str]] = []
        self._begin()

    def _begin(self) -> None:
        self.entries: dict[str, dict] = {}
        self.waiting: dict[str, Tensor] = {}
        self.size = self.end = self.header = 0  # bytes taken, bytes on the disk, and of the header at most
        self.path = self.folder / f"shard-{len(self.shards)}"

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; end the shard before it if there is no room for both."""
        tensor = tensor.detach().contiguous()
        size = tensor.numel() * tensor.element_size()
        entry = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.shard_size, self.shard_size + size],
        }
        header = len(json.dumps({name: entry}))
        if self.entries and (self.size + size > self.shard_size or self.header + header > self.HEADER - 100):
            self._flush()
        self.entries[name] = entry
        self.size, self.total_bytes, self.header = self.size + size, self.total_bytes + size, self.header + header
        if size % 8:
            self.waiting[name] = tensor
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(8 + self.HEADER + self.end)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
        start, self.end = self.end, self.end + tensor.numel() * tensor.element_size()
        self.entries[name]["data_offsets"] = [start, self.end]

    def _flush(self) -> None:
        for name, tensor in sorted(self.waiting.items(), key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        text = (
            json.dumps({"__metadata__": {"format": "pt"}} | self.entries, separators=(",", ":"))
            .encode()
            .ljust(self.HEADER)
        )
        with self.path.open("r+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)
        self.shards.append(list(self.entries))
        self._begin()

    def close(self) -> None:
        """End the last shard, give the files their names and write the index if there are several."""
        if self.entries:
            self._flush()
        count = len(self.shards)
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        for i, name in enumerate(names):
            (self.folder / f"shard-{i}").rename(self.folder / name)
        if count > 1:
            where = {key: name for keys, name in zip(self.shards, names, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _placeholder(value: Tensor) -> Tensor:
    """Stands in the model for a tensor that went to a shard: the right shape, no memory of its own. A few bytes for
    each, allocated
    after the weight and staying when it goes, kept glibc from using its place again: merging a 1B model took 1.6 GB in
    place of 0.3.
    """
    return _one(value.dtype).expand(value.shape) if value.dim() else value


@functools.cache
def _one(dtype: torch.dtype) -> Tensor:
    return torch.empty(1, dtype=dtype)


def _check_output(output: str | Path) -> Path:
    folder = Path(output).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(problem("output", output, "exists and is not an empty folder", "Choose a new folder"))
    return folder


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
        folder = _check_output(output)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    source = resolve(name, recipe.revision if model is None else None)
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
    layers = LinearLayers(source, 4, **recipe.quantization(source)) if quantized else LinearLayers(source, 16)
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
                return {parameter: _placeholder(value)}
            transposed = layer in layers.transposed
            if quantized and layer in layers.shapes:
                weight = FrozenWeight(layers.quantized(parameter, value))
            else:
                weight = FrozenWeight(value.t() if transposed else value)
                if layer in layers.shapes:
                    layers.sample(layer, weight.weight)
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
            return {parameter: _placeholder(stored)}

        merged = stream(
            source,
            visit,
            dtype=DTYPES[recipe.dtype] if quantized and recipe.dtype else "auto",
            device=CPU,
            prepare=layers.note,
            trust_remote_code=trust_remote_code,
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
        _write_config(merged, part, target)
        load_tokenizer(name, trust_remote_code=trust_remote_code).save_pretrained(part)
    return folder


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
    folder = _check_output(output)
    source = resolve(model, revision)
    if source.packed:
        raise UserError(problem("model", model, "is NF4 already", "Use it as it is"))
    target = DTYPES[resolve_dtype(dtype, CPU)]
    layers = LinearLayers(source, 4, blocksize, double_quant, scales)
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
            return {parameter: _placeholder(value)}

        written = stream(source, visit, dtype=target, device=CPU, prepare=note, trust_remote_code=trust_remote_code)
        writer.close()
        written.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=layers.double_quant,
            bnb_4bit_compute_dtype=target,
            llm_int8_skip_modules=skipped,
        ).to_dict()
        _write_config(written, part, target)
        load_tokenizer(model, trust_remote_code=trust_remote_code, revision=revision).save_pretrained(part)
    return folder


def _write_config(model, folder: Path, dtype: torch.dtype) -> None:
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)

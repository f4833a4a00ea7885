"""GGUF, llama.cpp's format: an adapter merged into one file, or beside its base as a LoRA of llama.cpp's.

    write_gguf        model.gguf      g (W + s B A), or W + s B A, tensor by tensor
    write_gguf_lora   adapter.gguf    A, g B; with DoRA, or a `type`, also base.gguf with diag(g) W
                      y = g (W x + s B A x) = (diag(g) W) x + s (g B) A x      llama.cpp has no DoRA, but needs none
    convert_to_gguf   model.gguf      a model as it is

A row that is scaled keeps its Q8_0 and Q4_0 codes, as its scale takes g up, so that folding costs nothing that
quantizing the base did not. llama.cpp computes s as adapter.lora.alpha / r: the alpha written here is s r, which is the
trained one but with rsLoRA. The alternative for DoRA, to drop m, is another model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import UserError
from qlora.export.adapted_source import AdaptedSource, AdaptedWeights
from qlora.export.gguf_config import architecture_of, config_problems
from qlora.export.gguf_file import GGUFFile, kind_of, rounded, stored_names, type_problems
from qlora.export.kept import Kept, prepared
from qlora.export.shards import CPU, check_new_folder, placeholder
from qlora.files import whole_folder
from qlora.layers.attach import attach, named_adapters
from qlora.layers.weight import FrozenWeight
from qlora.models.device import DTYPES
from qlora.models.gguf_layout import row_order
from qlora.models.load import load_source, load_streaming
from qlora.models.quantize import QuantizePass
from qlora.models.source import load_config, load_tokenizer, resolve
from qlora.specs import AdapterSpec, ExportSpec, Quantization

MODEL, BASE, ADAPTER = "model.gguf", "base.gguf", "adapter.gguf"


def convert_to_gguf(
    model: str, output: str | Path, *, type: str = "F16", trust_remote_code: bool = False, revision: str | None = None
) -> Path:
    """Write a model as it is to model.gguf in a new folder; returns the file. Peak memory: about two tensors.

    Args:
        model: as for `load_base`; of an NF4 checkpoint the decoded values are written.
        output: the folder, new or empty.
        type: F16, BF16, Q8_0 or Q4_0.
        trust_remote_code: run Python code that comes with the model.
        revision: of a hub model.

    Raises:
        UserError: a `type` that is not written; what llama.cpp computes otherwise; a tokenizer that it has no name for;
            the output is not empty; the disk is full.
    """
    problems = type_problems(type)
    try:
        folder = check_new_folder(output)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    source = resolve(model, revision, trust_remote_code=trust_remote_code)
    layers = QuantizePass(source, Quantization(4) if source.packed else Quantization(16))
    with whole_folder(folder, replaces=False) as part:
        file = GGUFFile(part / MODEL, type, load_tokenizer(source), source.gguf, _called(source.name))

        def prepare(empty: nn.Module) -> None:
            layers.note(empty)
            file.begin(empty)

        def on_tensor(parameter: str, value: Any) -> dict[str, Tensor]:
            if source.packed and parameter.removesuffix(".weight") in layers.shapes:
                from qlora.layers import nf4

                value = nf4.dequantize(layers.quantized(parameter, value), file.dtype(parameter))
            file.add(parameter, value)
            return {parameter: placeholder(value)}

        load_streaming(
            source, on_tensor, dtype="auto", device=CPU, prepare=prepare, as_stored=lambda name: not source.packed
        )
        file.end()
    return folder / MODEL


def write_gguf(found: AdaptedSource, spec: ExportSpec, folder: Path) -> None:
    """Write the merged model to model.gguf in an empty folder.

    Raises:
        UserError: see `convert_to_gguf`; the adapter does not fit its base, or that is not the one of the training.
    """
    weights = AdaptedWeights(found, spec.base)

    def values(layer: str, parameter: str, value: Any, dtype: torch.dtype) -> Tensor:
        return weights.merged(layer, weights.frozen(parameter, layer, value), dtype)

    _write(found, spec, folder / MODEL, weights, values)


def write_gguf_lora(found: AdaptedSource, spec: ExportSpec, folder: Path) -> None:
    """Write adapter.gguf to an empty folder, and base.gguf where the adapter is DoRA's or the spec has a type.

    Raises:
        UserError: see `write_gguf`.
    """
    weights = AdaptedWeights(found, "dequantized")
    gains: dict[str, Tensor] = {}
    if written_type(found, spec) is not None:

        def values(layer: str, parameter: str, value: Any, dtype: torch.dtype) -> Tensor:
            weight = weights.frozen(parameter, layer, value)
            gain = weights.gain(layer, weight) if layer in weights.adapted else None
            if gain is None:
                return weight.dense(dtype)
            gains[layer] = gain
            return weight.dense(torch.float32).mul_(gain.unsqueeze(1))

        _write(found, spec, folder / BASE, weights, values)
    _write_lora(found, weights, gains, folder / ADAPTER)


def written_type(found: AdaptedSource, spec: ExportSpec) -> str | None:
    """The type of the matrices that are written; None where only an adapter is: a LoRA needs no base of its own."""
    if spec.type != "auto":
        return spec.type
    if spec.to == "gguf":
        return "F16"
    return "Q8_0" if found.files.spec.method == "dora" else None


def _called(name: str) -> str:
    """The last part of a path or hub id."""
    return name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")


def _write(
    found: AdaptedSource, spec: ExportSpec, path: Path, weights: AdaptedWeights, values: Callable[..., Tensor]
) -> None:
    """Stream the base through `values(layer, parameter, value, dtype)` into a GGUF file."""
    type = written_type(found, spec) or "auto"
    problems = type_problems(type)
    if problems:
        raise UserError(problems)
    source = found.source
    file = GGUFFile(path, type, found.tokenizer, source.gguf, _called(found.named))

    def prepare(empty: nn.Module) -> None:
        weights.prepare(empty)
        file.begin(empty)

    def on_tensor(parameter: str, value: Any) -> dict[str, Tensor]:
        layer = weights.layer_of(parameter, value)
        made = value if layer is None else values(layer, parameter, value, file.dtype(parameter))
        file.add(parameter, made)
        return {parameter: placeholder(made)}

    form = found.written(spec, weights)
    model = load_streaming(source, on_tensor, dtype=form.read_as, device=CPU, prepare=prepare, as_stored=form.as_stored)
    weights.check_all(model)
    file.end()


def _write_lora(found: AdaptedSource, weights: AdaptedWeights, gains: dict[str, Tensor], path: Path) -> None:
    """A and g B of every layer in float32, in llama.cpp's names and order of rows."""
    import gguf

    config = load_config(found.source)
    problems = config_problems(config)
    empty = found.empty()
    problems += [] if gains else found.files.misfits(empty)
    if problems:
        raise UserError(problems)
    names, lora = stored_names(empty), found.files.spec
    writer = gguf.GGUFWriter(path, architecture_of(config))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(_called(str(found.files.folder.absolute())))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.scaling * lora.rank)
    for layer in lora.modules:
        A, B, _ = weights.parts(layer)
        B = B if layer not in gains else gains[layer].unsqueeze(1) * B
        order = row_order(writer.arch, layer, config)
        name = names[f"{layer}.weight"]
        writer.add_tensor(f"{name}.lora_a", A.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", (B if order is None else B[order]).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def keep_gguf(found: AdaptedSource, spec: ExportSpec) -> Kept:
    """What `write_gguf` keeps: the rounding of each tensor's type."""
    weights, round_off = prepared(found, spec.base), _rounding(found, spec)

    def layer(name: str, weight: FrozenWeight) -> Tensor:
        return round_off(f"{name}.weight", weights.merged(name, weight, torch.float32))

    return Kept(found, weights, layer, round_off)


def keep_gguf_lora(found: AdaptedSource, spec: ExportSpec) -> Kept:
    """What `write_gguf_lora` keeps: A and g B as they are, the rounding of base.gguf where there is one."""
    weights, round_off = prepared(found, "dequantized"), _rounding(found, spec)

    def layer(name: str, weight: FrozenWeight) -> Tensor:
        W, gain = weight.dense(torch.float32), None
        if name in weights.adapted:
            gain = weights.gain(name, weight)
            W = W if gain is None else W * gain.unsqueeze(1)
        W = round_off(f"{name}.weight", W)
        if name not in weights.adapted:
            return W
        A, B, _ = weights.parts(name)
        return torch.addmm(W, B if gain is None else gain.unsqueeze(1) * B, A, alpha=weights.spec.scaling)

    return Kept(found, weights, layer, round_off)


def _rounding(found: AdaptedSource, spec: ExportSpec) -> Callable[[str, Tensor], Tensor]:
    """(parameter, value) -> what the file of the base keeps of it; all of it where no base is written."""
    type, empty = written_type(found, spec), found.empty()
    if type is None:
        return lambda parameter, value: value
    names, tied = stored_names(empty), empty.config.tie_word_embeddings

    def round_off(parameter: str, value: Tensor) -> Tensor:
        return rounded(kind_of(type, parameter, names[parameter], tuple(value.shape), tied), value)

    return round_off


def load_gguf(folder: Path, found: AdaptedSource, dtype: torch.dtype) -> nn.Module:
    """What `write_gguf` wrote, decoded, in `dtype` on the CPU."""
    return _decoded(folder / MODEL, dtype)


def load_gguf_lora(folder: Path, found: AdaptedSource, dtype: torch.dtype) -> nn.Module:
    """What `write_gguf_lora` wrote, as `load_gguf`; without a base.gguf on the base of the training."""
    import gguf

    if (folder / BASE).exists():
        model: Any = _decoded(folder / BASE, dtype)
    else:
        model = found.load_base(_short(dtype))
    reader = gguf.GGUFReader(folder / ADAPTER)
    held = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = {name: parameter.removesuffix(".weight") for parameter, name in stored_names(found.empty()).items()}
    layers = {names[name.removesuffix(".lora_a")]: name.removesuffix(".lora_a") for name in held if "lora_a" in name}
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    rank = len(held[f"{next(iter(layers.values()))}.lora_a"])
    attach(model, AdapterSpec("lora", rank, alpha, targets=tuple(layers)))
    architecture = architecture_of(model.config)
    with torch.no_grad():
        for layer, adapter in named_adapters(model):
            A, B = held[f"{layers[layer]}.lora_a"], held[f"{layers[layer]}.lora_b"]
            order = row_order(architecture, layer, model.config)
            adapter.lora_A.copy_(A)
            adapter.lora_B.copy_(B if order is None else B[order.argsort()])
    return model


def _decoded(path: Path, dtype: torch.dtype) -> nn.Module:
    return load_source(resolve(str(path)), Quantization(16), dtype=_short(dtype), device="cpu")


def _short(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)

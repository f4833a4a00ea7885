"""Checkpoints that bitsandbytes quantized: their NF4 bytes as they are.

    P.weight and P.weight.{absmax, quant_map, ...} of a safetensors file -> PackedTensor -> QuantizedWeight

transformers would load them through bitsandbytes' layers, which need its kernels. Here the parts of a weight stay in
the file until the loader comes to the weight; then `load` reads them. The alternative, to decode and quantize again,
would not give the same codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora.errors import UserError, guard, problem
from qlora.layers import nf4
from qlora.models.source import Source
from qlora_kernels.weight import QuantizedWeight

STORED = {  # the types of safetensors files
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def _safetensors(folder: Path) -> list[Path]:
    """The safetensors files that a folder should hold: those of its index, or the one of a model without an index."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        with guard("model", index, "is no index of safetensors files", "Get the model's folder again"):
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names)]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    with guard("model", path, "cannot be read", "Get the file again"):
        yield


def stored_types(source: Source) -> dict[str, torch.dtype | None]:
    """The type of every tensor in a folder's safetensors files by the name it has there, from their headers; empty
    without such files.
    """
    from safetensors import safe_open

    types: dict[str, torch.dtype | None] = {}
    for path in _safetensors(source.folder):
        if path.is_file():
            with _reading(path), safe_open(path, "pt") as file:
                types |= {key: STORED.get(file.get_slice(key).get_dtype()) for key in file.keys()}
    return types


def packed_layers(source: Source) -> dict[str, tuple[int, bool]]:
    """Layers that a bitsandbytes checkpoint holds in 4 bits: their block sizes, and whether the scales are
    double-quantized.

    Raises:
        UserError: a file cannot be read, a state makes no sense, or nothing is in 4 bits.
    """
    from safetensors import safe_open

    layers: dict[str, tuple[int, bool]] = {}
    for path in _safetensors(source.folder):
        with _reading(path), safe_open(path, "pt") as file:
            for key in file.keys():
                name, found, _ = key.partition(".weight.quant_state.")
                if found:
                    state = nf4.packed_state(file.get_tensor(key), f"{name}.weight", path.name)
                    layers[name] = (state.blocksize, state.double_quant)
    if not layers:
        rule = "its config says that it is quantized, its files hold no 4-bit weight"
        remedy = "Take quantization_config out of config.json if the weights are 16-bit, or get the checkpoint again"
        raise UserError(problem("model", source.folder, rule, remedy))
    return dict(sorted(layers.items()))


class PackedTensor:
    """A 4-bit weight in a bitsandbytes checkpoint. Passes through transformers' cast unchanged; `load` reads it."""

    def __init__(self, name: str, parts: dict[str, Any], file: Path, device: torch.device | None = None):
        self.name, self.parts, self.file, self.device = name, parts, file, device

    def __getitem__(self, _: object) -> PackedTensor:
        """Itself: the loader reads every tensor so."""
        return self

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> PackedTensor:
        """The same on another device; codes have no other dtype."""
        return PackedTensor(self.name, self.parts, self.file, device)

    def load(self) -> QuantizedWeight:
        """Read the parts from the file.

        Raises:
            UserError: they do not fit each other (`nf4.from_bitsandbytes`).
        """
        with _reading(self.file):
            parts = {key: part[...].to(self.device or "cpu") for key, part in self.parts.items()}
        return nf4.from_bitsandbytes(parts, self.name, self.file.name)


def stored_slices(source: Source) -> dict[str, Any]:
    """{name in the checkpoint: slice that is read when it is looked at} of a folder's safetensors files."""
    paths = [path for path in _safetensors(source.folder) if path.is_file()]  # none for weights in a pickle
    return {key: slice for _, slices in _slices_by_file(paths) for key, slice in slices.items()}


def _slices_by_file(paths: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    from safetensors import safe_open

    found = []
    for path in paths:
        with _reading(path):
            file = safe_open(path, "pt")  # stays open as long as its slices live
            found.append((path, {key: file.get_slice(key) for key in file.keys()}))
    return found


def packed_tensors(source: Source) -> dict[str, object]:
    """{name in the checkpoint: tensor that is read when it is looked at}, the parts of a 4-bit weight as one."""
    slices: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for path, held in _slices_by_file(_safetensors(source.folder)):
        slices |= held
        files |= dict.fromkeys(held, path)
    tensors: dict[str, object] = {}
    for name in packed_layers(source):
        weight = f"{name}.weight"
        parts = {"": slices.pop(weight)} if weight in slices else {}
        parts |= {
            key.removeprefix(weight): slices.pop(key) for key in [k for k in slices if k.startswith(weight + ".")]
        }
        tensors[weight] = PackedTensor(weight, parts, files[f"{weight}.{nf4.STATE_KEY}"])
    return tensors | slices

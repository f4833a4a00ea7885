"""GGUF files: each tensor under its name in the model, decoded when it is read.

    file -> {name in the model: GGUFTensor} -> the loader, one tensor at a time

llama.cpp renames tensors, and stores some of them otherwise than transformers (`gguf_layout`, and linear weights of
GPT-2 transposed); `_undo` undoes that. The alternative, transformers' own reader, parses the file several times and
makes the whole model dense.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from qlora.errors import UserError, guard, problem
from qlora.models.gguf_header import LONG, SHORT, Header, read_header
from qlora.models.gguf_layout import row_order, shift

GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "starcoder2", "stablelm")


CHUNK = 1 << 18  # values decoded at a time: 1 MB of float32, and its parts, stay in the second cache


class GGUFTensor:
    """A tensor of a GGUF file, decoded by a chunk of rows at a time when it is read (`tensor[...]`).

    Args:
        data: its bytes, [..., bytes of a row].
        shape: of its values.
        kind: its GGUF type.
        dtype: of what is read.
        undo: see `_undo`.
    """

    def __init__(
        self, data: Any, shape: tuple[int, ...], kind: Any, dtype: torch.dtype, undo: Callable[[Tensor], Tensor]
    ):
        self.data, self.shape, self.kind, self.dtype, self.undo = data, shape, kind, dtype, undo

    def __getitem__(self, _: object) -> Tensor:
        if len(self.shape) == 1:
            return self.undo(self._decoded(slice(None))).to(self.dtype)
        out = torch.empty(self.shape, dtype=self.dtype)
        step = max(1, CHUNK // self.shape[-1])
        for start in range(0, self.shape[0], step):
            out[start : start + step] = self._decoded(slice(start, start + step))
        return self.undo(out)

    def _decoded(self, rows: slice) -> Tensor:
        """Some rows in float32; a copy, as what is float32 already lies in the file.

        The library decodes 16 rows at a time; as one long row, which has the same blocks, they are decoded at once.
        """
        import gguf

        data = self.data[rows]
        values = gguf.dequantize(data.reshape(1, -1), self.kind).reshape(*data.shape[:-1], -1)
        return torch.from_numpy(values.copy())


def _stored(path: Path, header: Header) -> dict[str, tuple[Any, tuple[int, ...], Any]]:
    """(bytes by rows, shape, GGUF type) of every tensor, by its name in the file.

    The library's own reader makes an array of every token and every merge first, which takes seconds.

    Raises:
        UserError: a type that nobody knows, or data that lies behind the end of the file.
    """
    import gguf

    found = {}
    with guard("model", path, "cannot be read as GGUF", "Check that the file is whole, or get it again"):
        for name, (number, start) in header.tensors.items():
            kind, shape = gguf.GGMLQuantizationType(number), header.shapes[name]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise ValueError(f"a row of {name} is no multiple of {block} values long")
            rows = (*shape[:-1], shape[-1] // block * size)
            found[name] = (np.memmap(path, np.uint8, "r", start, rows), shape, kind)
    return found


def gguf_tensors(path: Path, config: PretrainedConfig, dtype: torch.dtype | str) -> dict[str, object]:
    """{name in the model: lazy tensor} of a GGUF file, in `dtype` ("auto": float32).

    Raises:
        UserError: an architecture whose conversion we cannot undo, or tensors that the model has no place for.
    """
    import gguf

    header = read_header(path)
    architecture = header.architecture
    if architecture not in GGUF_ARCHITECTURES:
        raise UserError(
            problem(
                "model",
                path,
                f"GGUF architecture {architecture} is not supported",
                f"Supported: {', '.join(GGUF_ARCHITECTURES)}; or use the safetensors original",
            )
        )
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    stored = _stored(path, header)
    made = dtype if isinstance(dtype, torch.dtype) else torch.float32
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tensors: dict[str, object] = {}
    for name in skeleton.state_dict():
        stem, _, suffix = name.rpartition(".")
        tensor = stored.pop(f"{names.get_name(stem)}.{suffix}", None)
        if tensor is not None:
            tensors[name] = GGUFTensor(*tensor, made, _undo(architecture, name, skeleton.get_submodule(stem), config))
    leftover = sorted(set(stored) - {"rope_freqs.weight", LONG, SHORT})  # in the config: `rope_parameters`
    if leftover:
        raise UserError(
            problem(
                "model",
                path,
                f"holds tensors that the model has no place for ({', '.join(leftover[:5])})",
                "Use the safetensors original",
            )
        )
    return tensors


def _undo(architecture: str, name: str, module: nn.Module, config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
    """What turns a stored tensor into the model's: its rows ordered back, 1 subtracted, transposed, or nothing."""
    order = row_order(architecture, name, config)
    if order is not None:
        back = order.argsort()
        return lambda w: w[back] if len(w) == len(back) else w  # a wrong shape is refused with the others
    added = shift(architecture, name)
    if added:
        return lambda w: w - added
    if isinstance(module, Conv1D) and name.endswith(".weight"):
        return lambda w: w.t().contiguous()
    return lambda w: w

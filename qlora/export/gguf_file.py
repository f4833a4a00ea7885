"""A GGUF file written tensor by tensor: the header from the empty model, then each tensor at its place, in any order.

    header (keys, names, types, places) | tensor | tensor ...     the places follow from the shapes

Matrices are F16, BF16, Q8_0 (32 int8 and an fp16 scale: 8.5 bits a weight) or Q4_0 (32 four-bit values and a scale:
4.5 bits), quantized by the library `gguf`, a chunk of rows at a time; norms and biases are float32, as llama.cpp wants
them. Rows that are no multiple of 32 long stay F16, and the head of a Q4_0 file is Q8_0, both as llama.cpp has it;
attn_v of a Q8_0 file is F16, for 2 % of the size and half of the KL (docs/guide.md). The alternative, the library's
`add_tensor`, holds every tensor until the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlora.errors import UserError, problem
from qlora.export.gguf_config import add_config, architecture_of, config_problems, rope_tensors
from qlora.export.gguf_tokens import add_tokenizer, model_name
from qlora.models.gguf_header import read_keys
from qlora.models.gguf_layout import row_order, shift
from qlora.models.load import embedding_rows
from qlora.models.quantize import is_finite

TYPES = ("F16", "BF16", "Q8_0", "Q4_0")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}  # what a tensor is rounded to before it is written
CHUNK = 1 << 22  # values quantized at a time
_OWN = ("general.architecture", "general.type", "general.file_type", "general.quantization_version")


def type_problems(type: str) -> list[str]:
    """A line for a type that is not written."""
    if type in TYPES:
        return []
    remedy = "For others, such as Q4_K_M, export F16 and use llama.cpp's llama-quantize"
    return [problem("type", type, f"must be one of {', '.join(TYPES)}", remedy)]


def stored_names(empty: nn.Module) -> dict[str, str]:
    """{parameter: its name in a GGUF file} of a model, without a head that is the embedding.

    Raises:
        UserError: a parameter that llama.cpp has no place for.
    """
    import gguf

    config: Any = empty.config
    architecture = architecture_of(config)
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    names, strange = {}, []
    for parameter, _ in empty.named_parameters():
        stem, _, suffix = parameter.rpartition(".")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        known = table.get_name(stem)
        names[parameter] = f"{known}.{suffix}"
        strange += [] if known else [parameter]
    if strange:
        rule = f"llama.cpp's {architecture} has no place for it"
        raise UserError([problem("model", name, rule, "Export to a folder of transformers") for name in strange])
    return names


def kind_of(type: str, parameter: str, name: str, shape: tuple[int, ...], tied: bool) -> Any:
    """The GGUF type of a parameter in a file of `type`; `name`: its own there; `tied`: the head is the embedding."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(shape) < 2 or "norm" in parameter:
        return kinds.F32
    is_head = name == "output.weight" or (tied and name == "token_embd.weight")
    kind = kinds.Q8_0 if is_head and type == "Q4_0" else kinds[type]
    if type == "Q8_0" and name.endswith(".attn_v.weight"):
        kind = kinds.F16  # else llama.cpp rounds its inputs to 8 bits too
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else kinds.F16


def rounded(kind: Any, values: Tensor) -> Tensor:
    """What is left of `values` [rows, columns] (or [columns]) in a GGUF type, in float32."""
    import gguf

    if kind.name not in ("Q8_0", "Q4_0"):
        return values.to(_DTYPES.get(kind.name, torch.float32)).float()
    made = torch.empty(values.shape)
    for part, rows in zip(made.split(_step(values.shape)), values.split(_step(values.shape)), strict=True):
        part.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(rows.float().contiguous().numpy(), kind), kind)))
    return made


def _step(shape: tuple[int, ...]) -> int:
    """Rows of a matrix that are quantized at a time."""
    return max(1, CHUNK // (shape[-1] if len(shape) > 1 else 1))


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes: bytes after the header, its GGUF type, and in which form."""

    start: int
    kind: Any
    shape: tuple[int, ...]
    order: Tensor | None
    shift: float


class GGUFFile:
    """A model's GGUF file while it is written: `begin`, `add` every parameter, `end`.

    Args:
        path: is made.
        type: of the matrices, one of TYPES.
        tokenizer: is written into it.
        source: the GGUF file that the base comes from, or None: what it says of itself and its tokenizer is copied.
        name: what the model is called.
    """

    def __init__(self, path: Path, type: str, tokenizer: PreTrainedTokenizerBase, source: Path | None, name: str):
        self.path, self.type, self.tokenizer, self.source, self.name = path, type, tokenizer, source, name
        self._places: dict[str, _Place] = {}
        self._end = 0

    def begin(self, empty: nn.Module) -> None:
        """Write the header for the parameters of `empty` (meta).

        Raises:
            UserError: what cannot be said in a GGUF file.
        """
        import gguf

        config: Any = empty.config
        problems = config_problems(config)
        if problems:
            raise UserError(problems)
        names = stored_names(empty)
        writer = gguf.GGUFWriter(self.path, architecture_of(config))
        self._describe(writer, empty)
        add_config(writer, config)
        add_tokenizer(writer, self.tokenizer, embedding_rows(empty) or config.vocab_size, self.source)
        extra, at = rope_tensors(config), 0
        shapes = {name: tuple(tensor.shape) for name, tensor in extra.items()}
        shapes |= {name: tuple(parameter.shape) for name, parameter in empty.named_parameters() if name in names}
        for parameter, shape in shapes.items():
            order = row_order(writer.arch, parameter, config)
            kind = kind_of(self.type, parameter, names.get(parameter, parameter), shape, config.tie_word_embeddings)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            size *= torch.Size(shape).numel() // block
            writer.add_tensor_info(names.get(parameter, parameter), shape, np.dtype(np.float32), size, raw_dtype=kind)
            self._places[parameter] = _Place(at, kind, shape, order, shift(writer.arch, parameter))
            at += writer.ggml_pad(size, writer.data_alignment)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        self._start = writer.ggml_pad(self.path.stat().st_size, writer.data_alignment)
        self._end = self._start + at
        for name, tensor in extra.items():
            self.add(name, tensor)

    def _describe(self, writer: Any, empty: nn.Module) -> None:
        """What the file says of the model as a whole."""
        import gguf

        count = sum(parameter.numel() for parameter in empty.parameters())
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(model_name(self.name, self.tokenizer))
        writer.add_size_label(gguf.size_label(count, count, 0, 0))
        if self.source is not None:
            for key, (kind, inner, value) in read_keys(self.source, "general.").items():
                if key not in _OWN:
                    writer.kv_data[0].pop(key, None)
                    element = None if inner is None else gguf.GGUFValueType(inner)
                    writer.add_key_value(key, value, gguf.GGUFValueType(kind), element)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{self.type}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def dtype(self, parameter: str) -> torch.dtype:
        """What the values of a parameter are rounded to in any case: what `add` is best given."""
        return _DTYPES.get(self._places[parameter].kind.name, torch.float32)

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._places

    def add(self, parameter: str, value: Tensor) -> None:
        """Write a parameter of the model.

        Raises:
            UserError: it is beyond the range of its type, or was not finite before.
        """
        place = self._places[parameter]
        if tuple(value.shape) != place.shape:
            rule, remedy = f"the model needs {place.shape}", "Get the checkpoint that belongs to this config"
            raise UserError(problem(parameter, tuple(value.shape), rule, remedy))
        step = _step(place.shape)
        with self.path.open("r+b") as file:
            file.seek(self._start + place.start)
            for first in range(0, place.shape[0], step):
                part = slice(first, first + step)
                rows = value[part] if place.order is None else value[place.order[part]]
                file.write(self._encoded(parameter, rows.float() + place.shift if place.shift else rows, place.kind))

    def _encoded(self, parameter: str, rows: Tensor, kind: Any) -> bytes:
        import gguf

        made = rows.detach().to(_DTYPES.get(kind.name, torch.float32)).contiguous()
        if not is_finite(made):
            if kind.name == "F16" and is_finite(rows):
                rule, remedy = f"{parameter} holds values beyond its range", "Use `type=BF16`"
            else:
                rule = f"{parameter} holds values that are no finite numbers"
                remedy = "Get the base or the adapter again"
            raise UserError(problem("type", self.type, rule, remedy))
        if kind.name in ("Q8_0", "Q4_0"):
            return gguf.quantize(made.numpy(), kind).tobytes()
        return made.view(torch.uint8).numpy().tobytes()

    def end(self) -> None:
        """Fill the file up to where its last tensor ends."""
        with self.path.open("r+b") as file:
            file.truncate(self._end)

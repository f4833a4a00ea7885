"""What a GGUF file says of itself, every length held against the file: keys, tensors, and how its positions rotate.

    magic version tensors keys | (key type value)* | (name dims type offset)* | tensor data          little endian

The readers of `gguf` and transformers believe the lengths: a flipped bit in one makes them loop over nothing for hours
and fill the memory. transformers' config of a GGUF file also leaves out how positions are scaled (Llama 3.1 and later,
everything with linear or yarn scaling), and such a model is another one: that is read here. The alternative, to repair
the model after it was made, would leave a merged model without it.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora.errors import UserError, guard, problem

_SCALARS = "BbHhIifxxxQqd"  # struct's letter by GGUF type; 7 bool, 8 text, 9 array
_BOOL, _TEXT, _ARRAY = 7, 8, 9
_MOST_LAYERS = 10_000
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_REMEDY = "Check that the file is whole, or get it again"


@dataclass(frozen=True)
class Header:
    """`values` holds text and numbers, and of arrays their length. `tensors`: (type, where its data begins) by name."""

    values: dict[str, Any]
    tensors: dict[str, tuple[int, int]]
    shapes: dict[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """llama, gemma3, ..."""
        return str(self.values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of this architecture, such as rope.scaling.type."""
        return self.values.get(f"{self.architecture}.{key}", default)


class _Cursor:
    """Reads on from where it is; struct refuses what lies behind the end."""

    def __init__(self, data: mmap.mmap, arrays: bool = False):
        self.data, self.at, self.arrays = data, 0, arrays

    def read(self, letters: str) -> Any:
        """One number."""
        (value,) = struct.unpack_from("<" + letters, self.data, self.at)
        self.at += struct.calcsize("<" + letters)
        return value

    def skip(self, count: int) -> int:
        """Where `count` bytes began, which must be there."""
        start = self.at
        if count > len(self.data) - start:
            raise ValueError(f"a length of {count} bytes at byte {start} reaches behind the end of the file")
        self.at += count
        return start

    def text(self) -> str:
        """Text with its length in front."""
        start = self.skip(self.read("Q"))
        return self.data[start : self.at].decode("utf-8", errors="replace")

    def _skip_texts(self, count: int) -> None:
        """A vocabulary: a hundred thousand of them, at every start."""
        unpack, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of a GGUF type; of an array its length, or with `arrays` a list."""
        if kind == _TEXT:
            return self.text()
        if kind == _BOOL:
            return bool(self.read("B"))
        if kind != _ARRAY:
            letter = _SCALARS[kind] if kind < len(_SCALARS) else "x"
            if letter == "x":
                raise ValueError(f"there is no type {kind}")
            return self.read(letter)
        inner, count = self.read("I"), self.read("Q")
        if inner in (_TEXT, _ARRAY):
            if depth or inner == _ARRAY:
                raise ValueError("an array in an array")
            start = self.at
            self._skip_texts(count)
            if self.arrays:
                self.at = start
                return [self.text() for _ in range(count)]
        else:
            letter = "B" if inner == _BOOL else _SCALARS[inner] if inner < len(_SCALARS) else "x"
            if letter == "x":
                raise ValueError(f"there is no type {inner}")
            start = self.skip(count * struct.calcsize("<" + letter))
            if self.arrays:
                return list(struct.unpack_from(f"<{count}{letter}", self.data, start))
        return count


def read_header(path: Path) -> Header:
    """Keys and tensors of a GGUF file.

    Raises:
        UserError: it cannot be read, is none, ends before what it promises, or has not the layers that it says.
    """
    with guard("model", path, "cannot be read as GGUF", _REMEDY), path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _parse(_Cursor(data))
    layers = found.get("block_count")
    if not isinstance(layers, int) or not 0 < layers <= _MOST_LAYERS:
        raise UserError(
            problem("model", path, f"cannot have {layers} layers ({found.architecture}.block_count)", _REMEDY)
        )
    if not any(name.startswith(f"blk.{layers - 1}.") for name in found.tensors):
        rule = f"says that it has {layers} layers ({found.architecture}.block_count), and holds no tensor of the last"
        raise UserError(problem("model", path, rule, _REMEDY))
    return found


def read_keys(path: Path, prefix: str) -> dict[str, tuple[int, int | None, Any]]:
    """(GGUF type, that of an array's elements, value) of every key of a GGUF file that begins with `prefix`.

    Raises:
        UserError: see `read_header`.
    """
    found: dict[str, tuple[int, int | None, Any]] = {}
    with guard("model", path, "cannot be read as GGUF", _REMEDY), path.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, arrays=True)
            cursor.skip(16)  # magic, version, tensors
            for _ in range(cursor.read("Q")):
                key, kind = cursor.text(), cursor.read("I")
                inner = struct.unpack_from("<I", data, cursor.at)[0] if kind == _ARRAY else None
                value = cursor.value(kind)
                if key.startswith(prefix):
                    found[key] = (kind, inner, value)
    return found


def _parse(cursor: _Cursor) -> Header:
    cursor.skip(4)
    version = cursor.read("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, and only 2 and 3 are known, in little endian")
    count, keys = cursor.read("Q"), cursor.read("Q")
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        values[key] = cursor.value(cursor.read("I"))
    tensors, shapes = {}, {}
    for _ in range(count):
        name = cursor.text()
        dims = [cursor.read("Q") for _ in range(min(cursor.read("I"), 64))]
        tensors[name], shapes[name] = (cursor.read("I"), cursor.read("Q")), tuple(reversed(dims))
    alignment = values.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    for name, (_, offset) in tensors.items():
        if start + offset > len(cursor.data):
            raise ValueError(f"the data of {name} lies behind the end of the file")
    return Header(values, {name: (kind, start + offset) for name, (kind, offset) in tensors.items()}, shapes)


def rope_parameters(header: Header, path: Path, config: PretrainedConfig) -> dict[str, Any]:
    """What a config's `rope_parameters` need beside theta: how positions are scaled; {} where they are not.

    Factors in the file (rope_freqs.weight, by which frequencies are divided) are Llama 3's where they follow its
    formula, else they are written out ("longrope" with one list for short and long).

    Raises:
        UserError: a scaling that transformers has no words for.
    """
    if "rope_freqs.weight" in header.tensors:
        return _from_factors(_factors(header, path), header, path, config)
    if LONG in header.tensors and SHORT in header.tensors:
        return _long(header, path)
    factor = header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 1.0
    kind = header.get("rope.scaling.type", "linear")  # the oldest files have the factor alone
    original = header.get("rope.scaling.original_context_length") or header.get("context_length")
    attention = header.get("rope.scaling.attn_factor", 1.0)
    betas = {name: header.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    given = {name: beta for name, beta in betas.items() if beta is not None}
    numbers = (factor, original, attention, *given.values())
    known = all(isinstance(value, (int, float)) and 0 < value < 1e9 for value in numbers)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if known and kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if known and kind == "yarn" and attention == 1.0:
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original} | given
    rule = f"its positions are scaled ({str(kind)[:40]}) in a way that cannot be read"
    raise UserError(problem("model", path, rule, "Use the safetensors original"))


def rope_scale(header: Header) -> float:
    """By how much the context is longer than context_length says: in files with a linear or yarn factor it may be the
    original one.
    """
    factor = header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 1.0
    return float(factor) if isinstance(factor, (int, float)) and factor > 1 else 1.0


def _long(header: Header, path: Path) -> dict[str, Any]:
    """Factors for texts of the original length and for longer ones (arXiv:2402.13753), as Phi-3 has them."""
    original = header.get("rope.scaling.original_context_length") or header.get("context_length")
    attention = header.get("rope.scaling.attn_factor", 1.0)
    if not all(isinstance(value, (int, float)) and 0 < value < 1e9 for value in (original, attention)):
        raise UserError(problem("model", path, "its positions are scaled in a way that cannot be read", _REMEDY))
    return {
        "rope_type": "longrope",
        "short_factor": _factors(header, path, SHORT).tolist(),
        "long_factor": _factors(header, path, LONG).tolist(),
        "attention_factor": float(attention),
        "factor": 1.0,
        "original_max_position_embeddings": int(original),
    }


def _factors(header: Header, path: Path, name: str = "rope_freqs.weight") -> torch.Tensor:
    """The factors in tensor `name` [pairs], float32."""
    kind, start = header.tensors[name]
    (pairs,) = header.shapes[name] if len(header.shapes[name]) == 1 else (0,)
    with guard("model", path, f"{name} cannot be read", _REMEDY), path.open("rb") as file:
        if kind != 0 or not 0 < pairs < 1 << 16:
            raise ValueError("it must be a list of float32")
        file.seek(start)
        factors = torch.frombuffer(bytearray(file.read(4 * pairs)), dtype=torch.float32)
        if len(factors) != pairs or not bool((factors.isfinite() & (factors > 0)).all()):
            raise ValueError("its factors must be positive numbers")
    return factors


def _from_factors(factors: torch.Tensor, header: Header, path: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The rope parameters that divide the frequency of pair i by factors[i]."""
    largest = float(factors.max())
    if largest == float(factors.min()) == 1.0:
        return {}
    if "rope_theta" not in (getattr(config, "rope_parameters", None) or {}):
        rule = f"holds rotary factors, which a {config.model_type} model has no place for"
        raise UserError(problem("model", path, rule, "Use the safetensors original"))
    plain, _ = ROPE_INIT_FUNCTIONS["linear"](
        _trial(config, {"rope_type": "linear", "factor": 1.0}), torch.device("cpu")
    )
    if len(plain) != len(factors):
        rule = f"holds {len(factors)} rotary factors for {len(plain)} pairs"
        raise UserError(problem("model", path, rule, _REMEDY))
    llama3: dict[str, Any] = {"rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    formula, _ = ROPE_INIT_FUNCTIONS["llama3"](_trial(config, llama3), torch.device("cpu"))
    if torch.allclose(formula, plain / factors, rtol=1e-5, atol=0):
        return llama3
    listed = [float(factor) for factor in factors]
    longest = header.get("context_length") or config.max_position_embeddings
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": longest,
    }


def _trial(config: PretrainedConfig, scaling: dict[str, Any]) -> PretrainedConfig:
    return with_rope(type(config).from_dict(config.to_dict()), scaling)


def with_rope(config: PretrainedConfig, scaling: dict[str, Any]) -> PretrainedConfig:
    """`config` with its positions scaled; of a model with windows those of its full attention, as llama.cpp has it."""
    if scaling:
        held = config.rope_parameters
        if "full_attention" in held:
            config.rope_parameters = held | {"full_attention": held["full_attention"] | scaling}
        else:
            config.rope_parameters = held | scaling
    return config

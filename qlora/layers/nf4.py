"""Quantize a matrix to 4 bits and read it back, in row ranges, and under the names that bitsandbytes gives the parts.

    W [out, in]  ->  packed uint8 [(n+1)//2, 1], absmax (uint8 codes, or float32 without double quantization),
                     nested_absmax float32, nested_offset float32 scalar         n = out * in
    bytes a parameter: 0.5 + 1/64 + 4/(64*256) = 0.515869 at block size 64 with double quantization

The arithmetic is in `qlora_kernels.reference.nf4`; this module adds validation, row ranges and the file layout.
Sources:
QLoRA (arXiv:2305.14314) section 3; the layout is the one that `bitsandbytes.functional.QuantState` writes. The
alternative, bitsandbytes itself, would make it a dependency of every run and has no scales of least error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora.errors import UserError, guard, problem
from qlora.specs import Quantization
from qlora_kernels import ops, reference
from qlora_kernels.weight import FORMATS, NESTED_BLOCKSIZE, QuantizedWeight, levels_of

FORMAT = "nf4"
STATE_KEY = "quant_state.bitsandbytes__nf4"
PART_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY)


def quantize(
    weight: Tensor, blocksize: int = 64, double_quant: bool = True, name: str = "weight", scales: str = "absmax"
) -> QuantizedWeight:
    """Quantize `weight` [out, in] (float32, bfloat16 or float16).

    Args:
        weight: the matrix.
        blocksize: weights that share a scale.
        double_quant: keep the scales in 8 bits.
        name: what messages call the weight.
        scales: "absmax" is the largest magnitude of a block, the bytes that bitsandbytes writes. "mse" is the scale
        that
            leaves the least squared error of the block; the codes are then the nearest levels under the scales as
            double quantization decodes them.

    Raises:
        UserError: the block size or the kind of scales is not one there is; the weight is not a floating-point matrix,
            or it holds NaN or inf (the message names `name`).
    """
    problems = Quantization(4, blocksize, double_quant, scales).problems()
    if weight.dim() != 2 or weight.numel() == 0:
        problems.append(
            problem(
                name, tuple(weight.shape), "NF4 stores a non-empty matrix [out, in]", "Keep other tensors in 16 bits"
            )
        )
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        problems.append(problem(name, weight.dtype, "must be float32, bfloat16 or float16", "Convert it first"))
    if problems:
        raise UserError(problems)
    weight, levels = weight.detach(), levels_of(FORMAT, weight.device)
    fitted = scales == "mse"
    packed, absmax = None, None
    if fitted:
        absmax = ops.fit_scales_4bit(weight, levels, blocksize)
    else:
        packed, absmax = ops.quantize_4bit(weight, levels, blocksize)
    # A NaN or inf always reaches the largest magnitude of its block, so the block maxima tell for the whole weight.
    if not bool(torch.isfinite(absmax).all()):
        rule, remedy = "a weight to quantize must be finite", "The checkpoint is damaged or diverged; load another"
        raise UserError(problem(name, "NaN or inf", rule, remedy))
    constants = ops.quantize_absmax(absmax, NESTED_BLOCKSIZE) if double_quant else (absmax,)
    shape = (weight.shape[0], weight.shape[1])
    if packed is None:
        decoded = QuantizedWeight.of(
            absmax, constants, shape, blocksize, levels=levels
        )  # of scales alone, no codes yet
        packed = ops.encode_4bit(weight, levels, reference.decode_absmax(decoded), blocksize)
    return QuantizedWeight.of(packed, constants, shape, blocksize, levels=levels)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32, row_scale: Tensor | None = None) -> Tensor:
    """Dense values [out, in] in `dtype`; `row_scale` [out] multiplies the rows, exactly if blocks lie within rows."""
    return ops.dequantize_4bit(weight.parts, weight.layout, row_scale, dtype)


def dequantize_into(out: Tensor, weight: QuantizedWeight, row_scale: Tensor | None = None) -> Tensor:
    """As `dequantize`, into `out` [out, in] in its dtype; returns it. Fresh memory costs more than the decoding."""
    ops.dequantize_4bit_into(out, weight.parts, weight.layout, row_scale)
    return out


def row_chunk(weight: QuantizedWeight, elements: int = 1 << 22) -> int:
    """How many rows make a chunk of about `elements` that starts on a block and on a nested block: what `rows` can cut
    out.

    All of them where odd sizes leave no such boundary inside the matrix.
    """
    out, columns = weight.shape
    unit = weight.blocksize * (weight.nested_blocksize if weight.nested else 1)
    step = unit // math.gcd(columns, unit)
    return min(out, step * max(1, elements // (step * columns)))


def rows(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Rows start..stop as a weight that shares the bytes; `start` must be a multiple of `row_chunk`'s step."""
    columns = weight.shape[1]
    first, last = start * columns, stop * columns
    blocks = slice(first // weight.blocksize, -(-last // weight.blocksize))
    constants: tuple[Tensor, ...] = (weight.absmax[blocks],)
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        nested = slice(blocks.start // weight.nested_blocksize, -(-blocks.stop // weight.nested_blocksize))
        constants += (weight.nested_absmax[nested], weight.nested_offset)
    packed, layout = weight.packed[first // 2 : (last + 1) // 2], [stop - start, *weight.layout[1:]]
    return QuantizedWeight([packed, constants[0], weight.levels, *constants[1:]], layout)


def to_bitsandbytes(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a bitsandbytes 4-bit checkpoint, keyed by what follows `P.weight` ("" for the codes themselves).

    `dtype` is recorded as the one to decode to. Every key is a tensor; the state is a JSON object as UTF-8 bytes.
    """
    device = weight.device
    state: dict[str, object] = {
        "quant_type": FORMATS[FORMAT].quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    parts = {"": weight.packed, ".absmax": weight.absmax, ".quant_map": weight.levels.clone()}
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        parts[".nested_absmax"] = weight.nested_absmax
        parts[".nested_quant_map"] = reference.dynamic_map(device).clone()
        state |= {
            "nested_blocksize": weight.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": weight.nested_offset.item(),
        }
    parts["." + STATE_KEY] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=device)
    return parts


def from_bitsandbytes(parts: dict[str, Tensor], name: str = "weight", file: str = "the checkpoint") -> QuantizedWeight:
    """The reverse of `to_bitsandbytes`; also takes what bitsandbytes itself wrote. `file` holds the weight `name`.

    Raises:
        UserError: not NF4 (FP4, say), a part is missing or has another size than the others ask for, a scale is not
            finite, or a map differs from the one this format defines.
    """
    original = f"Use the 16-bit original, or get {file} again"
    nested = parts.get(".nested_absmax")
    scalars = [name + key for key, part in parts.items() if part.dim() == 0]
    if scalars:
        raise UserError(problem(name, ", ".join(scalars), "is a single number, where a tensor is needed", original))
    needed = ["", ".absmax", ".quant_map", "." + STATE_KEY, *([".nested_quant_map"] if nested is not None else [])]
    missing = [name + key for key in needed if key not in parts]
    if missing:
        rule = f"a 4-bit weight needs the tensors {', '.join(missing)}"
        remedy = "Only NF4 checkpoints of bitsandbytes load; use the 16-bit original for anything else"
        raise UserError(problem(name, "incomplete", rule, remedy))
    state = packed_state(parts["." + STATE_KEY], name, file)
    cpu = torch.device("cpu")
    problems = []
    if state.quant_type != "nf4" or not torch.equal(parts[".quant_map"].cpu(), levels_of(FORMAT, cpu)):
        problems.append(problem(name, state.quant_type, "only the NF4 levels are supported", original))
    if nested is not None and not torch.equal(parts[".nested_quant_map"].cpu(), reference.dynamic_map(cpu)):
        problems.append(problem(name, "nested_quant_map", "is not the signed dynamic map", original))
    if state.nested_blocksize != NESTED_BLOCKSIZE:
        rule = f"scales are double-quantized in blocks of {NESTED_BLOCKSIZE}"
        problems.append(problem(name, state.nested_blocksize, rule, original))
    problems += _part_problems(parts, state, name, original)
    if problems:
        raise UserError(problems)
    constants: tuple[Tensor, ...] = (parts[".absmax"],)
    if nested is not None:
        constants += (nested, torch.tensor(state.nested_offset, dtype=torch.float32, device=nested.device))
    return QuantizedWeight.of(parts[""], constants, state.shape, state.blocksize, state.nested_blocksize)


@dataclass(frozen=True)
class PackedState:
    """What the JSON object of a 4-bit weight says; `double_quant`: its scales are in 8 bits."""

    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int
    nested_offset: float
    double_quant: bool


def packed_state(raw: Tensor, name: str, file: str) -> PackedState:
    """The state of the weight `name` in `file`, read from its bytes.

    Raises:
        UserError: it is no JSON object, or does not describe a matrix in blocks.
    """
    with guard(name, STATE_KEY, f"does not describe a 4-bit weight in {file}", f"Get {file} again"):
        state = json.loads(bytes(raw.tolist()))
        out, columns = (_whole(size) for size in state["shape"])
        made = PackedState(
            str(state["quant_type"]),
            _whole(state["blocksize"]),
            (out, columns),
            _whole(state.get("nested_blocksize", NESTED_BLOCKSIZE)),
            float(state["nested_offset"] if "nested_blocksize" in state else 0.0),
            "nested_blocksize" in state,
        )
        if made.blocksize < 2:
            raise ValueError(f"blocksize {made.blocksize}")
    return made


def _whole(size: object) -> int:
    if type(size) is not int or size < 1:
        raise ValueError(f"{size!r} is no size")
    return size


def _part_problems(parts: dict[str, Tensor], state: PackedState, name: str, remedy: str) -> list[str]:
    """A line for each part that has another type or size than the state asks for, or a scale that is not finite."""
    elements = state.shape[0] * state.shape[1]
    blocks = -(-elements // state.blocksize)
    scales = torch.uint8 if state.double_quant else torch.float32
    expected = {"": (torch.uint8, (elements + 1) // 2), ".absmax": (scales, blocks)}
    if state.double_quant:
        expected[".nested_absmax"] = (torch.float32, -(-blocks // state.nested_blocksize))
    problems = []
    for key, (dtype, count) in expected.items():
        part = parts.get(key)
        if part is None or part.dtype != dtype or part.numel() != count:
            found = "missing" if part is None else f"{part.numel()} of {part.dtype}".replace("torch.", "")
            rule = f"a weight {state.shape} in blocks of {state.blocksize} needs {count} of {dtype}"
            problems.append(problem(name + key, found, rule.replace("torch.", ""), remedy))
        elif part.is_floating_point() and not bool(part.isfinite().all()):
            problems.append(problem(name + key, "NaN or inf", "a scale must be finite", remedy))
    if not math.isfinite(state.nested_offset):
        problems.append(problem(name, state.nested_offset, "nested_offset must be finite", remedy))
    if (parts.get(".nested_absmax") is not None) != state.double_quant:
        problems.append(problem(name, "nested_absmax", "the state and the tensors disagree on it", remedy))
    return problems

"""NF4 weights: what they hold, how to make and read them, and the names bitsandbytes gives their parts.

    W [out, in]  ->  packed uint8 [(n+1)//2, 1], absmax (uint8 codes, or float32 without double quantization),
                     nested_absmax float32, nested_offset float32 scalar         n = out * in
    bytes a parameter: 0.5 + 1/64 + 4/(64*256) = 0.515869 at block size 64 with double quantization

The arithmetic is in `qlora_kernels.reference`; this module adds validation, row ranges and the file layout. A weight is
a plain
dataclass of tensors rather than a tensor subclass: modules keep the parts as buffers, and nothing intercepts torch
functions.
Sources: QLoRA (arXiv:2305.14314) section 3; the layout is the one `bitsandbytes.functional.QuantState` writes.
"""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from qlora.errors import UserError, problem
from qlora.layers.weight import NESTED_BLOCKSIZE, NF4Weight
from qlora.specs import Quantization
from qlora_kernels import ops, reference

STATE_KEY = "quant_state.bitsandbytes__nf4"
PART_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY)


def quantize(
    weight: Tensor, blocksize: int = 64, double_quant: bool = True, name: str = "weight", scales: str = "absmax"
) -> NF4Weight:
    """Quantize `weight` [out, in] (float32, bfloat16 or float16) to NF4.

    `scales`: "absmax" is the largest magnitude of a block, the bytes that bitsandbytes writes. "mse" is the scale that
    leaves the least squared error of the block; the codes are then the nearest levels under the scales as double
    quantization decodes them.

    Raises:
        UserError: the block size is not one of 32..4096, or the scales are of neither kind; the weight is not a
        floating-point matrix, or it holds NaN or inf
            (the message names `name`).
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
    weight = weight.detach()
    if scales == "mse":
        packed, absmax = None, ops.fit_scales_nf4(weight, blocksize)
    else:
        packed, absmax = ops.quantize_nf4(weight, blocksize)
    # A NaN or inf always reaches the largest magnitude of its block, so the block maxima tell for the whole weight.
    if not bool(torch.isfinite(absmax).all()):
        raise UserError(
            problem(
                name,
                "NaN or inf",
                "a weight to quantize must be finite",
                "The checkpoint is damaged or diverged; load another",
            )
        )
    nested = offset = None
    if double_quant:
        absmax, nested, offset = ops.quantize_absmax(absmax, NESTED_BLOCKSIZE)
    if packed is None:
        packed = ops.encode_nf4(weight, reference.decode_absmax(absmax, nested, offset, NESTED_BLOCKSIZE), blocksize)
    return NF4Weight(packed, absmax, nested, offset, (weight.shape[0], weight.shape[1]), blocksize)


def dequantize(weight: NF4Weight, dtype: torch.dtype = torch.float32, row_gain: Tensor | None = None) -> Tensor:
    """Dense [out, in] in `dtype`; with `row_gain` [out], row j times row_gain[j] (DoRA's fold)."""
    return ops.dequantize_nf4(
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_offset,
        row_gain,
        weight.shape[0],
        weight.shape[1],
        weight.blocksize,
        weight.nested_blocksize,
        dtype,
    )


def dequantize_into(out: Tensor, weight: NF4Weight, row_gain: Tensor | None = None) -> Tensor:
    """As `dequantize`, into `out` [out, in] in its dtype; returns it. Fresh memory costs more than the decoding itself."""
    ops.dequantize_nf4_into(
        out,
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_offset,
        row_gain,
        weight.blocksize,
        weight.nested_blocksize,
    )
    return out


def row_chunk(weight: NF4Weight, elements: int = 1 << 22) -> int:
    """How many rows make a chunk of about `elements` that starts on a block and on a nested block: what `rows` can cut
    out.

    All of them where odd sizes leave no such boundary inside the matrix.
    """
    out, columns = weight.shape
    unit = weight.blocksize * (weight.nested_blocksize if weight.nested_absmax is not None else 1)
    step = unit // math.gcd(columns, unit)
    return min(out, step * max(1, elements // (step * columns)))


def rows(weight: NF4Weight, start: int, stop: int) -> NF4Weight:
    """Rows start..stop as an NF4Weight that shares the bytes; `start` must be a multiple of `row_chunk`'s step."""
    columns = weight.shape[1]
    first, last = start * columns, stop * columns
    blocks = slice(first // weight.blocksize, -(-last // weight.blocksize))
    nested = None
    if weight.nested_absmax is not None:
        nested = weight.nested_absmax[
            blocks.start // weight.nested_blocksize : -(-blocks.stop // weight.nested_blocksize)
        ]
    return NF4Weight(
        weight.packed[first // 2 : (last + 1) // 2],
        weight.absmax[blocks],
        nested,
        weight.nested_offset,
        (stop - start, columns),
        weight.blocksize,
        weight.nested_blocksize,
    )


def to_bitsandbytes(weight: NF4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a bitsandbytes 4-bit checkpoint, keyed by what follows `P.weight` ("" for the codes themselves).

    `dtype` is recorded as the one to decode to. Every key is a tensor; the state is a JSON object as UTF-8 bytes.
    """
    device = weight.packed.device
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    parts = {"": weight.packed, ".absmax": weight.absmax, ".quant_map": reference.nf4_levels(device).clone()}
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


def from_bitsandbytes(parts: dict[str, Tensor], name: str = "weight") -> NF4Weight:
    """The reverse of `to_bitsandbytes`; also takes what bitsandbytes itself wrote.

    Raises:
        UserError: not NF4 (FP4, say), a part is missing, or a map differs from the one this format defines.
    """
    missing = [key for key in ("", ".absmax", ".quant_map", "." + STATE_KEY) if key not in parts]
    if missing:
        raise UserError(
            problem(
                name,
                "incomplete",
                f"a 4-bit weight needs the tensors {', '.join(name + k for k in missing)}",
                "Only NF4 checkpoints of bitsandbytes load; use the 16-bit original for anything else",
            )
        )
    state = json.loads(bytes(parts["." + STATE_KEY].tolist()))
    nested = parts.get(".nested_absmax")
    problems = []
    if state["quant_type"] != "nf4" or not torch.equal(
        parts[".quant_map"].cpu(), reference.nf4_levels(torch.device("cpu"))
    ):
        problems.append(
            problem(name, state["quant_type"], "only the NF4 levels are supported", "Use the 16-bit original")
        )
    if nested is not None and not torch.equal(
        parts[".nested_quant_map"].cpu(), reference.dynamic_map(torch.device("cpu"))
    ):
        problems.append(problem(name, "nested_quant_map", "is not the signed dynamic map", "Use the 16-bit original"))
    if parts[""].dtype != torch.uint8:
        problems.append(problem(name, parts[""].dtype, "codes must be stored as uint8", "Use the 16-bit original"))
    if state.get("nested_blocksize", NESTED_BLOCKSIZE) != NESTED_BLOCKSIZE:
        problems.append(
            problem(
                name,
                state["nested_blocksize"],
                f"scales are double-quantized in blocks of {NESTED_BLOCKSIZE}",
                "Use the 16-bit original",
            )
        )
    if problems:
        raise UserError(problems)
    offset = None if nested is None else torch.tensor(state["nested_offset"], dtype=torch.float32, device=nested.device)
    out, columns = state["shape"]
    return NF4Weight(
        parts[""],
        parts[".absmax"],
        nested,
        offset,
        (out, columns),
        state["blocksize"],
        state.get("nested_blocksize", NESTED_BLOCKSIZE),
    )

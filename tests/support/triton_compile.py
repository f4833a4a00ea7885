"""What test_triton.py runs in a process of its own: every Triton kernel compiled for every card, and what ptxas says.

    python tests/support/triton_compile.py [NAME ...]

One line for a kernel and a card: "NAME for CARD", a tab, and what was found, as JSON. Kernels are compiled as a launch
would for the types and sizes of a 7B; no card is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

from qlora_kernels.triton import adapter, adapter_norms, nf4, nf4_encode, optim, step
from qlora_kernels.triton.common import EXACT, FUSED

CARDS = (80, 86, 89, 90, 120)  # A100, RTX 3090, RTX 4090, H100, RTX 5090

# Types of arguments: "*" is an address, aligned to 16 bytes; "i32" a multiple of 16, "any" any other integer; a tuple
# holds those of a tuple. Arguments without a type are "i32".
I32, F32, BF16, U8 = "*i32", "*fp32", "*bf16", "*u8"
WEIGHT = {"weight": (U8, U8, F32, F32, F32, F32)}
ENCODED = {"packed": U8, "absmax": F32, "weight": BF16, "levels": F32, "midpoints": F32, "tiny": "fp32"}
BLOCKS = dict.fromkeys(("maxima", "values", "offset", "midpoints", "absmax", "levels"), F32) | {"codes": U8}
NORMS = {"into": (F32, F32, I32), "sizes": ("i32", "i32", "i32", "any", "i32"), "dynamic_map": F32}
STEP = dict.fromkeys(("y", "x", "weight", "dx", "dy", "gate", "up", "dgate", "dup", "logits"), BF16)
FINISH = (F32, F32, F32, F32, "fp32", ("i32", "i32"))
DOTS = {"into": (F32, F32, I32), "values": (BF16, BF16), "sizes": ("i32",) * 4 + ("any",)}

DOUBLE = {"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256}
ONE_STAGE = {**FUSED, "num_stages": 1}
WARPS = {"num_warps": 8, **FUSED}
COMPILED = {  # name -> kernel, types, constants, options as the callers give them, whether it may not spill
    "dequantize": (
        nf4.dequantize_kernel,
        {"out": BF16, **WEIGHT, "row_scale": F32},
        {**DOUBLE, "ROW_SCALE": 0, "WORDS": 512},
        EXACT,
        True,
    ),
    "dequantize with row scale": (
        nf4.dequantize_kernel,
        {"out": BF16, **WEIGHT, "row_scale": F32},
        {**DOUBLE, "ROW_SCALE": 1, "WORDS": 512},
        EXACT,
        True,
    ),
    "dequantize to float32": (
        nf4.dequantize_kernel,
        {"out": F32, "weight": (U8, F32, F32, F32, F32, F32), "row_scale": F32},
        {"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 0, "ROW_SCALE": 2, "WORDS": 512},
        EXACT,
        False,
    ),
    "gemv": (nf4.gemv_kernel, {"y": F32, "x": BF16, **WEIGHT}, {**DOUBLE, "ROWS": 4, "WORDS": 128}, FUSED, True),
    **{
        f"row norms, rank {rank}": (
            adapter_norms.row_norms_kernel,
            {**NORMS, **WEIGHT, "factors": (F32, F32, "fp32")},
            {**DOUBLE, "ROWS": 64, "WORDS": words, "RANK": rank},
            ONE_STAGE,
            True,
        )
        for rank, words in ((16, 8), (32, 8), (64, 4))
    },
    "row norms of many layers": (
        adapter_norms.row_norms_all_kernel,
        {**NORMS, "table": "*i64", "scalings": F32},
        {**DOUBLE, "ROWS": 64, "WORDS": 8, "RANK": 16},
        ONE_STAGE,
        True,
    ),
    **{
        name: (nf4_encode.quantize_kernel, ENCODED, {"BLOCKSIZE": 64, "BLOCKS": 64, "GIVEN": given}, EXACT, False)
        for name, given in (("quantize", False), ("encode", True))
    },
    **{
        name: (
            nf4_encode.encode_blocks_kernel,
            {**BLOCKS, "tiny": "fp32"},
            {"BLOCKSIZE": 256, "BLOCKS": 16, "OFFSET": offset},
            EXACT,
            not offset,
        )
        for name, offset in (("encode blocks", True), ("encode blocks of moments", False))
    },
    "decode blocks of moments": (optim.decode_blocks_kernel, BLOCKS, {"BLOCKSIZE": 256, "BLOCK": 1024}, EXACT, True),
    "adamw": (
        optim.adamw_kernel,
        {**dict.fromkeys("pgmv", F32), "numbers": ("fp32",) * 8},
        {"BLOCK": 1024},
        EXACT,
        True,
    ),
    "fit scales": (
        nf4_encode.fit_scales_kernel,
        {**ENCODED, "scales": F32, "stretches": F32, "candidates": "any"},
        {"BLOCKSIZE": 64, "BLOCKS": 64},
        EXACT,
        False,
    ),
    "rms norm": (step.rms_norm_kernel, {**STEP, "inverse": F32, "eps": "fp32"}, {"BLOCK": 4096}, WARPS, True),
    "rms norm, backward": (step.rms_norm_backward_kernel, {**STEP, "inverse": F32}, {"BLOCK": 4096}, WARPS, True),
    "swiglu": (step.swiglu_kernel, STEP, {"BLOCK": 1024}, FUSED, True),
    "swiglu, backward": (step.swiglu_backward_kernel, STEP, {"BLOCK": 1024}, FUSED, True),
    "swiglu, backward with dots": (
        step.swiglu_backward_dots_kernel,
        {**STEP, "gradients": (BF16, BF16), "values": (BF16, BF16), "reduced": (F32, F32, I32)},
        {"SHARE": 64, "TOKENS": 8, "COLUMNS": 128},
        FUSED,
        True,
    ),
    **{
        name: (
            step.rotate_kernel,
            {**dict.fromkeys(("into", "x", "angles"), (BF16, BF16)), "sizes": ("i32",) * 4, "strides": ("i32",) * 4},
            {"BACK": back, "HEADS": 16, "HALF": 64},
            EXACT,
            True,
        )
        for name, back in (("rotate", False), ("rotate, backward", True))
    },
    "cross entropy": (
        step.cross_entropy_kernel,
        {**STEP, "losses": F32, "targets": "*i64"},
        {"BLOCK": 4096},
        WARPS,
        True,
    ),
    "LoRA factors": (
        adapter.prepare_lora_factors_kernel,
        {"into": (BF16, BF16, F32, F32), "factors": (F32, F32, F32, F32), "scaling": "fp32", "rank": "any"},
        {"DORA": True, "BLOCK": 2048, "RANK": 16},
        EXACT,
        True,
    ),
    "LoRA factors of three layers": (
        adapter.join_lora_factors_kernel,
        {
            **{"into": (BF16, BF16, F32, F32), "factors": ((F32,) * 4,) * 3, "scaling": "fp32"},
            **{"rows": ("i32",) * 3, "rank": "any"},
        },
        {"DORA": True, "BLOCK": 2048, "RANK": 16, "COUNT": 3},
        EXACT,
        True,
    ),
    "dequantize three layers": (
        nf4.dequantize_joined_kernel,
        {"out": BF16, "weights": (WEIGHT["weight"],) * 3, "row_scale": F32, "rows": ("i32",) * 3},
        {**DOUBLE, "ROW_SCALE": 1, "WORDS": 512, "COUNT": 3},
        EXACT,
        True,
    ),
    "gradients of three layers, finished": (
        adapter.finish_gradients_kernel,
        {"dm": F32, "dots": F32, "finish": FINISH},
        {"COLUMNS": 128, "DORA": True, "COUNT": 3},
        FUSED,
        True,
    ),
    **{
        name: (
            adapter.columnwise_dot_kernel,
            {**DOTS, "finish": finish},
            {"SHARE": 64, "TOKENS": 16, "COLUMNS": 128, "FINISH": bool(finish), "COUNT": count},
            FUSED,
            True,
        )
        for name, finish, count in (
            ("columnwise dot", (), 1),
            ("gradients", (*FINISH[:5], ()), 1),
            ("gradients of three layers", FINISH, 3),
        )
    },
}


def leaves(types: tuple, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Each type in nested tuples, after the path to it."""
    for i, type_ in enumerate(types):
        if isinstance(type_, tuple):
            yield from leaves(type_, (*place, i))
        else:
            yield (*place, i), type_


def plain(type_):
    """A type as Triton writes it."""
    return tuple(map(plain, type_)) if isinstance(type_, tuple) else "i32" if type_ == "any" else type_


def _bytes(store: str) -> int:
    """What one thread writes by a store of PTX, such as st.global.v4.b32."""
    many, bits = re.search(r"\.v(\d)", store), re.search(r"\.[bfus](\d+)$", store)
    return (int(many.group(1)) if many else 1) * int(bits.group(1)) // 8 if bits else 0


def compile_for(name: str, card: int) -> dict[str, int | bool | str]:
    """Of a kernel on a card: bytes that spill, registers, instructions, the bytes of its widest store, shared memory,
    and the order of what threads share; whether it has to do without spills or contraction.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, options, hot = COMPILED[name]
    types = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in kernel.arg_names
    }
    aligned = {
        place: [["tt.divisibility", 16]]
        for place, type_ in leaves(tuple(types.values()))
        if type_.startswith("*") or type_ == "i32"
    }
    signature = {argument: plain(type_) for argument, type_ in types.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", card, 32), options=options
    )
    ptx = compiled.asm["ptx"]
    ptxas = triton.knobs.nvidia.ptxas if card < 90 else triton.knobs.nvidia.ptxas_blackwell
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        contraction = [] if options["enable_fp_fusion"] else ["--fmad=false"]
        command = [ptxas.path, "-v", *contraction, f"--gpu-name={architecture}", file.name, "-o", file.name + ".cubin"]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = Path(file.name + ".cubin")
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(code)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        code.unlink()
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", words)
    return {
        "spilled": int(spilled.group(1)) + int(spilled.group(2)),
        "registers": int(re.search(r"Used (\d+) registers", words).group(1)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP|BRA `)", listing, re.MULTILINE)),
        "stores": max(map(_bytes, re.findall(r"st\.global\S*", ptx)), default=0),
        "shared": compiled.metadata.shared,
        "hot": hot,
        "contracted": not options["enable_fp_fusion"] and bool(re.search(r"\sfma\.rn\.f32", ptx)),
        "order": "".join(re.findall(r"(?:st|ld)(?=\.global)|bar(?=\.sync)|atom(?=\.global\.gpu\.acq_rel)", ptx)),
    }


if __name__ == "__main__":
    for name in sys.argv[1:] or COMPILED:
        for card in CARDS:
            print(f"{name} for {card}\t{json.dumps(compile_for(name, card))}", flush=True)

"""What test_triton.py runs in processes of their own: the Triton kernels without a GPU.

    TRITON_INTERPRET=1 python tests/support/triton_on_cpu.py interpret   every kernel against the reference, in the interpreter, in float32
    python tests/support/triton_on_cpu.py compile                        every kernel for every card, and what ptxas says of it

Triton 3.6 interprets with numpy before 2.4 only: it makes numbers of arrays of one element, which numpy refuses since.
Its compiler is not concerned. The interpreter replaces the compiler when Triton is imported, so one process cannot do
both. One line a check: its name, then "ok", or what ptxas found as JSON.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile

import torch
import triton

from qlora_kernels import reference, triton_nf4, triton_optim, triton_step

NESTED = 256
CARDS = (80, 86, 89, 90, 120)  # A100, RTX 3090, RTX 4090, H100, RTX 5090


# ---------------------------------------------------------------- the interpreter


def weight(rows: int, columns: int) -> torch.Tensor:
    """Gaussian with rows of zeros, ties between levels, tiny and huge blocks."""
    values = torch.randn(rows, columns)
    flat = values.view(-1)
    levels = torch.tensor(reference.NF4_LEVELS)
    ties = (levels[:-1] + levels[1:]) / 2
    flat[: flat.numel() // 3] = ties[torch.randint(15, (flat.numel() // 3,))]
    flat[: flat.numel() // 3 : 16] = 1.0
    values[rows // 2] = 0
    values[-1] *= 1e-39
    return values


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), (a.flatten()[:8], b.flatten()[:8])


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert ((a - b).abs().max() <= tolerance * b.abs().max()).item(), (a - b).abs().max() / b.abs().max()


def check_encoding(rows: int, columns: int, blocksize: int) -> None:
    w = weight(rows, columns)
    packed, absmax = triton_nf4.quantize_nf4(w, blocksize)
    expected, expected_absmax = reference.quantize_nf4(w, blocksize)
    equal(packed, expected)
    equal(absmax, expected_absmax)
    scales = reference.fit_scales_nf4(w, blocksize)
    equal(triton_nf4.fit_scales_nf4(w, blocksize), scales)
    scales = scales * torch.tensor([1.0, -0.6, 0.0]).repeat(scales.numel())[: scales.numel()]
    equal(triton_nf4.encode_nf4(w, scales, blocksize), reference.encode_nf4(w, scales, blocksize))
    for got, wanted in zip(
        triton_nf4.quantize_absmax(absmax, NESTED), reference.quantize_absmax(absmax, NESTED), strict=True
    ):
        equal(got, wanted)


def check_decoding(rows: int, columns: int, blocksize: int) -> None:
    packed, absmax = reference.quantize_nf4(torch.randn(rows, columns), blocksize)
    for parts in (reference.quantize_absmax(absmax, NESTED), (absmax, None, None)):
        for gain in (None, torch.randn(rows)):
            arguments = (packed, *parts, gain, rows, columns, blocksize, NESTED, torch.float32)
            equal(triton_nf4.dequantize_nf4(*arguments), reference.dequantize_nf4(*arguments))
        arguments = (torch.randn(columns), packed, *parts, rows, columns, blocksize, NESTED)
        close(triton_nf4.nf4_gemv(*arguments), reference.nf4_gemv(*arguments))


def check_row_norms(rows: int, columns: int, rank: int) -> None:
    packed, absmax = reference.quantize_nf4(torch.randn(rows, columns), 64)
    parts = reference.quantize_absmax(absmax, NESTED)
    W = reference.dequantize_nf4(packed, *parts, None, rows, columns, 64, NESTED, torch.float32)
    A, B = torch.randn(rank, columns), torch.randn(rows, rank)
    A[0], B[rows // 2], B[rows // 2, 0] = W[rows // 2], 0, -1 / 1.999  # the sums cancel in this row
    for a, b, scaling in ((A, B, 1.999), (A[:1] * 0, B[:, :1] * 0, 1.0)):
        arguments = (packed, *parts, a, b, scaling, rows, columns, 64, NESTED)
        n, expected = triton_nf4.row_norms_nf4(*arguments), reference.row_norms_nf4(*arguments)
        close(n, expected)
        row = rows // 2
        assert abs(n[row] - expected[row]) <= 1e-4 * W[row].norm(), (n[row], expected[row])


def check_many_row_norms() -> None:
    """Layers of three shapes, of one a pair, the last misaligned: the same bits as each alone."""
    layers = []
    for rows, columns, rank in ((70, 192, 3), (5, 64, 3), (70, 192, 3), (9, 77, 3), (5, 64, 3)):
        packed, absmax = reference.quantize_nf4(torch.randn(rows, columns), 64)
        A, B = (
            torch.randn(rank, columns),
            torch.randn(rank * rows + 1)[1:].view(rows, rank) if len(layers) == 4 else torch.randn(rows, rank),
        )
        layers.append((packed, *reference.quantize_absmax(absmax, NESTED), A, B, 0.5 + len(layers), rows, columns, 64))
    for nested in (True, False):
        parts = (
            layers
            if nested
            else [(codes, torch.rand(len(scales)), None, None, *rest) for codes, scales, _, _, *rest in layers]
        )
        lists = [list(part) for part in zip(*parts, strict=True)]
        together = triton_nf4.row_norms_nf4_all(*lists[:2], *(lists[2:4] if nested else ([], [])), *lists[4:], NESTED)
        for n, layer in zip(together, parts, strict=True):
            equal(n, triton_nf4.row_norms_nf4(*layer, NESTED))
            close(n, reference.row_norms_nf4(*layer, NESTED))


def check_column_dots(tokens: int, columns: int) -> None:
    a, b = torch.randn(tokens, columns + 3)[:, :columns], torch.randn(tokens, columns)
    close(triton_step.column_dots(a, b), reference.column_dots(a, b))
    close(triton_step.column_dots(b.t(), a.t()), reference.column_dots(b.t(), a.t()))


def check_adapter_gradients(tokens: int, columns: int, rank: int) -> None:
    dy, y, u, up = (
        torch.randn(*shape) for shape in ((tokens, columns), (tokens, columns), (tokens, rank), (columns, rank))
    )
    gain, safe = torch.randn(columns), torch.rand(columns) + 0.1
    for arguments in ((y, gain, safe), (None, gain, safe), (None, None, None)):
        for got, wanted in zip(
            triton_step.adapter_gradients(dy, up, u, *arguments, 0.7),
            reference.adapter_gradients(dy, up, u, *arguments, 0.7),
            strict=True,
        ):
            if wanted.numel():
                close(got, wanted)


def check_factors(rank: int, columns: int, rows: int) -> None:
    A, B, m, n = torch.randn(rank, columns), torch.randn(rows, rank), torch.randn(rows), torch.rand(rows)
    m[0], n[-1] = -1e-9, 0.0
    for parts in ((m, n), (None, None)):
        for got, wanted in zip(
            triton_step.fold_factors(A, B, *parts, 0.7, torch.float32),
            reference.fold_factors(A, B, *parts, 0.7, torch.float32),
            strict=True,
        ):
            equal(got, wanted)
    m[rows // 2] = math.nan
    assert triton_step.fold_factors(A, B, m, n, 0.7, torch.float32)[1].isnan().any(1).nonzero().tolist() == [
        [rows // 2]
    ]


def check_layers(rows: int, columns: int) -> None:
    x, dy, up = (torch.randn(rows, columns) for _ in range(3))
    w = torch.rand(columns)
    y, inverse = triton_step.rms_norm(x, w, 1e-6)
    expected, expected_inverse = reference.rms_norm(x, w, 1e-6)
    close(y, expected)
    close(inverse, expected_inverse)
    close(triton_step.rms_norm_backward(dy, x, w, inverse), reference.rms_norm_backward(dy, x, w, expected_inverse))
    close(triton_step.swiglu(x, up), reference.swiglu(x, up))
    for got, wanted in zip(triton_step.swiglu_backward(dy, x, up), reference.swiglu_backward(dy, x, up), strict=True):
        close(got, wanted)
    for got, wanted in zip(
        triton_step.swiglu_backward_dots(dy, x, up), reference.swiglu_backward_dots(dy, x, up), strict=True
    ):
        close(got, wanted)


def check_loss(rows: int, vocabulary: int) -> None:
    logits, targets = 5 * torch.randn(rows, vocabulary), torch.randint(vocabulary, (rows,))
    logits[-1] = 0
    logits[-1, targets[-1]] = 15 + math.log(vocabulary)  # p near 1: the gradient p - 1 has to keep its digits
    expected, exact = logits.clone(), logits.double()
    reference.cross_entropy_(exact, targets)
    close(triton_step.cross_entropy_(logits, targets), reference.cross_entropy_(expected, targets))
    close(logits, expected)
    if vocabulary > 1:
        close(logits[-1, targets[-1]].double(), exact[-1, targets[-1]], 1e-4)


def check_adamw(n: int) -> None:
    """One piece, and several with gaps between them, in which the moments stay 0."""
    for ranges in ([slice(0, n)], [slice(0, n // 3), slice(n // 3, n // 2), slice(n // 2 + 1, n)]):
        p, g, m, v = (torch.zeros(n) for _ in range(4))
        for part in ranges:
            p[part], g[part], m[part], v[part] = (torch.randn(part.stop - part.start) for _ in range(4))
        v = v.square() * 1e-4
        for decay in (1.0, 0.99):
            scalars = (0.9, 0.999, 1e-8, decay, 3e-3, 0.3, 0.7)
            expected = [t.clone() for t in (p, g, m, v)]
            for code, (a, b, *moments) in ((reference, expected), (triton_optim, (p, g, m, v))):
                code.adamw_(
                    [a[part] for part in ranges],
                    [b[part] for part in ranges],
                    [part.start for part in ranges],
                    *moments,
                    torch.empty(3, n),
                    *scalars,
                )
            for got, wanted in zip((p, g, m, v), expected, strict=True):
                close(got, wanted, 5e-7)


def check_blocks(n: int, blocksize: int) -> None:
    for signed in (True, False):
        levels, midpoints = reference.block_tables(torch.device("cpu"), signed)
        values = torch.randn(n) * 10.0 ** torch.randint(-9, 3, (n,))
        values[: n // 4] = midpoints.repeat(n)[: n // 4]  # ties, where the block's largest magnitude is 1
        values[: n // 4 : blocksize] = 1.0
        values[n // 4 : n // 4 + blocksize] = 0.0
        values = values if signed else values.abs()
        codes, absmax, work = (
            torch.empty(n, dtype=torch.uint8),
            torch.empty(n // blocksize),
            torch.empty(n, dtype=torch.int32),
        )
        expected, expected_absmax = torch.empty_like(codes), torch.empty_like(absmax)
        triton_optim.encode_blocks_into(codes, absmax, values, work, blocksize, signed)
        reference.encode_blocks_into(expected, expected_absmax, values.clone(), work, blocksize, signed)
        equal(codes, expected)
        equal(absmax, expected_absmax)
        triton_optim.decode_blocks_into(values, codes, absmax, work, blocksize, signed)
        wanted = torch.empty(n)
        reference.decode_blocks_into(wanted, codes, absmax, work, blocksize, signed)
        equal(values, wanted)


def check_not_finite() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = torch.ones(131)
        w[65] = bad
        for scales in (triton_nf4.quantize_nf4(w, 64)[1], triton_nf4.fit_scales_nf4(w, 64)):
            assert scales.isfinite().tolist() == [True, False, True], bad


def check_model() -> None:
    """Two DoRA steps of a whole NF4 model, its optimizer's included: all operators from these kernels, as on a card, or
    from the reference.
    """
    from tiny import adapted, random_model

    import qlora
    from qlora.data.batch import Example, pack
    from qlora.layers import nf4
    from qlora.layers.attach import compute_norms, linear_names
    from qlora.layers.fused import fuse
    from qlora.layers.linear import NF4Linear
    from qlora.train.step import optimizer_step
    from qlora_kernels import ops

    kernels = {
        name: getattr(module, name)
        for module in (triton_nf4, triton_step, triton_optim)
        for name in ops.OPERATORS
        if hasattr(module, name)
    }
    called, ends = set(), []

    def chosen(name: str, mine: bool):
        def call(*arguments):
            called.add(name)
            return (kernels[name] if mine else getattr(reference, name))(*arguments)

        return call

    batches = [pack([Example(tuple(range(step, step + 70)), (False,) + (True,) * 69)]) for step in range(4)]
    for mine in (False, True):
        library = torch.library.Library("qlora", "IMPL")
        for name in ops.OPERATORS:
            library.impl(name, chosen(name, mine and name in kernels), "CPU", allow_override=True)
        model = random_model("llama").requires_grad_(False)
        for name in linear_names(model):
            dense = model.get_submodule(name)
            layer = NF4Linear(dense.in_features, dense.out_features)
            layer.nf4 = nf4.quantize(dense.weight)
            model.set_submodule(name, layer)
        model = fuse(adapted(model, "dora")).train()
        parameters = qlora.adapter_parameters(model)
        start = [p.detach().clone() for p in parameters]
        optimizer = qlora.PagedAdamW(parameters, lr=1e-2)
        called.clear()
        steps = []
        for step in range(2):
            compute_norms(model)  # as before each forward pass on a GPU
            steps.append(optimizer_step(model, optimizer, batches[2 * step : 2 * step + 2], 1e-2, 1.0))
        ends.append(
            (
                torch.tensor([list(step.values()) for step in steps]),
                torch.cat([(p.detach() - was).flatten() for p, was in zip(parameters, start)]),
            )
        )
    missing = {
        "dequantize_nf4_into",
        "row_norms_nf4_all",
        "fold_factors",
        "adapter_gradients",
        "swiglu_backward_dots",
        "rms_norm",
        "cross_entropy_",
        "adamw_",
    } - called
    assert not missing, missing
    (expected, moved), (found, also) = ends
    close(found, expected)
    # As a whole: AdamW divides a gradient near nothing by itself, so a single element may move anyhow.
    assert ((also - moved).norm() <= 2e-4 * moved.norm()).item(), (also - moved).norm() / moved.norm()


INTERPRETED = {
    **{
        f"encoding {r}x{c} blocks of {b}": (check_encoding, r, c, b)
        for r, c, b in ((1, 1, 64), (33, 77, 64), (70, 192, 32), (3, 1500, 256))
    },
    **{
        f"decoding {r}x{c} blocks of {b}": (check_decoding, r, c, b)
        for r, c, b in ((1, 1, 64), (7, 64, 32), (33, 77, 64), (70, 192, 64), (3, 8192, 4096))
    },
    **{
        f"row norms {r}x{c} rank {k}": (check_row_norms, r, c, k)
        for r, c, k in ((5, 64, 3), (70, 1088, 17), (9, 77, 3), (6, 128, 80))
    },
    "row norms of many layers": (check_many_row_norms,),
    **{f"column dots {t}x{c}": (check_column_dots, t, c) for t, c in ((1, 1), (3, 200), (300, 130))},
    **{
        f"gradients {t}x{c} rank {k}": (check_adapter_gradients, t, c, k)
        for t, c, k in ((1, 1, 1), (3, 200, 16), (150, 130, 3), (5, 64, 80))
    },
    **{f"layers {r}x{c}": (check_layers, r, c) for r, c in ((1, 1), (5, 77), (3, 1088), (150, 130))},
    **{
        f"factors rank {k}, {c} to {r}": (check_factors, k, c, r)
        for k, c, r in ((1, 1, 1), (3, 70, 33), (16, 1088, 300), (80, 64, 5))
    },
    **{f"loss {r}x{c}": (check_loss, r, c) for r, c in ((1, 1), (3, 77), (2, 9001))},
    **{f"adamw {n}": (check_adamw, n) for n in (1, 1000, 2500)},
    **{f"8-bit {n} blocks of {b}": (check_blocks, n, b) for n, b in ((256, 256), (5 * 256, 256), (40 * 64, 64))},
    "not finite": (check_not_finite,),
    "a model's steps": (check_model,),
}


def interpret() -> None:
    torch.use_deterministic_algorithms(True)  # every `torch.empty` comes filled with NaN, or with the largest integer
    for name, (check, *sizes) in INTERPRETED.items():
        torch.manual_seed(0)
        check(*sizes)
        print(f"{name}\tok", flush=True)


# ---------------------------------------------------------------- the compiler

FLOAT = dict.fromkeys(
    (
        "absmax",
        "nested",
        "offset",
        "gain",
        "levels",
        "dynamic_map",
        "y",
        "sums",
        "A",
        "B",
        "midpoints",
        "scales",
        "stretches",
        "scalings",
        "maxima",
        "values",
        "p",
        "g",
        "m",
        "v",
    ),
    "*fp32",
) | dict.fromkeys(
    ("scaling", "tiny", "weight1", "beta2", "weight2", "eps", "decay", "step_size", "correction", "scale"), "fp32"
)
BF16 = dict.fromkeys(("out", "x", "weight", "a", "b"), "*bf16")
BYTES = dict.fromkeys(("packed", "codes"), "*u8") | {"arrived": "*i32", "table": "*i64"}
LAYER = dict.fromkeys(("y", "x", "dx", "dy", "gate", "up", "dgate", "dup", "logits"), "*bf16")
FACTORS = dict.fromkeys(("A", "B", "m", "n", "gain", "safe"), "*fp32")
UNALIGNED = ("rank", "parts", "candidates")  # sizes that are no multiples of 16

DOUBLE = {"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256}
COMPILED = {  # name -> kernel, types that differ, constants, options as the callers give them, whether it may not spill
    "dequantize": (
        triton_nf4.dequantize_kernel,
        {"absmax": "*u8"},
        {**DOUBLE, "GAIN": 0, "WORDS": 512},
        triton_nf4.EXACT,
        True,
    ),
    "dequantize with gain": (
        triton_nf4.dequantize_kernel,
        {"absmax": "*u8"},
        {**DOUBLE, "GAIN": 1, "WORDS": 512},
        triton_nf4.EXACT,
        True,
    ),
    "dequantize to float32": (
        triton_nf4.dequantize_kernel,
        {"out": "*fp32"},
        {"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 0, "GAIN": 2, "WORDS": 512},
        triton_nf4.EXACT,
        False,
    ),
    "gemv": (triton_nf4.gemv_kernel, {"absmax": "*u8"}, {**DOUBLE, "ROWS": 4, "WORDS": 128}, triton_nf4.FUSED, True),
    **{
        f"row norms, rank {rank}": (
            triton_nf4.row_norms_kernel,
            {"absmax": "*u8", "n": "*fp32"},
            {**DOUBLE, "ROWS": 64, "WORDS": words, "RANK": rank},
            {**triton_nf4.FUSED, "num_stages": 1},
            True,
        )
        for rank, words in ((16, 8), (32, 8), (64, 4))
    },
    "row norms of many layers": (
        triton_nf4.row_norms_all_kernel,
        {"n": "*fp32"},
        {**DOUBLE, "ROWS": 64, "WORDS": 8, "RANK": 16},
        {**triton_nf4.FUSED, "num_stages": 1},
        True,
    ),
    "quantize": (
        triton_nf4.quantize_kernel,
        {},
        {"BLOCKSIZE": 64, "BLOCKS": 64, "GIVEN": False},
        triton_nf4.EXACT,
        False,
    ),
    "encode": (triton_nf4.quantize_kernel, {}, {"BLOCKSIZE": 64, "BLOCKS": 64, "GIVEN": True}, triton_nf4.EXACT, False),
    "encode blocks": (
        triton_nf4.encode_blocks_kernel,
        {},
        {"BLOCKSIZE": 256, "BLOCKS": 16, "OFFSET": True},
        triton_nf4.EXACT,
        False,
    ),
    "encode blocks of moments": (
        triton_nf4.encode_blocks_kernel,
        {},
        {"BLOCKSIZE": 256, "BLOCKS": 16, "OFFSET": False},
        triton_nf4.EXACT,
        True,
    ),
    "decode blocks of moments": (
        triton_optim.decode_blocks_kernel,
        {},
        {"BLOCKSIZE": 256, "BLOCK": 1024},
        triton_nf4.EXACT,
        True,
    ),
    "adamw": (triton_optim.adamw_kernel, {}, {"BLOCK": 1024}, triton_nf4.EXACT, True),
    "fit scales": (triton_nf4.fit_scales_kernel, {}, {"BLOCKSIZE": 64, "BLOCKS": 64}, triton_nf4.EXACT, False),
    "rms norm": (
        triton_step.rms_norm_kernel,
        {**LAYER, "inverse": "*fp32"},
        {"BLOCK": 4096},
        {"num_warps": 8, **triton_nf4.FUSED},
        True,
    ),
    "rms norm, backward": (
        triton_step.rms_norm_backward_kernel,
        {**LAYER, "inverse": "*fp32"},
        {"BLOCK": 4096},
        {"num_warps": 8, **triton_nf4.FUSED},
        True,
    ),
    "swiglu": (triton_step.swiglu_kernel, LAYER, {"BLOCK": 1024}, triton_nf4.FUSED, True),
    "swiglu, backward": (triton_step.swiglu_backward_kernel, LAYER, {"BLOCK": 1024}, triton_nf4.FUSED, True),
    "swiglu, backward with dots": (
        triton_step.swiglu_backward_dots_kernel,
        {**LAYER, "dots": "*fp32"},
        {"SHARE": 64, "TOKENS": 8, "COLUMNS": 128},
        triton_nf4.FUSED,
        True,
    ),
    "fold factors": (
        triton_step.fold_factors_kernel,
        {**FACTORS, "down": "*bf16", "up": "*bf16"},
        {"DORA": True, "BLOCK": 2048, "RANK": 16},
        triton_nf4.EXACT,
        True,
    ),
    "cross entropy": (
        triton_step.cross_entropy_kernel,
        {**LAYER, "losses": "*fp32", "targets": "*i64"},
        {"BLOCK": 4096},
        {"num_warps": 8, **triton_nf4.FUSED},
        True,
    ),
    **{
        name: (
            triton_step.column_dots_kernel,
            {"out": "*fp32", "safe": "*fp32", "raw": "*bf16", "dB": "*fp32"},
            {"SHARE": 64, "TOKENS": 16, "COLUMNS": 128, "FINISH": finish},
            triton_nf4.FUSED,
            True,
        )
        for name, finish in (("column dots", False), ("gradients", True))
    },
}


def compile_for(name: str, card: int) -> dict[str, int | bool | str]:
    """Of a kernel on a card: bytes that spill, registers, shared memory, and the order of what threads share; whether
    it has to do without spills or contraction.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, options, hot = COMPILED[name]
    types = {**FLOAT, **BF16, **BYTES, **types}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, type_) in enumerate(signature.items())
        if type_.startswith("*") or (type_ == "i32" and argument not in UNALIGNED)
    }
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
        command = [ptxas.path, "-v", *contraction, f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", words)
    return {
        "spilled": int(spilled.group(1)) + int(spilled.group(2)),
        "registers": int(re.search(r"Used (\d+) registers", words).group(1)),
        "shared": compiled.metadata.shared,
        "hot": hot,
        "contracted": not options["enable_fp_fusion"] and bool(re.search(r"\sfma\.rn\.f32", ptx)),
        "order": "".join(re.findall(r"(?:st|ld)(?=\.global)|bar(?=\.sync)|atom(?=\.global\.gpu\.acq_rel)", ptx)),
    }


def compile_all() -> None:
    for name in COMPILED:
        for card in CARDS:
            print(f"{name} for {card}\t{json.dumps(compile_for(name, card))}", flush=True)


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()

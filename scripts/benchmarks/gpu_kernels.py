"""Parts of gpu_suite.py: the operators, right and fast."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from gpu_bench import Bench
from random_models import RANK


class Worst:
    """The largest error of each operator, relative to the largest value; anything but equality is infinite where the
    bits must be the same.
    """

    def __init__(self):
        self.errors: dict[str, tuple[float, float]] = {}

    def __call__(self, name: str, got, expected, limit: float = 0.0) -> None:
        for a, b in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
            if a.dtype != b.dtype or a.shape != b.shape:
                error = math.inf
            elif limit == 0:
                error = 0.0 if torch.equal(a, b) else math.inf
            else:
                error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
            self.errors[name] = (max(self.errors.get(name, (0.0,))[0], error if error == error else math.inf), limit)


def part_kernels(bench: Bench) -> None:
    """Real shapes as training uses them, then odd ones. Each new combination is compiled first, so they are few."""
    real = (
        []
        if bench.small
        else [(4096, 4096, 64), (11008, 4096, 64), (4096, 11008, 64), (1024, 4096, 64), (14336, 4096, 64)]
    )
    odd = [(1, 1, 64), (33, 77, 64), (130, 576, 64), (7, 4096, 4096), (64, 512, 256), (5, 96, 32)]
    # This also fills every `torch.empty` with NaN, or with the largest integer.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for check in (check_nf4, check_norms, check_joined, check_step, check_state):
        worst = Worst()
        with bench.attempt(check.__name__.replace("_", " ")):
            for rows, columns, blocksize in real + odd:
                for dtype in (torch.bfloat16, torch.float32):
                    if dtype == torch.bfloat16 or (rows, columns, blocksize) not in real[1:]:
                        check(bench, worst, rows, columns, blocksize, dtype)
                bench.clean()
        for name, (error, limit) in worst.errors.items():
            bench.row(name, error, "worst error", most=limit, must=True)
    torch.use_deterministic_algorithms(False)


def normal(bench: Bench, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, device=bench.device, generator=torch.Generator(bench.device).manual_seed(seed)).to(dtype)


def check_nf4(bench: Bench, worst: Worst, rows: int, columns: int, blocksize: int, dtype: torch.dtype) -> None:
    from qlora_kernels import ops, reference
    from qlora_kernels.weight import QuantizedWeight, levels_of

    weight = normal(bench, rows, columns, dtype=dtype, seed=rows)
    levels = levels_of("nf4", weight.device)
    packed, absmax = reference.quantize_4bit(weight, levels, blocksize)
    worst("quantize_4bit", ops.quantize_4bit(weight, levels, blocksize), (packed, absmax))
    if rows * columns <= 1 << 24:
        scales = reference.fit_scales_4bit(weight, levels, blocksize)
        worst("fit_scales_4bit", ops.fit_scales_4bit(weight, levels, blocksize), scales)
        encode = (weight, levels, scales, blocksize)
        worst("encode_4bit", ops.encode_4bit(*encode), reference.encode_4bit(*encode))
    nested = reference.quantize_absmax(absmax, 256)
    worst("quantize_absmax", ops.quantize_absmax(absmax, 256), nested)
    gain = normal(bench, rows, seed=1)
    for constants in (nested, (absmax,)):
        w = QuantizedWeight.of(packed, constants, (rows, columns), blocksize)
        for row_scale in (None, gain):
            expected = reference.dequantize_4bit(w.parts, w.layout, row_scale, dtype)
            out = torch.full((rows, columns), math.nan, dtype=dtype, device=bench.device)
            ops.dequantize_4bit_into(out, w.parts, w.layout, row_scale)
            worst("dequantize_4bit", out, expected)
        arguments = (normal(bench, columns, dtype=dtype, seed=2), w.parts, w.layout)
        worst("gemv_4bit", ops.gemv_4bit(*arguments), reference.gemv_4bit(*arguments), 1e-5)


def check_norms(bench: Bench, worst: Worst, rows: int, columns: int, blocksize: int, dtype: torch.dtype) -> None:
    from qlora_kernels import ops, reference
    from qlora_kernels.weight import QuantizedWeight, levels_of

    weight = normal(bench, rows, columns, dtype=dtype, seed=rows)
    packed, absmax = reference.quantize_4bit(weight, levels_of("nf4", weight.device), blocksize)
    if dtype == torch.bfloat16:
        w = QuantizedWeight.of(packed, reference.quantize_absmax(absmax, 256), (rows, columns), blocksize)
        for rank in (16, 32, 64, 3, 128) if columns == 4096 or rows == 130 else (16,):
            A, B = 0.02 * normal(bench, rank, columns, seed=3), 0.02 * normal(bench, rows, rank, seed=4)
            n = ops.row_norms_4bit(w.parts, w.layout, A, B, 2.0)
            worst("row_norms_4bit", n, reference.row_norms_4bit(w.parts, w.layout, A, B, 2.0), 2e-5)
            many = ops.row_norms_4bit_all(w.parts * 3, w.layout * 3, [A] * 3, [B] * 3, [2.0] * 3)
            worst("row_norms_4bit_all, beside one at a time", tuple(many), (n, n, n))
    A, B, m, n = (
        normal(bench, 16, columns, seed=3),
        normal(bench, rows, 16, seed=4),
        normal(bench, rows, seed=5),
        normal(bench, rows, seed=6).abs(),
    )
    m[0], n[-1] = -1e-9, 0.0
    for parts in ((m, n), (None, None)):
        worst(
            "prepare_lora_factors",
            ops.prepare_lora_factors(A, B, *parts, 0.7, dtype),
            reference.prepare_lora_factors(A, B, *parts, 0.7, dtype),
        )
    dots = (weight, weight.flip(0).contiguous())
    exact, scale = (
        reference.columnwise_dot(*(t.double() for t in dots)).float(),
        reference.columnwise_dot(*(t.abs() for t in dots)).max(),
    )
    worst("columnwise_dot", ops.columnwise_dot(*dots) / scale, exact / scale, 1e-4)
    u, up, safe = (
        normal(bench, rows, 16, dtype=dtype, seed=7),
        normal(bench, columns, 16, dtype=dtype, seed=8),
        normal(bench, columns, seed=9).abs() + 0.5,
    )
    for y, part in ((dots[1], safe), (None, None)):
        pairs = zip(
            *(code.adapter_gradients(dots[0], up, u, y, part, part, 0.7) for code in (ops, reference)), strict=True
        )
        for name, (found, expected) in zip(("v", "dB", "dm"), pairs, strict=True):
            if expected.numel():
                worst(f"adapter_gradients, {name}", found, expected, 1.6e-2)


def check_joined(bench: Bench, worst: Worst, rows: int, columns: int, blocksize: int, dtype: torch.dtype) -> None:
    """Layers of one input as one, and the rotation behind them; arguments as `qlora selftest` draws them."""
    from qlora.selftest.operators import BLOCKSIZE, CASES, Draw
    from qlora_kernels import ops, reference

    if blocksize != BLOCKSIZE or rows == 1:
        return
    limit = 1.6e-2 if dtype == torch.bfloat16 else 1e-4
    names = ("dequantize_4bit_joined", "adapted_operands", "joined_gradients")
    for name in (*names, "swiglu_joined", "swiglu_joined_backward", "rotate", "rotate_backward"):
        arguments = CASES[name](Draw(bench.device, rows, columns, 40, dtype))
        found, expected = getattr(ops, name)(*arguments), getattr(reference, name)(*arguments)
        worst(f"{name}, {str(dtype)[6:]}", found, expected, 0.0 if name in names[:2] else limit)


def check_step(bench: Bench, worst: Worst, rows: int, columns: int, blocksize: int, dtype: torch.dtype) -> None:
    from qlora_kernels import ops, reference

    if rows == 1 or columns == 1:
        return
    kind, limit = (", bf16", 1.6e-2) if dtype == torch.bfloat16 else ("", 1e-5)
    x = normal(bench, rows, columns, dtype=dtype, seed=rows)
    up, dy, w = x.flip(0).contiguous(), x.flip(1).contiguous(), x[0].abs()
    y, inverse = reference.rms_norm(x, w, 1e-6)
    worst("rms_norm" + kind, ops.rms_norm(x, w, 1e-6), (y, inverse), limit)
    worst(
        "rms_norm_backward" + kind,
        ops.rms_norm_backward(dy, x, w, inverse),
        reference.rms_norm_backward(dy, x, w, inverse),
        limit,
    )
    worst("swiglu" + kind, ops.swiglu(x, up), reference.swiglu(x, up), limit)
    worst("swiglu_backward" + kind, ops.swiglu_backward(dy, x, up), reference.swiglu_backward(dy, x, up), limit)
    *found, sums = ops.swiglu_backward_dots(dy, x, up)
    *expected, wanted = reference.swiglu_backward_dots(dy, x, up)
    worst("swiglu_backward_dots" + kind, tuple(found), tuple(expected), limit)
    worst("swiglu_backward_dots, sums" + kind, sums, wanted, max(limit, 1e-4))
    logits, expected, targets = x.clone(), x.clone(), torch.arange(rows, device=bench.device) % columns
    worst(
        "cross_entropy_, losses" + kind,
        ops.cross_entropy_(logits, targets),
        reference.cross_entropy_(expected, targets),
        limit,
    )
    worst("cross_entropy_, gradient" + kind, logits, expected, limit)


def check_state(bench: Bench, worst: Worst, rows: int, columns: int, blocksize: int, dtype: torch.dtype) -> None:
    from qlora_kernels import ops, reference

    n = rows * columns
    if dtype != torch.float32 or n > 1 << 24:
        return
    parts = [normal(bench, n, seed=i) for i in range(4)]
    parts[3].square_()
    expected, work = [t.clone() for t in parts], torch.empty(3, n, device=bench.device)
    cut, numbers = [n // 3, n - n // 3], [0.9, 0.999, 1e-8, 0.99, 1e-2, 0.3, 0.7]
    for code, (p, g, *moments) in ((ops, parts), (reference, expected)):
        code.adamw_(p.split(cut), g.split(cut), [0, cut[0]], *moments, work, numbers)
    worst("adamw_", tuple(parts), tuple(expected), 1e-6)
    if n % 256 == 0:
        for signed in (True, False):
            values = normal(bench, n, seed=5) if signed else normal(bench, n, seed=5).square()
            found = []
            for code in (ops, reference):
                codes, absmax = (
                    torch.empty(n, dtype=torch.uint8, device=bench.device),
                    torch.empty(n // 256, device=bench.device),
                )
                again, work = (
                    torch.full((n,), math.nan, device=bench.device),
                    torch.empty(n, dtype=torch.int32, device=bench.device),
                )
                code.encode_blocks_into(codes, absmax, values.clone(), work, 256, signed)
                code.decode_blocks_into(again, codes, absmax, work, 256, signed)
                found.append((codes, absmax, again))
            worst("encode_blocks_into, decode_blocks_into", *found)


def copy_speed(bench: Bench, elements: int) -> float:
    """Bytes a second of a copy of bf16, read and written."""
    source = torch.empty(elements, dtype=torch.bfloat16, device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench.seconds(lambda: target.copy_(source))


def part_bandwidth(bench: Bench) -> None:
    from qlora.layers import nf4
    from qlora_kernels import ops

    device = bench.device
    out, columns = (256, 512) if bench.small else (11008, 4096)
    n = out * columns
    source = torch.randn(out, columns, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    copy = copy_speed(bench, 4 * n)
    bench.row("copy", copy / 1e9, "GB/s")
    weight = nf4.quantize(source)
    state = (weight.parts, weight.layout)
    levels = weight.levels
    gain, x = torch.rand(out, device=device), torch.randn(columns, device=device).to(torch.bfloat16)
    A, B = torch.randn(RANK, columns, device=device), torch.randn(out, RANK, device=device)
    y = torch.randn(64 if bench.small else 2048, out, device=device).to(torch.bfloat16)
    logits = torch.randn(16 if bench.small else 256, 32000, device=device).to(torch.bfloat16)
    targets = torch.arange(len(logits), device=device)
    page, room = [torch.rand(1 << 20, device=device) for _ in range(4)], torch.empty(3, 1 << 20, device=device)
    codes, scales, work = (
        torch.zeros(1 << 20, dtype=torch.uint8, device=device),
        torch.rand(1 << 12, device=device),
        torch.empty(1 << 20, dtype=torch.int32, device=device),
    )
    taken: dict[str, float] = {}
    cases: dict[
        str, tuple[Callable, float, float | None]
    ] = {  # call, bytes that it has to move, share of a copy's speed that is wanted
        "dequantize": (lambda: nf4.dequantize_into(target, weight), weight.nbytes + 2 * n, 0.8),
        "dequantize with row gain": (lambda: nf4.dequantize_into(target, weight, gain), weight.nbytes + 2 * n, 0.8),
        "gemv": (lambda: ops.gemv_4bit(x, *state), weight.nbytes, None),
        "row norms, rank 16": (lambda: ops.row_norms_4bit(*state, A, B, 2.0), weight.nbytes, None),
        "row norms of 8 layers": (
            lambda: ops.row_norms_4bit_all(*(part * 8 for part in (*state, [A], [B], [2.0]))),
            8 * weight.nbytes,
            None,
        ),
        "column dots": (lambda: ops.columnwise_dot(y, y), 2 * y.nbytes, None),
        "SwiGLU": (lambda: ops.swiglu(y, y), 3 * y.nbytes, None),
        "SwiGLU, backward": (lambda: ops.swiglu_backward(y, y, y), 5 * y.nbytes, None),
        "SwiGLU, backward with DoRA's sums": (lambda: ops.swiglu_backward_dots(y, y, y), 5 * y.nbytes, None),
        "factors": (
            lambda: ops.prepare_lora_factors(A, B, gain, gain, 2.0, torch.bfloat16),
            6 * (A.numel() + B.numel()),
            None,
        ),
        "cross entropy": (lambda: ops.cross_entropy_(logits, targets), 3 * logits.nbytes, None),
        "AdamW, a page": (
            lambda: ops.adamw_(page[:1], page[1:2], [0], *page[2:], room, [0.9, 0.999, 1e-8, 0.99, 1e-4, 0.5, 1.0]),
            28 * 2**20,
            None,
        ),
        "8-bit moments, decode": (
            lambda: ops.decode_blocks_into(page[0], codes, scales, work, 256, True),
            5 * 2**20,
            None,
        ),
        "8-bit moments, encode": (
            lambda: ops.encode_blocks_into(codes, scales, page[0], work, 256, True),
            5 * 2**20,
            None,
        ),
        "quantize": (lambda: ops.quantize_4bit(source, levels, 64), weight.nbytes + 2 * n, None),
        "fit scales": (lambda: ops.fit_scales_4bit(source, levels, 64), 2 * n, None),
    }
    for name, (call, nbytes, share) in cases.items():
        with bench.attempt(name):
            taken[name] = bench.seconds(call)
            bench.row(name, nbytes / taken[name] / 1e9, "GB/s")
            bench.row(f"{name}, of a copy's speed", nbytes / taken[name] / copy, "", least=share)
    if importlib.util.find_spec("bitsandbytes") is None:
        bench.row("dequantize, times bitsandbytes' speed", "not installed")
        return
    with bench.attempt("bitsandbytes"):
        import bitsandbytes.functional as bnb

        packed, quant_state = bnb.quantize_4bit(source, blocksize=64, quant_type="nf4", compress_statistics=True)
        into = target if bench.cuda else None  # on a CPU it has no such operator
        peer = bench.seconds(lambda: bnb.dequantize_4bit(packed, quant_state, out=into))
        bench.row("dequantize, times bitsandbytes' speed", peer / taken["dequantize"], "x", least=1.3)

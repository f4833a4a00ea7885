"""Each operator beside its peer: time, bandwidth, and share of what a copy reaches on this machine.

    python scripts/benchmarks/bench_kernels.py [--shape 4096x4096 ...] [--rounds 15] [--output FILE]

Every candidate runs once a round, round after round (A B A B ...), so that whatever else the machine does falls on all
of them alike. Times are medians over the rounds, ratios are medians of the ratios within a round; in brackets the same
from the least time of each, which is nearer to an idle machine. Bandwidth counts the bytes an operator must read and
write; a copy reads and writes its 16-bit matrix in memory that exists already.
The peers: bitsandbytes' CPU operators for quantizing and decoding; for DoRA's reductions the way PEFT computes them,
with PyTorch.

Where a result's memory comes from decides more than the operator: pages new from the kernel must be cleared, which
takes bitsandbytes' decoder four times as long as decoding. glibc gives a result of 32 MiB or more new pages on every
call, unless freed tensors have left a hole as large: with PEFT one step of 4096 x 4096 layers has such holes, another
has none, and larger layers rarely find one. So this script settles it: in rows named "fresh result" every result has
new pages, for both sides; in all others glibc is told to keep what is freed, so that no result has, and our decoder
writes into the same memory as training does (bitsandbytes' has no `out=` on a CPU). The page faults in the table show
that it is so.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from record import RESULTS, about, write

from qlora_kernels import ops
from qlora_kernels.weight import QuantizedWeight, levels_of

BLOCKSIZE, NESTED, RANK, TOKENS = 64, 256, 16, 1024


@dataclass
class Case:
    """One operator: what it moves in bytes, and what to compare it with."""

    name: str
    nbytes: float
    ours: Callable
    peer: Callable | None = None


@dataclass
class Result:
    shape: str
    operator: str
    ms: float
    least_ms: float
    gb_per_s: float
    copy_share: float
    least_copy_share: float
    peer_ms: float | None
    least_peer_ms: float | None
    times_peer: float | None
    least_times_peer: float | None
    page_faults: int
    peer_page_faults: int | None


FRESH = 1 << 25  # bytes from which a result has new pages by glibc's own rule


def set_malloc(fresh: bool) -> None:
    """New pages for every result of `FRESH` bytes, given back when it is freed; or none, everything freed is kept. Only
    glibc can be told.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, value in (
        ((mmap_threshold, FRESH), (trim_threshold, FRESH // 2))
        if fresh
        else ((mmap_max, 0), (trim_threshold, (1 << 31) - 1))
    ):
        if mallopt is not None and not mallopt(parameter, value):
            raise RuntimeError(f"mallopt({parameter}, {value}) failed")


def cases(out: int, columns: int, fresh: bool) -> list[Case]:
    n = out * columns
    weight = torch.randn(out, columns).bfloat16()
    levels = levels_of("nf4", weight.device)
    packed, absmax = ops.quantize_4bit(weight, levels, BLOCKSIZE)
    quantized = QuantizedWeight.of(packed, ops.quantize_absmax(absmax, NESTED), (out, columns), BLOCKSIZE)
    parts, layout = quantized.parts, quantized.layout
    theirs, state = bnb.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=True)
    codes = n * (0.5 + 1 / BLOCKSIZE + 4 / (BLOCKSIZE * NESTED))
    gain = torch.rand(out) + 0.5
    # One memory for all rows, as the peer's results share a place too, and the kernel's own, as in training: that asks
    # for huge pages.
    scratch = ops.dequantize_4bit(parts, layout, None, torch.float32).view(torch.uint8).view(-1)
    A, B = torch.randn(RANK, columns), torch.randn(out, RANK) * 0.01
    dy, y = torch.randn(TOKENS, out).bfloat16(), torch.randn(TOKENS, out).bfloat16()

    def quantize_double():
        return ops.quantize_absmax(ops.quantize_4bit(weight, levels, BLOCKSIZE)[1], NESTED)

    def quantize_fitted():
        return ops.encode_4bit(weight, levels, ops.fit_scales_4bit(weight, levels, BLOCKSIZE), BLOCKSIZE)

    def bnb_quantize(double: bool):
        return bnb.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=double)

    def peft_norms():
        dense = bnb.dequantize_4bit(theirs, state).float()
        return torch.linalg.vector_norm(dense + 2.0 * (B @ A), dim=1)

    def decoder(dtype):
        return lambda: ops.dequantize_4bit(parts, layout, None, dtype)

    def into(dtype, row_gain=None):
        buffer = scratch[: n * dtype.itemsize].view(dtype).view(out, columns)
        return lambda: ops.dequantize_4bit_into(buffer, parts, layout, row_gain)

    def bnb_decoder(dtype):
        _, typed = bnb.quantize_4bit(weight.to(dtype), blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=True)
        return lambda: bnb.dequantize_4bit(theirs, typed)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    peer = {dtype: bnb_decoder(dtype) for dtype in (bf16, fp16, fp32)}
    if fresh:
        return [
            Case(f"dequantize to {name}, fresh result", dtype.itemsize * n + codes, decoder(dtype), peer[dtype])
            for name, dtype in (("bf16", bf16), ("fp32", fp32))
        ]
    return [
        Case(
            "quantize, absmax",
            n * (2 + 0.5 + 4 / BLOCKSIZE),
            lambda: ops.quantize_4bit(weight, levels, BLOCKSIZE),
            lambda: bnb_quantize(False),
        ),
        Case("quantize, double", 2 * n + codes, quantize_double, lambda: bnb_quantize(True)),
        Case("quantize, mse scales", n * (2 + 2 + 0.5 + 4 / BLOCKSIZE), quantize_fitted),
        Case("dequantize to bf16, reused", 2 * n + codes, into(bf16), peer[bf16]),
        Case("dequantize to bf16, reused, row gain", 2 * n + codes, into(bf16, gain), peer[bf16]),
        Case("dequantize to fp16, reused", 2 * n + codes, into(fp16), peer[fp16]),
        Case("dequantize to fp32, reused", 4 * n + codes, into(fp32), peer[fp32]),
        Case(f"DoRA row norms, rank {RANK}", codes, lambda: ops.row_norms_4bit(parts, layout, A, B, 2.0), peft_norms),
        Case(
            f"DoRA magnitude gradient, {TOKENS} tokens",
            4 * TOKENS * out,
            lambda: ops.columnwise_dot(dy, y),
            lambda: (dy * y).sum(0, dtype=torch.float32),
        ),
        *step_cases(out, columns),
    ]


def step_cases(out: int, columns: int) -> list[Case]:
    """What lies between the products, forward and backward: loss, RMSNorm, gated product, rotation beside transformers'
    chains; attention beside torch's.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    from qlora.layers.attention import attend, borders
    from qlora.layers.functions import Gated, Rotation
    from qlora.layers.fused import RMSNorm

    norm = LlamaRMSNorm(out).bfloat16().requires_grad_(False)
    fused = RMSNorm(norm.weight, norm.variance_epsilon)
    x, gate, up, dy = (torch.randn(TOKENS, out).bfloat16().requires_grad_(k < 3) for k in range(4))
    logits, tokens = torch.randn(64, 49152).bfloat16().requires_grad_(), torch.randint(0, 49152, (64,))

    def both(function: Callable, *inputs: torch.Tensor):
        return lambda: torch.autograd.grad(function(*inputs), inputs, dy)

    gate_, up_ = gate.detach(), up.detach()

    def swiglu_sums_of_torch():
        dgate, dup = torch.ops.aten.silu_backward(dy * up_, gate_), dy * torch.nn.functional.silu(gate_)
        return (dgate * gate_).sum(0, dtype=torch.float32), (dup * up_).sum(0, dtype=torch.float32)

    def loss():
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits.float(), tokens, reduction="sum"), logits)

    heads = [torch.randn(4, 256, out // 64, 64).bfloat16().requires_grad_(k < 3) for k in range(4)]

    packed = borders(torch.arange(0, TOKENS + 1, 256, dtype=torch.int32), torch.device("cpu"))

    def attention():
        q, k, v, dout = (x.view(1, TOKENS, -1, 64).transpose(1, 2) for x in heads)
        out = attend(None, q, k, v, None, **packed)[0]
        return torch.autograd.grad(out, heads[:3], dout.transpose(1, 2))

    def attention_of_torch():
        q, k, v, dout = (x.transpose(1, 2) for x in heads)
        return torch.autograd.grad(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), heads[:3], dout
        )

    q, k, dq, dk = (
        torch.randn(1, TOKENS, h, 64).bfloat16().transpose(1, 2).requires_grad_(i < 2)
        for i, h in enumerate(2 * (out // 64, max(1, out // 256)))
    )
    angles = torch.outer(torch.arange(TOKENS), 1e-2 ** torch.linspace(0, 2, 32)).repeat(1, 2)[None]
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def rotation(function: Callable):
        return lambda: torch.autograd.grad(function(q, k, cos, sin), (q, k), (dq, dk))

    return [
        Case(
            "loss of 64 x 49152 logits and gradient",
            4 * logits.numel(),
            lambda: ops.cross_entropy_(logits.detach().clone(), tokens),
            loss,
        ),
        Case(f"RMSNorm, {TOKENS} tokens, both ways", 10 * TOKENS * out, both(fused, x), both(norm, x)),
        Case(
            f"SwiGLU, {TOKENS} tokens, both ways",
            16 * TOKENS * out,
            both(lambda g, u: Gated.apply(g, u, "silu"), gate, up),
            both(lambda g, u: torch.nn.functional.silu(g) * u, gate, up),
        ),
        Case(
            f"SwiGLU, {TOKENS} tokens, forward",
            6 * TOKENS * out,
            lambda: ops.swiglu(gate_, up_),
            lambda: torch.nn.functional.silu(gate_) * up_,
        ),
        Case(
            f"SwiGLU, {TOKENS} tokens, backward with DoRA's sums",
            10 * TOKENS * out,
            lambda: ops.swiglu_backward_dots(dy, gate_, up_),
            swiglu_sums_of_torch,
        ),
        Case(
            f"rotation, {TOKENS} tokens, {q.shape[1]} and {k.shape[1]} heads of 64, both ways",
            8 * (q.numel() + k.numel()),
            rotation(Rotation.apply),
            rotation(apply_rotary_pos_emb),
        ),
        Case(
            f"attention, 4 x 256 tokens, {out // 64} heads of 64, both ways",
            24 * TOKENS * out,
            attention,
            attention_of_torch,
        ),
    ]


def seconds_and_faults(function: Callable) -> tuple[float, int]:
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    function()
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def measure(out: int, columns: int, rounds: int, fresh: bool) -> list[Result]:
    todo = cases(out, columns, fresh)
    source = torch.randn(out, columns).bfloat16()
    target = torch.empty_like(source)
    runs = {"copy": lambda: target.copy_(source)}
    for case in todo:
        runs[case.name] = case.ours
        if case.peer is not None:
            runs["peer of " + case.name] = case.peer
    times: dict[str, list[float]] = {name: [] for name in runs}
    faults: dict[str, list[int]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            taken, count = seconds_and_faults(run)
            if round_ > 1:  # the first ones warm up
                times[name].append(taken)
                faults[name].append(count)
    copies = times["copy"]
    results = []
    copy = [] if fresh else [("copy", 4.0 * source.numel())]
    for name, nbytes in [*copy, *((case.name, case.nbytes) for case in todo)]:
        ours, peer = times[name], times.get("peer of " + name)
        relative = nbytes / (4 * source.numel())  # of the bytes that a copy moves
        results.append(
            Result(
                shape=f"{out}x{columns}",
                operator=name,
                ms=statistics.median(ours) * 1e3,
                least_ms=min(ours) * 1e3,
                gb_per_s=nbytes / statistics.median(ours) / 1e9,
                copy_share=relative * median_ratio(copies, ours),
                least_copy_share=relative * min(copies) / min(ours),
                peer_ms=statistics.median(peer) * 1e3 if peer else None,
                least_peer_ms=min(peer) * 1e3 if peer else None,
                times_peer=median_ratio(peer, ours) if peer else None,
                least_times_peer=min(peer) / min(ours) if peer else None,
                page_faults=statistics.median_high(faults[name]),
                peer_page_faults=statistics.median_high(faults["peer of " + name]) if peer else None,
            )
        )
    return results


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def table(results: list[Result]) -> str:
    lines = [
        "| shape | operator | ms | GB/s | of a copy | peer, ms | times the peer | page faults, peer's |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        peer = f"| | {r.page_faults} |"
        if r.peer_ms is not None:
            times = f"{r.times_peer:.1f} ({r.least_times_peer:.1f})"
            peer = f"{r.peer_ms:.2f} ({r.least_peer_ms:.2f}) | {times} | {r.page_faults}, {r.peer_page_faults} |"
        share = f"{r.copy_share:.0%} ({r.least_copy_share:.0%})"
        lines.append(
            f"| {r.shape} | {r.operator} | {r.ms:.3f} ({r.least_ms:.3f}) | {r.gb_per_s:.1f} | {share} | {peer}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        action="append",
        help="ROWSxCOLUMNS, may be repeated (default: 4096x4096, SmolLM2's 576x1536, and 11008x4096 of a 7B model)",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shapes = [
        tuple(int(part) for part in shape.split("x"))
        for shape in arguments.shape or ["4096x4096", "576x1536", "11008x4096"]
    ]
    results = []
    for fresh in (True, False):  # in this order: once freed memory is kept, no result is fresh
        set_malloc(fresh)
        for out, columns in shapes:
            if not fresh or 2 * out * columns >= FRESH:
                results += measure(out, columns, arguments.rounds, fresh)
    environment = about("torch", "bitsandbytes")
    write(arguments.output, {"environment": environment, "results": [asdict(r) for r in results]})
    print("\n".join(f"{key}: {value}" for key, value in environment.items()), table(results), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())

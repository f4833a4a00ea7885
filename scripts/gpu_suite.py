"""Everything that only a card can show, in one command: is it right, how fast, in how much memory, beside PEFT + bitsandbytes.

    PYTHONPATH=.:kernels python3 scripts/gpu_suite.py [--only kernels,train] [--json scripts/results/gpu.json]
    PYTHONPATH=.:kernels python3 scripts/gpu_suite.py --device cpu --small      the same code at small shapes, where there is no card

    kernels     each operator against the reference at odd and real shapes, in float32 and bf16, outputs poisoned with NaN
    bandwidth   GB/s of the operators beside a copy and bitsandbytes
    train       step time, tokens/s and peak memory of LoRA and DoRA at the shapes of a 7B and an 8B, ours and PEFT + bitsandbytes
    curves      the losses of CPU and card on the same batches in float32, and the adapters that come out
    optimizer   a step with the paged optimizer resident and spilled
    generate    tokens/s, one at a time
    cap         the README's six lines with a 7B in 24 GB, and the smallest limit under which a step still runs
    plan        what `qlora.plan` predicts beside what was measured

Weights are random and made on the device, a layer at a time, so nothing is downloaded and no dense model ever lives. Each part is a process
of its own: one that fails is said, and the others run. Exit code 1 if something is wrong, 2 if there is no card; a figure that
falls short of what is wanted is marked, no more. Unsloth and Axolotl patch models that they load themselves, so they are not among the peers.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or poisoning `torch.empty` makes cuBLAS refuse to work
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from random_models import (  # noqa: E402
    RANK, SHAPES, attached, build, checkpointing, detached, ours, random_batch, skeleton, theirs, with_peft, write_checkpoint,
)  # fmt: skip
from torch import nn  # noqa: E402

PARTS = ("kernels", "bandwidth", "train", "curves", "optimizer", "generate", "cap", "plan")


@dataclass
class Row:
    """One figure. `wanted` is what issue and README ask for; `met` says whether it is so; `must`: if not, something is wrong."""

    part: str
    name: str
    value: float | str
    unit: str = ""
    wanted: str = ""
    met: bool | None = None
    must: bool = False


@dataclass(frozen=True)
class Machine:
    device: torch.device
    small: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any], rounds: int = 20) -> float:
        """The median time of a call; on a card by events, so that launching does not count."""
        function()
        times = []
        for _ in range(2 if self.small else rounds):
            if self.cuda:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                function()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                function()
                times.append(time.perf_counter() - begin)
        return median(times)

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


# ---------------------------------------------------------------- training steps, measured


def measure_steps(machine: Machine, model: nn.Module, length: int, optimizer: torch.optim.Optimizer | None = None) -> dict[str, float] | None:
    """Seconds of a step (median), its first loss and the peak of memory; None if it does not fit."""
    from qlora.train import PeakMemory, optimizer_step

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-4)
    batch = random_batch(length, model.config.vocab_size)
    model.train()
    times, losses = [], []
    machine.clean()
    try:
        with PeakMemory(machine.device) as memory:
            for step in range(3 if machine.small else 5):
                machine.wait()
                began = time.perf_counter()
                losses.append(optimizer_step(model, optimizer, [batch], 1e-4, 1.0, step)["loss"])
                machine.wait()
                times.append(time.perf_counter() - began)
            return {"seconds": median(times[2:]), "loss": losses[0], "peak": memory.peak()}
    except torch.OutOfMemoryError:
        return None
    finally:
        for parameter in trained:
            parameter.grad = None
        del optimizer
        machine.clean()


# ---------------------------------------------------------------- kernels


def part_kernels(machine: Machine) -> list[Row]:
    from qlora_kernels import ops, reference

    device = machine.device
    odd = [(1, 1, 64), (3, 5, 64), (33, 77, 64), (130, 576, 32), (7, 4096, 4096), (64, 512, 256)]
    real = [] if machine.small else [(4096, 4096, 64), (11008, 4096, 64), (4096, 11008, 64), (1024, 4096, 64), (14336, 4096, 64)]
    worst: dict[str, float] = {}

    def note(name: str, got, expected, exact: bool = True) -> None:
        for a, b in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
            if a.dtype != b.dtype or a.shape != b.shape:
                error = math.inf
            elif exact:
                error = 0.0 if torch.equal(a, b) else math.inf
            else:
                error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
            worst[name] = max(worst.get(name, 0.0), error if error == error else math.inf)

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every `torch.empty` with NaN
    for rows, columns, blocksize in odd + real:
        generator = torch.Generator(device).manual_seed(rows)
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(rows, columns, device=device, generator=generator).to(dtype)
            packed, absmax = reference.quantize_nf4(weight, blocksize)
            note("quantize_nf4", ops.quantize_nf4(weight, blocksize), (packed, absmax))
            scales = reference.fit_scales_nf4(weight, blocksize)
            note("fit_scales_nf4", ops.fit_scales_nf4(weight, blocksize), scales)
            note("encode_nf4", ops.encode_nf4(weight, scales, blocksize), reference.encode_nf4(weight, scales, blocksize))
            nested = reference.quantize_absmax(absmax, 256)
            note("quantize_absmax", ops.quantize_absmax(absmax, 256), nested)
            gain = torch.randn(rows, device=device, generator=generator)
            for parts in (nested, (absmax, None, None)):
                for row_gain in (None, gain):
                    expected = reference.dequantize_nf4(packed, *parts, row_gain, rows, columns, blocksize, 256, dtype)
                    out = torch.full((rows, columns), math.nan, dtype=dtype, device=device)
                    ops.dequantize_nf4_into(out, packed, *parts, row_gain, blocksize, 256)
                    note("dequantize_nf4", out, expected)
                x = torch.randn(columns, device=device, generator=generator).to(dtype)
                arguments = (x, packed, *parts, rows, columns, blocksize, 256)
                note("nf4_gemv", ops.nf4_gemv(*arguments), reference.nf4_gemv(*arguments), exact=False)
                for rank in (3, 16, 64, 128):
                    A, B = (0.02 * torch.randn(s, device=device, generator=generator) for s in ((rank, columns), (rows, rank)))
                    arguments = (packed, *parts, A, B, 2.0, rows, columns, blocksize, 256)
                    note("row_norms_nf4", ops.row_norms_nf4(*arguments), reference.row_norms_nf4(*arguments), exact=False)
            dots = (weight, weight.flip(0).contiguous())
            exact = reference.column_dots(*(t.double() for t in dots)).float()
            scale = reference.column_dots(*(t.abs() for t in dots)).max()
            note("column_dots", ops.column_dots(*dots) / scale, exact / scale, exact=False)
            if rows > 1 and columns > 1:
                x, up, dy, w, kind = weight, weight.flip(0).contiguous(), weight.flip(1).contiguous(), weight[0].abs(), ", bf16" * (dtype != torch.float32)
                y, inverse = reference.rms_norm(x, w, 1e-6)
                note("rms_norm" + kind, ops.rms_norm(x, w, 1e-6), (y, inverse), exact=False)
                note("rms_norm_backward" + kind, ops.rms_norm_backward(dy, x, w, inverse), reference.rms_norm_backward(dy, x, w, inverse), exact=False)
                note("swiglu" + kind, ops.swiglu(x, up), reference.swiglu(x, up), exact=False)
                note("swiglu_backward" + kind, ops.swiglu_backward(dy, x, up), reference.swiglu_backward(dy, x, up), exact=False)
                logits, expected, targets = x.clone(), x.clone(), torch.arange(rows, device=device) % columns
                note("cross_entropy_, losses" + kind, ops.cross_entropy_(logits, targets), reference.cross_entropy_(expected, targets), exact=False)
                note("cross_entropy_, gradient" + kind, logits, expected, exact=False)
    torch.use_deterministic_algorithms(False)
    limits = {"nf4_gemv": 1e-5, "row_norms_nf4": 2e-5, "column_dots": 1e-4}
    limits |= {name: 1.6e-2 if "bf16" in name else 1e-5 for name in worst if name.startswith(("rms", "swiglu", "cross"))}
    return [
        Row("kernels", name, error, "worst error", f"<= {limits.get(name, 0):g}", error <= limits.get(name, 0), must=True)
        for name, error in worst.items()
    ]


def part_bandwidth(machine: Machine) -> list[Row]:
    from qlora_kernels import ops

    from qlora import nf4

    rows_found, device = [], machine.device
    out, columns = (256, 512) if machine.small else (11008, 4096)
    n = out * columns
    source = torch.randn(out, columns, device=device).to(torch.bfloat16)
    target, wide = torch.empty_like(source), torch.empty(4 * n, dtype=torch.bfloat16, device=device)
    copied = torch.empty_like(wide)
    copy = 2 * wide.nbytes / machine.seconds(lambda: copied.copy_(wide))
    del wide, copied
    rows_found.append(Row("bandwidth", "copy", copy / 1e9, "GB/s"))
    weight = nf4.quantize(source)
    state = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_offset)
    gain, x = torch.rand(out, device=device), torch.randn(columns, device=device).to(torch.bfloat16)
    A, B = torch.randn(RANK, columns, device=device), torch.randn(out, RANK, device=device)
    y = torch.randn(2048, out, device=device).to(torch.bfloat16)
    sizes = (out, columns, 64, 256)
    cases: dict[str, tuple[Callable, float, float]] = {  # call, bytes that it has to move, share of a copy that is wanted
        "dequantize": (lambda: nf4.dequantize_into(target, weight), weight.nbytes + 2 * n, 0.8),
        "dequantize with row gain": (lambda: nf4.dequantize_into(target, weight, gain), weight.nbytes + 2 * n, 0.8),
        "gemv": (lambda: ops.nf4_gemv(x, *state, *sizes), weight.nbytes, 0.0),
        "row norms, rank 16": (lambda: ops.row_norms_nf4(*state, A, B, 2.0, *sizes), weight.nbytes, 0.0),
        "column dots": (lambda: ops.column_dots(y, y), 2 * y.nbytes, 0.0),
        "quantize": (lambda: ops.quantize_nf4(source, 64), weight.nbytes + 2 * n, 0.0),
        "fit scales": (lambda: ops.fit_scales_nf4(source, 64), 2 * n, 0.0),
    }
    taken: dict[str, float] = {}
    for name, (call, nbytes, share) in cases.items():
        taken[name] = machine.seconds(call)
        speed = nbytes / taken[name]
        met = None if share == 0 else speed >= share * copy
        rows_found.append(Row("bandwidth", name, speed / 1e9, "GB/s", f">= {share:.0%} of copy" if share else "", met))
        rows_found.append(Row("bandwidth", f"{name}, of a copy", speed / copy))
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes.functional as bnb

        packed, quant_state = bnb.quantize_4bit(source, blocksize=64, quant_type="nf4", compress_statistics=True)
        into = target if machine.cuda else None  # on a CPU it has no such operator
        peer = machine.seconds(lambda: bnb.dequantize_4bit(packed, quant_state, out=into))
        ratio = peer / taken["dequantize"]
        rows_found.append(Row("bandwidth", "dequantize, times bitsandbytes' speed", ratio, "x", ">= 1.3", ratio >= 1.3))
    return rows_found


# ---------------------------------------------------------------- training


def part_train(machine: Machine) -> list[Row]:
    found: list[Row] = []
    peers = importlib.util.find_spec("peft") and importlib.util.find_spec("bitsandbytes")
    for shape in ("small",) if machine.small else ("7B", "8B"):
        results: dict[tuple, dict | None] = {}
        lengths = (64,) if machine.small else (512, 2048)
        for side in ("ours", "peft") if peers else ("ours",):
            base = build(shape, machine.device, ours if side == "ours" else theirs)
            for method in ("lora", "dora"):
                torch.manual_seed(0)
                model = attached(base, method) if side == "ours" else with_peft(base, method)
                for length in lengths:
                    for again in (False, True):
                        checkpointing(model, again)
                        results[side, method, length, again] = measure_steps(machine, model, length)
                base = detached(model) if side == "ours" else model.unload()
                del model
            del base
            machine.clean()
        found += train_rows(shape, results, lengths)
    if not peers:
        found.append(Row("train", "PEFT + bitsandbytes", "not installed"))
    return found


def train_rows(shape: str, results: dict[tuple, dict | None], lengths: tuple[int, ...]) -> list[Row]:
    found = []
    for (side, method, length, again), result in results.items():
        name = f"{shape} {method} {length} tokens{', recomputing' if again else ''}: {side}"
        if result is None:
            found.append(Row("train", name, "out of memory", met=False if side == "ours" else None))
            continue
        limit = {512: 6.0, 2048: 7.5}.get(length) if shape == "7B" and side == "ours" and again else None
        peak = result["peak"] / 1e9
        found += [
            Row("train", name, length / result["seconds"], "tokens/s"),
            Row("train", name, result["seconds"] * 1e3, "ms/step"),
            Row("train", name, peak, "GB peak", f"<= {limit}" if limit else "", None if limit is None else peak <= limit),
        ]
    for method, wanted in (("lora", 1.3), ("dora", 1.8)):
        for length in lengths:
            for again in (False, True):
                mine, peer = results.get(("ours", method, length, again)), results.get(("peft", method, length, again))
                if mine and peer:
                    ratio = peer["seconds"] / mine["seconds"]
                    name = f"{shape} {method} {length} tokens{', recomputing' if again else ''}: times PEFT's speed"
                    found.append(Row("train", name, ratio, "x", f">= {wanted}", ratio >= wanted))
    for length in lengths:
        for again in (False, True):
            lora, dora = results["ours", "lora", length, again], results["ours", "dora", length, again]
            if lora and dora:
                words = f"{shape} {length} tokens{', recomputing' if again else ''}: DoRA over LoRA"
                slower, heavier = dora["seconds"] / lora["seconds"], dora["peak"] / lora["peak"]
                found.append(Row("train", words, slower, "of the time", "<= 1.05", slower <= 1.05))
                found.append(Row("train", words, heavier, "of the memory", "<= 1.02", heavier <= 1.02))
    for length in lengths:
        losses = [result["loss"] for (_, _, n, _), result in results.items() if n == length and result]
        spread = max(losses) / min(losses) - 1
        found.append(Row("train", f"{shape} {length} tokens: first losses agree to", spread, "", "<= 0.01", spread <= 0.01, must=True))
    return found


def part_curves(machine: Machine) -> list[Row]:
    """A checkpoint that both devices load, quantize and train on, in float32."""
    import qlora
    from qlora.train import optimizer_step
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, layers, steps, length = (64, 2, 4, 24) if machine.small else (512, 4, 20, 128)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=512)  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(f"{scratch}/model")
        for method in ("lora", "dora"):
            curves, start = {}, None
            for device in ("cpu", str(machine.device)):
                model = attached(qlora.load_base(f"{scratch}/model", dtype="fp32", device=device), method)
                parameters = qlora.adapter_parameters(model)
                with torch.no_grad():  # the random numbers of one device are not those of the other
                    if start is None:
                        start = [p.cpu().clone() for p in parameters]
                    for parameter, value in zip(parameters, start, strict=True):
                        parameter.copy_(value)
                optimizer = torch.optim.AdamW(parameters, lr=1e-3)
                model.train()
                losses = []
                for step in range(steps):
                    batches = [random_batch(length, 512, 2, seed) for seed in (2 * step, 2 * step + 1)]
                    losses.append(optimizer_step(model, optimizer, batches, 1e-3, 1.0, step)["loss"])
                folder = Path(scratch) / f"{method}-{len(curves)}"
                qlora.save_adapter(model, folder)
                curves[folder] = losses
            (one, first), (two, second) = curves.items()
            worst = max(abs(a - b) for a, b in zip(first, second, strict=True))
            found.append(Row("curves", f"{method}: losses of cpu and {machine.device}, {steps} steps", worst, "apart", "<= 1e-4", worst <= 1e-4, must=True))
            a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
            same = a.keys() == b.keys() and sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
            same = same and (one / "adapter_config.json").read_bytes() == (two / "adapter_config.json").read_bytes()
            found.append(Row("curves", f"{method}: the same adapter files", str(same), "", "True", same, must=True))
            apart = max(((a[key] - b[key]).norm() / a[key].norm().clamp(min=1e-12)).item() for key in a)
            found.append(Row("curves", f"{method}: adapter tensors, relative", apart, "apart", "<= 1e-2", apart <= 1e-2, must=True))
    return found


def part_optimizer(machine: Machine) -> list[Row]:
    import qlora

    if not hasattr(qlora, "PagedAdamW"):
        return [Row("optimizer", "qlora.PagedAdamW", "is not there")]
    model = attached(build("small" if machine.small else "7B", machine.device), "dora")
    checkpointing(model, True)
    parameters = qlora.adapter_parameters(model)
    kinds = {
        "torch.optim.AdamW": lambda: torch.optim.AdamW(parameters, lr=1e-4),
        "resident": lambda: qlora.PagedAdamW(parameters, lr=1e-4, memory="all"),
        "spilled": lambda: qlora.PagedAdamW(parameters, lr=1e-4, memory="none"),
    }
    found, seconds = [], {}
    for name, make in kinds.items():
        result = measure_steps(machine, model, 64 if machine.small else 512, make())
        if result is None:
            found.append(Row("optimizer", name, "out of memory", met=False))
            continue
        seconds[name] = result["seconds"]
        found += [Row("optimizer", name, result["seconds"] * 1e3, "ms/step"), Row("optimizer", name, result["peak"] / 1e9, "GB peak")]
    if "resident" in seconds and "spilled" in seconds:
        ratio = seconds["spilled"] / seconds["resident"]
        found.append(Row("optimizer", "spilled over resident", ratio, "of the time", "<= 1.03", ratio <= 1.03))
    return found


def part_generate(machine: Machine) -> list[Row]:
    from qlora_kernels import ops

    shape, count = ("small", 8) if machine.small else ("7B", 64)
    prompt = random_batch(16, SHAPES[shape][-1]).input_ids.to(machine.device)

    def speed(model: nn.Module) -> float:
        def run() -> None:
            model.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=count, max_new_tokens=count, do_sample=False, use_cache=True)

        model.eval()
        with torch.no_grad():
            run()
            machine.wait()
            began = time.perf_counter()
            run()
            machine.wait()
        return count / (time.perf_counter() - began)

    base = build(shape, machine.device)
    found, taken = [], {}
    for method in ("lora", "dora"):
        model = attached(base, method)
        taken[method] = speed(model)
        found.append(Row("generate", f"{shape} {method}", taken[method], "tokens/s"))
        if ops.multiplies_a_vector(machine.device):
            kernel, ops.multiplies_a_vector = ops.multiplies_a_vector, lambda device: False
            found.append(Row("generate", f"{shape} {method}, decoding every weight first", speed(model), "tokens/s"))
            ops.multiplies_a_vector = kernel
        base = detached(model)
    del base, model
    machine.clean()
    if importlib.util.find_spec("peft") and importlib.util.find_spec("bitsandbytes"):
        base = build(shape, machine.device, theirs)
        for method in ("lora", "dora"):
            model = with_peft(base, method)
            peer = speed(model)
            found.append(Row("generate", f"{shape} {method}: PEFT", peer, "tokens/s"))
            found.append(Row("generate", f"{shape} {method}: times PEFT's speed", taken[method] / peer, "x"))
            base = model.unload()
    return found


# ---------------------------------------------------------------- memory


def limit(machine: Machine, nbytes: float | None) -> None:
    """Let this process have so much of the card; None: all of it."""
    if machine.cuda:
        total = torch.cuda.get_device_properties(machine.device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if nbytes is None else min(1.0, nbytes / total), machine.device)


def smallest_limit(machine: Machine, step: Callable[[], Any], low: float, high: float) -> float:
    """The smallest limit in bytes under which `step` runs, to 2 %: `low` is known to be too little, `high` to be enough."""
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        machine.clean()
        limit(machine, middle)
        try:
            step()
            high = middle
        except torch.OutOfMemoryError:
            low = middle
        finally:
            limit(machine, None)
    return high


def part_cap(machine: Machine) -> list[Row]:
    import qlora
    from qlora.train import optimizer_step

    shape, length = ("small", 64) if machine.small else ("7B", 1024)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(shape, Path(scratch) / "model", machine.device)
        machine.clean()
        Path(scratch, "my.jsonl").write_text("".join(json.dumps({"text": "a line of text " * (length // 15) + str(i)}) + "\n" for i in range(16)))
        limit(machine, 24e9)
        result = qlora.finetune(qlora.FinetuneConfig(
            model=f"{scratch}/model", data=f"{scratch}/my.jsonl", output=f"{scratch}/mine", device=str(machine.device),
            bits=4, method="dora", rank=16, steps=3, max_tokens=length, gradient_checkpointing=True, dtype="bf16",
        ))  # fmt: skip
        limit(machine, None)
        fits = (result.adapter / "adapter_model.safetensors").is_file() and math.isfinite(result.loss)
        name = f"the README's lines, {shape}, 4 x {length} tokens{', in 24 GB' if machine.cuda else ''}"
        found.append(Row("cap", name, result.memory_bytes / 1e9, "GB peak", "runs", fits, must=True))
    machine.clean()
    if not machine.cuda:
        return [*found, Row("cap", "smallest limit", "only on a card: a CPU has no such limit")]
    for length in (64,) if machine.small else (512, 2048):
        model = attached(build(shape, machine.device), "dora")
        checkpointing(model, True)
        model.train()
        optimizer = torch.optim.AdamW(qlora.adapter_parameters(model), lr=1e-4)
        batch = random_batch(length, model.config.vocab_size)

        def step(model=model, optimizer=optimizer, batch=batch) -> None:
            optimizer_step(model, optimizer, [batch], 1e-4, 1.0)

        step()
        machine.clean()
        low = torch.cuda.memory_allocated(machine.device)
        torch.cuda.reset_peak_memory_stats(machine.device)
        step()
        high = torch.cuda.max_memory_reserved(machine.device)
        least = smallest_limit(machine, step, 0.9 * low, 1.05 * high)
        wanted = {512: 6.0, 2048: 7.5}.get(length)
        met = None if wanted is None else least / 1e9 <= wanted
        found.append(Row("cap", f"{shape} dora, {length} tokens, recomputing: smallest limit", least / 1e9, "GB", f"<= {wanted}" if wanted else "", met))
        del model, optimizer, step
        machine.clean()
    return found


def part_plan(machine: Machine) -> list[Row]:
    import qlora
    from qlora.plan import Skeleton, asked, longest, predict
    from qlora.train import anonymous_memory

    shape, lengths = ("small", (64,)) if machine.small else ("7B", (512, 2048))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        skeleton(shape).config.save_pretrained(folder)
        for length in lengths:
            base = 0 if machine.cuda else anonymous_memory()
            model = attached(build(shape, machine.device), "dora")
            measured = measure_steps(machine, model, length, qlora.PagedAdamW(qlora.adapter_parameters(model), lr=1e-4, memory="all"))
            del model
            machine.clean()
            config = qlora.FinetuneConfig(
                model=folder, data="-", output="-", device=str(machine.device), dtype="bf16", method="dora", rank=RANK, batch_size=1,
                max_tokens=length, optimizer_memory="all",
            )  # fmt: skip
            predicted = sum(predict(Skeleton(config), asked(config), longest(None, config)).parts.values())
            ratio = predicted / (measured["peak"] - base) if measured else math.nan
            found.append(Row("plan", f"{shape}, {length} tokens: predicted / measured peak", ratio, "", "0.9 to 1.1", None if machine.small else 0.9 <= ratio <= 1.1))
    return found


# ---------------------------------------------------------------- all of it


def about(machine: Machine) -> dict[str, Any]:
    from qlora_kernels import ops

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    facts: dict[str, Any] = {"commit": commit.stdout.strip(), "device": platform.processor() or platform.machine(), "python": platform.python_version()}
    if machine.cuda:
        card = torch.cuda.get_device_properties(machine.device)
        facts |= {"device": card.name, "capability": f"{card.major}.{card.minor}", "memory_bytes": card.total_memory, "cuda": torch.version.cuda}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "liger-kernel"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    return facts | {"backend": ops.backends()[machine.device.type], "small": machine.small}


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        value = row.value if isinstance(row.value, str) else f"{row.value:.4g}"
        verdict = "" if row.met is None else "ok" if row.met else "WRONG" if row.must else "short"
        lines.append(f"{row.part:10} {row.name:66} {value:>12} {row.unit:14} {row.wanted:16} {verdict}".rstrip())
    return "\n".join(lines)


def run_part(name: str, arguments: argparse.Namespace, seconds: float) -> tuple[list[Row], str | None]:
    """The rows of a part and, if it failed, why."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, __file__, "--part", name, "--json", file.name, "--device", arguments.device, *["--small"] * arguments.small]
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return [], f"took more than {seconds:.0f} seconds"
        written = file.read()
        if done.returncode or not written:
            sys.stderr.write(done.stderr)
            said = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", done.stderr, re.MULTILINE)
            return [], said[-1] if said else f"exit code {done.returncode}"
        return [Row(**row) for row in json.loads(written)], None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"--only {','.join(unknown)}: no such part. Choose from {', '.join(PARTS)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {arguments.device}: torch {torch.__version__} sees no CUDA device. Run with --device cpu --small, or see: qlora doctor", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and not arguments.small:
        print("--device cpu: needs --small; a 7B takes hours on a CPU.", file=sys.stderr)
        return 2
    machine = Machine(torch.device(arguments.device), arguments.small)
    if arguments.part:
        if machine.cuda:
            torch.cuda.set_device(machine.device)
        rows = globals()[f"part_{arguments.part}"](machine)
        arguments.json.write_text(json.dumps([asdict(row) for row in rows]))
        return 0
    facts, found, seconds, failed = about(machine), [], {}, {}
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    for name in parts:
        began = time.perf_counter()
        rows, failure = run_part(name, arguments, 240)
        seconds[name] = round(time.perf_counter() - began, 1)
        print(f"\n{table(rows)}\n{name:10} {seconds[name]} s", flush=True)
        if failure is not None:
            failed[name] = failure
            print(f"{name:10} FAILED: {failure}", flush=True)
        found += rows
    wrong = [row.name for row in found if row.must and not row.met]
    short = [row.name for row in found if row.met is False and not row.must]
    print(f"\n{sum(seconds.values()):.0f} s; failed: {', '.join(failed) or 'nothing'}; wrong: {', '.join(wrong) or 'nothing'}; short: {len(short)}")
    if arguments.json:
        result = {"about": facts, "seconds": seconds, "failed": failed, "rows": [asdict(row) for row in found]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything that only a card can show, in one command: is it right, how fast, in how much memory, beside PEFT + bitsandbytes.

    PYTHONPATH=.:kernels python3 scripts/gpu_suite.py [--only kernels,train] [--json scripts/results/gpu.json]
    PYTHONPATH=.:kernels python3 scripts/gpu_suite.py --device cpu --small      the same code at small shapes, where there is no card

    kernels     each operator against the reference at real and odd shapes, in float32 and bf16, outputs poisoned with NaN
    bandwidth   GB/s of the operators beside a copy and bitsandbytes
    train       step time, tokens/s and peak memory of LoRA and DoRA at the shape of a 7B, ours and PEFT + bitsandbytes
    profile     where the time of a 7B step goes: kernels by time, launches, and how long the card waits for them
    optimizer   a step with the paged optimizer resident and spilled, and the optimizer's step alone
    curves      the losses of CPU and card on the same batches in float32, and the adapters that come out
    plan        what `qlora.plan` predicts beside what was measured
    cap         the README's six lines with a 7B in 24 GB, `--memory 8GB`, and the smallest limit under which a step still runs
    train8B     as train, of an 8B
    generate    tokens/s, one at a time

Weights are random and made on the device, so nothing is downloaded and no dense model ever lives. A second process does the work and
tells every figure at once. A part, or a side of it, that fails is said and the rest runs, in a new process if need be; the JSON is written after each part.
Exit code 1 if something is wrong, 2 if there is no card; a figure that falls short of what is wanted is marked, no more. Peak memory is what
tensors took; what torch reserved for them, and the smallest limit that works, stand beside it. PEFT runs without
`prepare_model_for_kbit_training`, which would cost it time and memory. Unsloth and Axolotl patch models that they load themselves, so
they are not among the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or poisoning `torch.empty` makes cuBLAS refuse to work
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from gpu_bench import Bench, Row  # noqa: E402
from gpu_kernels import part_bandwidth, part_kernels  # noqa: E402
from gpu_memory import part_cap, part_plan  # noqa: E402
from gpu_training import part_curves, part_generate, part_optimizer, part_profile, part_train, part_train8B  # noqa: E402

PARTS = {  # in the order in which they run: cheap and important first
    "kernels": part_kernels, "bandwidth": part_bandwidth, "train": part_train, "profile": part_profile, "optimizer": part_optimizer,
    "curves": part_curves, "plan": part_plan, "cap": part_cap, "train8B": part_train8B, "generate": part_generate,
}  # fmt: skip
SECONDS = 150  # that a part may take


def about(device: torch.device, small: bool) -> dict[str, Any]:
    from qlora_kernels import ops

    try:
<<<<<<< HEAD
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        commit = ""
    facts: dict[str, Any] = {"commit": commit, "device": f"cpu ({platform.processor() or platform.machine()})", "python": platform.python_version()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
=======
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
    from qlora.plan import Skeleton, asked, largest, predict
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
            predicted = sum(predict(Skeleton(config), asked(config), largest(config)).parts.values())
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
>>>>>>> b33b1fe (A budget is held by giving freed memory back when it is near; kernels of oneDNN are bounded; the plan looks through the real batches)
        facts |= {"device": card.name, "capability": f"{card.major}.{card.minor}", "memory_bytes": card.total_memory, "cuda": torch.version.cuda}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "numpy"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    return facts | {"backend": ops.backends()[device.type], "small": small}


def work(parts: list[str], device: torch.device, small: bool) -> None:
    """The parts, one after the other, in this process; a line of JSON on standard output for all that happens."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error

    def tell(what: dict[str, Any]) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    if device.type == "cuda":
        torch.cuda.set_device(device)
    tell({"about": about(device, small)})
    bench = Bench(device, small, lambda row: tell({"row": asdict(row)}))
    for bench.part in parts:
        tell({"begin": bench.part})
        try:
            PARTS[bench.part](bench)
        except Exception as error:
            traceback.print_exc()
            tell({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]})
        bench.clean()
        bench.wait()  # raises where the card is past saving: the rest needs another process
        tell({"end": bench.part})


def watched(parts: list[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What `work` tells in a process of its own, which is ended when it takes too long over a part, or dies; then "lost" is told."""
    command = [sys.executable, __file__, "--work", ",".join(parts), "--device", arguments.device, *["--small"] * arguments.small]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        ends, lost = time.monotonic() + SECONDS, None
        try:
            while (line := lines.get(timeout=max(0.1, ends - time.monotonic()))) is not None:
                told = json.loads(line)
                if "begin" in told:
                    ends = time.monotonic() + SECONDS
                yield told
        except queue.Empty:
            process.kill()
            lost = f"took more than {SECONDS} seconds"
        if process.wait() and lost is None:
            lost = f"exit code {process.returncode}"
        said.seek(0)
        text = said.read().decode(errors="replace")
        if "Traceback" in text or lost:
            sys.stderr.write(text[-6000:])
        if lost:
            yield {"lost": lost}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work.split(","), torch.device(arguments.device), arguments.small)
        return 0
    parts = arguments.only.split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"--only {','.join(unknown)}: no such part. Choose from {', '.join(PARTS)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {arguments.device}: torch {torch.__version__} sees no CUDA device. Run with --device cpu --small, or see: qlora doctor", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and not arguments.small:
        print("--device cpu: needs --small; a 7B takes hours on a CPU.", file=sys.stderr)
        return 2
    facts, found, seconds, failed = {}, [], {}, {}
    part = began = None

    def finish(name: str) -> None:
        seconds[name] = round(time.monotonic() - began, 1)
        print(f"{name:9} {seconds[name]} s{f', FAILED: {failed[name]}' if name in failed else ''}\n", flush=True)
        if arguments.json:
            result = {"about": facts, "seconds": seconds, "failed": failed, "rows": [asdict(row) for row in found]}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    while parts:
        part, lost = None, None
        for told in watched(parts, arguments):
            if "about" in told:
                if not facts:
                    facts = told["about"]
                    print("\n".join(f"{key}: {value}" for key, value in facts.items()), end="\n\n", flush=True)
            elif "begin" in told:
                part, began = told["begin"], time.monotonic()
            elif "row" in told:
                found.append(Row(**told["row"]))
                print(found[-1], flush=True)
            elif "failed" in told:
                failed[part] = told["failed"]
            elif "end" in told:
                finish(part)
                parts, part = parts[1:], None
            else:
                lost = told["lost"]
        if lost is not None:  # with the part that was under way; before any part there is nothing to go on with
            failed[part or parts[0]] = lost
            began = began or time.monotonic()
            finish(part or parts[0])
            parts = parts[1:] if part else []
    wrong = [row.name for row in found if row.must and not row.met]
    short = [row.name for row in found if row.met is False and not row.must]
    print(f"{sum(seconds.values()):.0f} s; failed: {', '.join(failed) or 'nothing'}; wrong: {', '.join(wrong) or 'nothing'}; short: {', '.join(short) or 'nothing'}")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())

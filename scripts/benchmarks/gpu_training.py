"""Parts of gpu_suite.py: training steps beside PEFT's, where their time goes, the optimizer, and the curves of two
devices.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from gpu_bench import Bench, adamw, case, measure_steps, peers
from random_models import SHAPES, attached, build, checkpointing, ours, random_batch, random_examples, theirs, with_peft
from torch import nn


def part_train(bench: Bench, shape: str = "7B") -> None:
    shape = "small" if bench.small else shape
    results: dict[tuple, dict | None] = {}
    lengths = (64,) if bench.small else (512, 2048)
    for side in ("ours", "peft") if peers() else ("ours",):
        for method in ("lora", "dora"):
            with bench.attempt(f"{shape} {method}: {side}"):
                base = build(shape, bench.device, ours if side == "ours" else theirs)
                torch.manual_seed(0)
                model = attached(base, method) if side == "ours" else with_peft(base, method)
                for length in lengths:
                    for again in (False, True):
                        checkpointing(model, again)
                        result = measure_steps(bench, model, length, adamw(bench, model, side))
                        results[side, method, length, again] = result
                        told(bench, shape, side, method, length, again, result)
            base = model = None
    compared(bench, shape, results, lengths)
    if not peers():
        bench.row("PEFT + bitsandbytes", "not installed")


def part_train8B(bench: Bench) -> None:
    part_train(bench, "8B")


def told(bench: Bench, shape: str, side: str, method: str, length: int, again: bool, result: dict | None) -> None:
    name = f"{case(shape, method, length, again)}: {side}"
    if result is None:
        bench.row(name, "out of memory", met=False if side == "ours" else None)
        return
    limit = {512: 6.0, 2048: 7.5}.get(length) if shape == "7B" and side == "ours" and again else None
    bench.row(name, length / result["seconds"], "tokens/s")
    bench.row(name, result["seconds"] * 1e3, "ms/step")
    bench.row(name, result["peak"] / 1e9, "GB peak", most=limit)
    bench.row(name, result["reserved"] / 1e9, "GB reserved")


def compared(bench: Bench, shape: str, results: dict[tuple, dict | None], lengths: tuple[int, ...]) -> None:
    for length in lengths:
        for again in (False, True):
            for method, wanted in (("lora", 1.3), ("dora", 1.8)):
                mine, peer = results.get(("ours", method, length, again)), results.get(("peft", method, length, again))
                if mine and peer:
                    name = f"{case(shape, method, length, again)}: times PEFT's"
                    bench.row(name, peer["seconds"] / mine["seconds"], "x speed", least=wanted)
                    bench.row(name, mine["peak"] / peer["peak"], "x memory")
            lora, dora = results.get(("ours", "lora", length, again)), results.get(("ours", "dora", length, again))
            if lora and dora:
                name = f"{case(shape, 'dora', length, again)}: over LoRA"
                bench.row(name, dora["seconds"] / lora["seconds"], "of the time", most=1.05)
                bench.row(name, dora["peak"] / lora["peak"], "of the memory", most=1.02)
        losses = [result["loss"] for (_, _, n, _), result in results.items() if n == length and result]
        if losses:
            bench.row(
                f"{shape} {length} tokens: first losses agree to", max(losses) / min(losses) - 1, most=0.01, must=True
            )


def part_mixed(bench: Bench) -> None:
    """Batches of four examples: of one length, of four lengths with as many tokens, and new lengths at every step."""
    import qlora
    from qlora.train.memory import PeakMemory
    from qlora.train.step import optimizer_step

    shape, length, steps = ("small", 16, 3) if bench.small else ("7B", 512, 20)
    model = attached(build(shape, bench.device), "lora").train()
    checkpointing(model, False)
    dice = random.Random(0)
    unequal = [length * part // 8 for part in (2, 6, 11, 13)]
    varied = [[dice.randint(length // 8, 2 * length) for _ in range(4)] for _ in range(steps)]
    times: dict[str, float] = {}
    for name, every in (("equal", [[length] * 4] * steps), ("unequal", [unequal] * steps), ("new", varied)):
        optimizer = qlora.PagedAdamW(qlora.adapter_parameters(model), lr=1e-4)
        walls = []
        with bench.attempt(f"{shape} {name} lengths"), PeakMemory(bench.device) as memory:
            for lengths in every:
                batch = random_examples(lengths, model.config.vocab_size)
                bench.wait()
                began = time.perf_counter()
                optimizer_step(model, optimizer, [batch], 1e-4, 1.0)
                bench.wait()
                walls.append((time.perf_counter() - began) / batch.tokens)
            times[name] = median(walls[1:])
            bench.row(f"{shape} {name} lengths", 1 / times[name], "tokens/s")
            bench.row(f"{shape} {name} lengths: reserved over allocated", memory.peak() / memory.allocated(), "x")
            bench.row(f"{shape} {name} lengths: first step", walls[0] * sum(every[0]), "s")
        optimizer.close()
    if {"equal", "unequal"} <= times.keys():
        bench.row(f"{shape} unequal lengths, of equal ones' time", times["unequal"] / times["equal"], "x", most=1.05)


def part_profile(bench: Bench) -> None:
    """Steps of ours. The card waits for launches for as long as a step takes without a kernel running."""
    import qlora
    from qlora.layers.loss import loss_sum
    from qlora.train.step import optimizer_step

    shape = "small" if bench.small else "7B"
    base = build(shape, bench.device)
    for method in ("lora", "dora"):
        model = attached(base, method).train()
        checkpointing(model, False)
        optimizer = qlora.PagedAdamW(qlora.adapter_parameters(model), lr=1e-4)
        for length in (64,) if bench.small else (512, 2048):
            name, batch = f"{shape} {method} {length}", random_batch(length, model.config.vocab_size)
            with bench.attempt(name):

                def step(model=model, optimizer=optimizer, batch=batch) -> None:
                    optimizer_step(model, optimizer, [batch], 1e-4, 1.0)

                walls = []
                for _ in range(5):
                    bench.wait()
                    began = time.perf_counter()
                    step()
                    bench.wait()
                    walls.append(time.perf_counter() - began)
                wall = median(walls[2:])
                bench.row(f"{name}: a step", wall * 1e3, "ms")
                pieces = {
                    "forward": lambda model=model, batch=batch: loss_sum(model, batch),
                    "forward and backward": lambda model=model, batch=batch: loss_sum(model, batch).backward(),
                    "optimizer": optimizer.step,
                }
                for words, part in pieces.items():
                    bench.wait()
                    began = time.perf_counter()
                    part()
                    launched = time.perf_counter() - began
                    bench.wait()
                    bench.row(f"{name}: {words}, launched after", launched * 1e3, "ms")
                    bench.row(f"{name}: {words}, done after", (time.perf_counter() - began) * 1e3, "ms")
                optimizer.zero_grad()
                kernels, asked = bench.kernels(step)
                total = sum(ms for _, ms, _ in kernels)
                bench.row(f"{name}: kernels of a step", total, "ms")
                bench.row(f"{name}: kernels of a step", float(sum(count for _, _, count in kernels)), "launches")
                bench.row(f"{name}: of the step no kernel runs", 1 - total / (wall * 1e3), "")
                for key, ms, count in [*kernels[:14], *asked[:4]]:
                    bench.row(f"{name}: {key[:50]}", ms, f"ms in {count}")
        optimizer.close()
        base, model = qlora.detach(model), None


def part_optimizer(bench: Bench) -> None:
    import qlora

    model = attached(build("small" if bench.small else "7B", bench.device), "dora")
    checkpointing(model, True)
    parameters = qlora.adapter_parameters(model)
    fused = {"fused": True} if bench.cuda else {}
    kinds: dict[str, Callable] = {
        "torch.optim.AdamW": lambda: torch.optim.AdamW(parameters, lr=1e-4),
        "torch.optim.AdamW, fused": lambda: torch.optim.AdamW(parameters, lr=1e-4, **fused),
        "resident": lambda: qlora.PagedAdamW(parameters, lr=1e-4, memory="all"),
        "spilled": lambda: qlora.PagedAdamW(parameters, lr=1e-4, memory="none"),
        "8bit resident": lambda: qlora.PagedAdamW(parameters, lr=1e-4, memory="all", state="8bit"),
        "8bit spilled": lambda: qlora.PagedAdamW(parameters, lr=1e-4, memory="none", state="8bit"),
    }
    for name, make in kinds.items():  # the update alone
        with bench.attempt(f"{name}, its step alone"):
            optimizer, times = make(), []
            for p in parameters:
                p.grad = torch.full_like(p, 1e-3)
            for _ in range(8):
                bench.wait()
                began = time.perf_counter()
                optimizer.step()
                bench.wait()
                times.append(time.perf_counter() - began)
            bench.row(f"{name}, its step alone", median(times[2:]) * 1e3, "ms")
            if hasattr(optimizer, "close"):
                optimizer.close()
            del optimizer
        for p in parameters:
            p.grad = None
    equal(bench, parameters)
    length = 64 if bench.small else 512
    for count in (1, 4):
        seconds = {}
        for name in ("torch.optim.AdamW", "resident", "spilled", "8bit spilled"):
            about = f"a step of {count} x {length}, {name}"
            with bench.attempt(about):
                result = measure_steps(bench, model, length, kinds[name](), count)
                if result is None:
                    bench.row(about, "out of memory", met=False)
                    continue
                seconds[name] = result["seconds"]
                bench.row(about, result["seconds"] * 1e3, "ms/step")
                bench.row(about, result["peak"] / 1e9, "GB peak")
        for name in ("spilled", "8bit spilled"):
            if name in seconds and "resident" in seconds:
                bench.row(
                    f"a step of {count} x {length}, {name} over resident",
                    seconds[name] / seconds["resident"],
                    "of the time",
                    most=1.03,
                )


def equal(bench: Bench, parameters: list[nn.Parameter]) -> None:
    """Ten steps of the same gradients, ours resident, spilled, evicted in between, and torch's: the same parameters."""
    import qlora

    few = [torch.nn.Parameter(p.detach()[: p.shape[0] // 2].clone()) for p in parameters[:40]]
    few.append(torch.nn.Parameter(torch.randn(3_000_000, device=bench.device)))  # more than a page
    kinds = {
        "torch": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
        "resident": lambda p: qlora.PagedAdamW(p, lr=1e-3, memory="all"),
        "spilled": lambda p: qlora.PagedAdamW(p, lr=1e-3, memory="none"),
        "evicted": lambda p: qlora.PagedAdamW(p, lr=1e-3),
        "half spilled": lambda p: qlora.PagedAdamW(p, lr=1e-3, memory=13_000_000),
    }
    ends: dict[str, list[torch.Tensor]] = {}
    for name, make in kinds.items():
        with bench.attempt(f"{name}: equal to torch's"):
            mine = [torch.nn.Parameter(p.detach().clone()) for p in few]
            optimizer = make(mine)
            for step in range(10):
                generator = torch.Generator(bench.device).manual_seed(step)
                for p in mine:
                    p.grad = torch.randn(p.shape, device=bench.device, generator=generator)
                if name == "evicted" and step % 4 == 2:
                    optimizer.make_room()
                optimizer.step()
            ends[name] = [p.detach().clone() for p in mine]
            if hasattr(optimizer, "pager"):
                saved = optimizer.state_dict()["state"]
                ends[name] += [
                    saved[i][key].to(bench.device) for i in range(len(mine)) for key in ("exp_avg", "exp_avg_sq")
                ]
                optimizer.close()
            else:
                ends[name] += [optimizer.state[p][key] for p in mine for key in ("exp_avg", "exp_avg_sq")]
            if name != "torch":
                apart = max(
                    ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ends[name], ends["torch"], strict=True)
                )
                bench.row(
                    f"{name}: parameters and moments of ten steps beside torch's", apart, "apart", most=1e-6, must=True
                )


def part_curves(bench: Bench) -> None:
    """A checkpoint that both devices load, quantize and train on, in float32."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    import qlora
    from qlora.train.step import optimizer_step

    hidden, layers, steps, length = (64, 2, 4, 24) if bench.small else (512, 4, 20, 128)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(f"{scratch}/model")
        for method in ("lora", "dora"):
            with bench.attempt(method):
                curves, start = {}, None
                for device in ("cpu", str(bench.device)):
                    model = attached(qlora.load_base(f"{scratch}/model", dtype="fp32", device=device), method)
                    parameters = qlora.adapter_parameters(model)
                    with torch.no_grad():  # the random numbers of one device are not those of the other
                        if start is None:
                            start = [p.cpu().clone() for p in parameters]
                        for parameter, value in zip(parameters, start, strict=True):
                            parameter.copy_(value)
                    optimizer = qlora.PagedAdamW(parameters, lr=1e-3)
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
                bench.row(
                    f"{method}: losses of cpu and {bench.device}, {steps} steps", worst, "apart", most=1e-4, must=True
                )
                a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
                same = a.keys() == b.keys() and sorted(p.name for p in one.iterdir()) == sorted(
                    p.name for p in two.iterdir()
                )
                same = same and (one / "adapter_config.json").read_bytes() == (two / "adapter_config.json").read_bytes()
                bench.row(f"{method}: the same adapter files", str(same), met=same, must=True)
                apart = max(((a[key] - b[key]).norm() / a[key].norm().clamp(min=1e-12)).item() for key in a)
                bench.row(f"{method}: adapter tensors, relative", apart, "apart", most=1e-2, must=True)


def part_generate(bench: Bench) -> None:
    import qlora
    from qlora_kernels import backends

    shape, count = ("small", 8) if bench.small else ("7B", 32)
    prompt = random_batch(16, SHAPES[shape][5]).input_ids.to(bench.device)

    def speed(model: nn.Module) -> float:
        def run(tokens: int) -> None:
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
            )

        model.eval()
        with torch.no_grad():
            run(4)
            bench.wait()
            began = time.perf_counter()
            run(count)
            bench.wait()
        return count / (time.perf_counter() - began)

    base, taken = build(shape, bench.device), {}
    for method in ("lora", "dora"):
        model = attached(base, method)
        with bench.attempt(f"{shape} {method}"):
            taken[method] = speed(model)
            bench.row(f"{shape} {method}", taken[method], "tokens/s")
            if backends.has_gemv(bench.device):
                kernel, backends.has_gemv = backends.has_gemv, lambda device: False
                bench.row(f"{shape} {method}, decoding every weight first", speed(model), "tokens/s")
                backends.has_gemv = kernel
        base = qlora.detach(model)
    base = model = None
    bench.clean()
    if not peers():
        bench.row("PEFT + bitsandbytes", "not installed")
        return
    for method in ("lora", "dora"):
        with bench.attempt(f"{shape} {method}: PEFT"):
            peer = speed(with_peft(build(shape, bench.device, theirs), method))
            bench.row(f"{shape} {method}: PEFT", peer, "tokens/s")
            bench.row(f"{shape} {method}: times PEFT's speed", taken[method] / peer, "x")

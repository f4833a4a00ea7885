"""Parts of gpu_suite.py: what is predicted beside what is measured, and limits that are kept."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench, case, measure_steps
from random_models import RANK, attached, build, checkpointing, llama_config, random_batch, write_checkpoint


def limit(bench: Bench, nbytes: float | None) -> None:
    """Let this process have so much of the card; None: all of it."""
    if bench.cuda:
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if nbytes is None else min(1.0, nbytes / total), bench.device)


def smallest_limit(bench: Bench, step: Callable[[], Any], low: float, high: float) -> float:
    """The smallest limit in bytes under which `step` runs, to 2 %: `low` is known to be too little, `high` to be
    enough.
    """
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        bench.clean()
        limit(bench, middle)
        try:
            step()
            high = middle
        except (RuntimeError, ValueError) as error:  # torch's own, or the UserError that optimizer_step makes of it
            if "out of memory" not in str(error):
                raise
            low = middle
        finally:
            limit(bench, None)
    return high


def part_plan(bench: Bench) -> None:
    import qlora
    from qlora.plan.fit import peak_batches, predict, requested
    from qlora.plan.meta import MetaRun
    from qlora.run.inputs import find_model
    from qlora.train.memory import anonymous_memory

    if not bench.installed("pydantic"):  # which checks the options of a run
        return
    shape, lengths = ("small", (64,)) if bench.small else ("7B", (512, 2048))
    with tempfile.TemporaryDirectory() as folder:
        llama_config(shape).save_pretrained(folder)
        for again in (False, True):
            for length in lengths:
                name = case(shape, "dora", length, again)
                with bench.attempt(name):
                    base = 0 if bench.cuda else anonymous_memory()
                    model = attached(build(shape, bench.device), "dora")
                    checkpointing(model, again)
                    measured = measure_steps(
                        bench, model, length, qlora.PagedAdamW(qlora.adapter_parameters(model), lr=1e-4, memory="all")
                    )
                    model = None
                    if measured is None:
                        bench.row(name, "out of memory", met=False)
                        continue
                    config = qlora.FinetuneConfig(
                        model=folder,
                        data="-",
                        output="-",
                        device=str(bench.device),
                        dtype="bf16",
                        method="dora",
                        rank=RANK,
                        batch_size=1,
                        max_tokens=length,
                        optimizer_memory="all",
                        gradient_checkpointing=again,
                    )
                    run = MetaRun(config, find_model(config, weights=False))
                    run.still.mapped = 0  # the model came from no file
                    predicted = predict(run, requested(config), peak_batches(config)).training
                    ratio = predicted / (measured["peak"] - base)
                    bench.row(f"{name}: predicted", predicted / 1e9, "GB")
                    bench.row(
                        f"{name}: predicted over measured peak",
                        ratio,
                        "(0.9 to 1.1)",
                        met=None if bench.small else 0.9 <= ratio <= 1.1,
                    )
                    bench.row(f"{name}: reserved over predicted", (measured["reserved"] - base) / predicted)


def part_cap(bench: Bench) -> None:
    shape, length = ("small", 64) if bench.small else ("7B", 1024)
    if bench.installed("pydantic"):
        finetune(bench, shape, length)
    bench.clean()
    if not bench.cuda:
        bench.row("smallest limit", "a CPU has none")
        return
    for length in (64,) if bench.small else (512, 2048):
        with bench.attempt(f"{length} tokens: smallest limit"):
            smallest(bench, shape, length)


def finetune(bench: Bench, shape: str, length: int) -> None:
    import qlora

    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(shape, Path(scratch) / "model", bench.device)
        bench.clean()
        Path(scratch, "my.jsonl").write_text(
            "".join(json.dumps({"text": "a line of text " * (length // 15) + str(i)}) + "\n" for i in range(16))
        )
        options = {
            "model": f"{scratch}/model",
            "data": f"{scratch}/my.jsonl",
            "device": str(bench.device),
            "bits": 4,
            "method": "dora",
            "rank": 16,
            "steps": 3,
            "max_tokens": length,
            "dtype": "bf16",
        }
        with bench.attempt("the README's lines"):
            limit(bench, 24e9)
            try:
                result = qlora.finetune(
                    qlora.FinetuneConfig(output=f"{scratch}/mine", gradient_checkpointing=True, **options)
                )
            finally:
                limit(bench, None)
            fits = (result.adapter / "adapter_model.safetensors").is_file() and math.isfinite(result.loss)
            name = f"the README's lines, {shape}, 4 x {length} tokens{', in 24 GB' if bench.cuda else ''}"
            bench.row(name, result.memory_bytes / 1e9, "GB reserved", met=fits, must=True)
        if bench.cuda:
            budget = 1.2e9 if bench.small else 8e9
            with bench.attempt("--memory"):
                try:
                    result = qlora.finetune(
                        qlora.FinetuneConfig(output=f"{scratch}/held", memory=int(budget), **options)
                    )
                finally:
                    limit(bench, None)
                bench.row(
                    f"finetune --memory {budget / 1e9:g}GB, {shape}: reserved",
                    result.memory_bytes / 1e9,
                    "GB",
                    most=budget / 1e9,
                    must=True,
                )


def smallest(bench: Bench, shape: str, length: int) -> None:
    import qlora
    from qlora.train.step import optimizer_step

    model = attached(build(shape, bench.device), "dora")
    checkpointing(model, True)
    model.train()
    optimizer = qlora.PagedAdamW(qlora.adapter_parameters(model), lr=1e-4, memory="all")
    batch = random_batch(length, model.config.vocab_size)

    def step() -> None:
        optimizer.zero_grad()
        optimizer_step(model, optimizer, [batch], 1e-4, 1.0)

    step()
    optimizer.zero_grad()
    bench.clean()
    low = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    step()
    high = torch.cuda.max_memory_reserved(bench.device)
    least = smallest_limit(bench, step, 0.9 * low, 1.02 * high)
    wanted = {512: 6.0, 2048: 7.5}.get(length)
    bench.row(f"{shape} dora, {length} tokens, recomputing: smallest limit", least / 1e9, "GB", most=wanted)
    optimizer.close()

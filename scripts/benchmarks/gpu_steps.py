"""Parts of gpu_suite.py: what a user's first minute is like: the first step, and steps of real records.

python scripts/benchmarks/gpu_steps.py DEVICE SMALL BEGAN      what part `start` runs in a process of its own
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from gpu_bench import Bench
from random_models import SHAPES, attached, build, byte_tokenizer, checkpointing, random_batch

HOUSE = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- the first step


def part_start(bench: Bench) -> None:
    """Seconds from the start of a process to the end of its first step, with an empty and with a full cache of
    kernels. Weights are made on the device: what reading a checkpoint takes is not in it.
    """
    with tempfile.TemporaryDirectory() as cache:
        places = {"TRITON_CACHE_DIR": f"{cache}/triton", "XDG_CACHE_HOME": cache}
        for name in ("cold", "warm"):
            with bench.attempt(name):
                found = first_step_of_a_process(bench, places)
                bench.compiling(found["compiling"])
                for what, seconds in found.items():
                    bench.row(f"{name}: {what}", seconds, "s")


def first_step_of_a_process(bench: Bench, places: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, str(bench.device), str(int(bench.small)), repr(time.time())],
        env=os.environ | places,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def first_step(device: torch.device, small: bool, began: float) -> dict[str, float]:
    """Seconds since `began` (time.time()) when each was done, how many Triton compiled, and those of a second step."""
    import qlora
    from qlora.selftest.first_use import check_first_use
    from qlora.train.step import optimizer_step

    bench, found = Bench(device, small, lambda row: None), {}
    bench.listen()

    def note(name: str) -> None:
        bench.wait()
        found[name] = time.time() - began

    note("imported")
    check_first_use(device)
    note("kernels checked")
    shape = "small" if small else "7B"
    model = attached(build(shape, device), "dora").train()
    checkpointing(model, False)
    optimizer = qlora.PagedAdamW(qlora.adapter_parameters(model), lr=1e-4)
    batch = random_batch(64 if small else 512, SHAPES[shape][5])
    note("model ready")
    optimizer_step(model, optimizer, [batch], 1e-4, 1.0)
    note("first step done")
    again = time.time()
    optimizer_step(model, optimizer, [batch], 1e-4, 1.0)
    bench.wait()
    return found | {"a second step": time.time() - again, "compiling": sum(bench.compiled)}


# ---------------------------------------------------------------- real records


def part_records(bench: Bench) -> None:
    """Steps of four records each, whose lengths are those of a real file: tickets and paragraphs of our own docs, a
    token for each byte.
    """
    import qlora

    shape, steps = ("small", 4) if bench.small else ("7B", 20)
    batches = record_batches(steps)
    base = build(shape, bench.device)
    for method in ("lora", "dora"):
        model = attached(base, method).train()
        checkpointing(model, False)
        optimizer = qlora.PagedAdamW(qlora.adapter_parameters(model), lr=1e-4)
        with bench.attempt(f"{shape} {method}"):
            steps_of_records(bench, f"{shape} {method}", model, optimizer, batches)
            asked_of_the_host(bench, f"{shape} {method}", model, optimizer, batches)
        optimizer.close()
        base, model = qlora.detach(model), None


def record_batches(steps: int, size: int = 4) -> list:
    from qlora.data.batch import pack
    from qlora.data.records import read_records
    from qlora.data.tokenize import tokenize

    tickets = read_records(str(HOUSE / "scripts/data/tickets_train.jsonl"))
    texts = [part.strip() for part in (HOUSE / "docs/guide.md").read_text(encoding="utf-8").split("\n\n")]
    dice = random.Random(0)
    dice.shuffle(tickets)
    half = steps * size // 2
    paragraphs = [{"text": text} for text in texts if len(text) > 20]
    made = [tokenize(some, byte_tokenizer()) for some in (tickets[:half], dice.sample(paragraphs, half))]
    examples = [example for dataset in made for example in dataset.examples]
    dice.shuffle(examples)
    return [pack(examples[i : i + size]) for i in range(0, len(examples) - size + 1, size)]


def steps_of_records(bench: Bench, name: str, model, optimizer, batches: list) -> None:
    from qlora.train.memory import PeakMemory
    from qlora.train.step import optimizer_step

    walls, losses, compiled = [], [], []
    with PeakMemory(bench.device) as memory:
        for batch in batches:
            bench.wait()
            began = time.perf_counter()
            losses.append(optimizer_step(model, optimizer, [batch], 1e-4, 1.0)["loss"])
            bench.wait()
            walls.append((time.perf_counter() - began) / batch.tokens)
            compiled.append(len(bench.compiled))
        bench.row(f"{name}: reserved over allocated", memory.peak() / memory.allocated(), "x")
    lengths = sorted(batch.tokens for batch in batches)
    bench.row(f"{name}: steps of {lengths[0]} to {lengths[-1]} tokens", 1 / median(walls[1:]), "tokens/s")
    bench.row(f"{name}: first step", walls[0] * batches[0].tokens, "s")
    bench.row(f"{name}: kernels compiled after the first step", compiled[-1] - compiled[0], "", most=0)
    bench.row(f"{name}: slowest token of later steps over the median one", max(walls[1:]) / median(walls[1:]), "x")
    falls = sum(losses[-3:]) < sum(losses[:3])
    bench.row(f"{name}: last loss", losses[-1], "", met=None if bench.small else falls)


def asked_of_the_host(bench: Bench, name: str, model, optimizer, batches: list) -> None:
    """What a step asks of the host: waits, launches, and milliseconds of a step so short that the card waits."""
    from qlora.train.step import optimizer_step

    def step(batch) -> None:
        optimizer_step(model, optimizer, [batch], 1e-4, 1.0)

    if bench.cuda:
        places = bench.synchronizations(lambda: step(batches[0]))
        bench.row(f"{name}: times that a step waits for the card", len(places), "", most=1)
        for place in sorted(set(places))[:4]:
            bench.row(f"{name}: waits at {Path(place).name}", places.count(place), "times")
    short, walls = random_batch(16, model.config.vocab_size), []
    for _ in range(3 if bench.small else 10):
        bench.wait()
        began = time.perf_counter()
        step(short)
        walls.append(time.perf_counter() - began)
    bench.row(f"{name}: a step of 16 tokens, which the host bounds", median(walls) * 1e3, "ms")
    kernels, _ = bench.kernels(lambda: step(short))
    launches = sum(count for _, _, count in kernels) / model.config.num_hidden_layers
    bench.row(f"{name}: launches of a step for each layer, with head and optimizer", launches, "", most=80)


if __name__ == "__main__":
    print(json.dumps(first_step(torch.device(sys.argv[1]), sys.argv[2] == "1", float(sys.argv[3]))))

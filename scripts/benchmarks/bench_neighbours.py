"""A training step beside other processes, and on cores of which one is slow, in times of what it takes alone.

    python scripts/benchmarks/bench_neighbours.py [--shape 4x256] [--method dora] [--rounds 5] [--isa SET]
                                                  [--json FILE]

    alone   nothing beside
    one     a process that keeps a core busy
    two     two of them
    slow    a process with a real-time priority takes every other 100 microseconds of the last core, as if that core
            had half the speed of the others or less; where the system does not allow that, it is left out

SmolLM2-135M in NF4, rank 16, random tokens, one process, whose threads wait as those of a command do. The four take
turns step by step (A B C D A B C D ...), figures are medians over the rounds. What is fair: beside one process on two
cores three threads share them, so 1.5; with a core at half of its speed 1.33. Linux deals by session where autogroup is
on, so other processes belong to the same session here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

from bench_train import HELD, WARM_UP, our_dtype, ours, random_batch, stepper
from record import about, child, write

BUSY = "while True: pass"
SLOW = """
import os, time
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
print("ready", flush=True)
while True:
    end = time.perf_counter() + 1e-4
    while time.perf_counter() < end:
        pass
    time.sleep(1e-4)
"""
BESIDE = {"alone": [], "one": [BUSY], "two": [BUSY, BUSY], "slow": [SLOW]}
SETTLES = 0.3  # seconds until the scheduler has found places for who is new


@contextmanager
def running(codes: list[str]) -> Iterator[None]:
    """These Python programs run beside."""
    with ExitStack() as stack:
        for code in codes:
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        time.sleep(SETTLES)
        yield


def allows_slow() -> bool:
    """Whether this system gives a process a real-time priority and a core."""
    if not hasattr(os, "sched_setscheduler"):
        return False
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        ready = bool(process.stdout and process.stdout.readline())
        process.kill()
    return ready


def measure(method: str, dtype: str, shape: str, rounds: int, folder: str) -> dict[str, list[float]]:
    """Seconds of the steps beside each, in this process."""
    import qlora

    step, batch = stepper(ours(method, folder, dtype), qlora.PagedAdamW), random_batch(shape)
    for _ in range(WARM_UP):
        step(batch)
    seconds: dict[str, list[float]] = {name: [] for name in BESIDE if name != "slow" or allows_slow()}
    for _ in range(rounds):
        for name, taken in seconds.items():
            with running(BESIDE[name]):
                taken.append(step(batch)[0])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4x256", help="examples x tokens")
    parser.add_argument("--method", choices=("lora", "dora"), default="dora")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", choices=HELD, help="hold all that is measured to this instruction set")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        dtype, folder = arguments.one
        print(json.dumps(measure(arguments.method, dtype, arguments.shape, arguments.rounds, folder)))
        return

    os.environ.update(HELD.get(arguments.isa, {}))  # before anything that reads it is loaded; the child inherits it
    import qlora

    dtype = our_dtype(arguments.isa)
    with tempfile.TemporaryDirectory() as folder:
        qlora.load_base("smollm2-135m", bits=16, dtype="bf16").save_pretrained(folder)
        passed = ("--shape", arguments.shape, "--method", arguments.method, "--rounds", arguments.rounds)
        seconds = child(__file__, "--one", dtype, folder, *passed, quiet=True)
    record = about("torch", "transformers") | {"dtype": dtype, "isa": arguments.isa, "seconds": seconds}
    print(f"{arguments.method}, {arguments.shape}, {dtype}, {record['threads']} threads, {record['backend']}")
    for name in BESIDE:
        if name in seconds:
            taken = median(seconds[name])
            print(f"{name:6} {taken:7.2f} s a step   {taken / median(seconds['alone']):.2f} times")
        else:
            print(f"{name:6} left out: this system does not give a process a real-time priority and a core")
    write(arguments.json, record)


if __name__ == "__main__":
    main()

"""Everything that only a card can show, in one command: is it right, how fast, in how much memory, beside PEFT +
bitsandbytes.

    export PYTHONPATH=.:kernels
    python3 scripts/benchmarks/gpu_suite.py --only first --json scripts/results/gpu.json   what decides, under 8 minutes
    python3 scripts/benchmarks/gpu_suite.py --only rest --json scripts/results/gpu_rest.json
    python3 scripts/benchmarks/gpu_suite.py --sanitize --json scripts/results/gpu_sanitize.json
    python3 scripts/benchmarks/gpu_suite.py --only kernels,train                            some parts
    python3 scripts/benchmarks/gpu_suite.py --device cpu --small      tiny shapes, where there is no card

    doctor      what this machine has, and what it lacks
    selftest    `qlora selftest`, each of its checks a row
    kernels     each operator against the reference, real and odd shapes, float32 and bf16, outputs poisoned with NaN
    train       step time, tokens/s and peak memory of LoRA and DoRA at the shape of a 7B, ours and PEFT + bitsandbytes
    bandwidth   GB/s of the operators beside a copy and bitsandbytes
    start       seconds to the first step in a process of its own, with an empty and a full cache of kernels
    records     20 steps of real records of mixed lengths; waits, launches and host time of a step
    mixed       steps of examples of different lengths beside equal ones, and of new lengths every time
    profile     where the time of a 7B step goes: kernels by time, launches, and how long the card waits for them

    gradients   dx, dA, dB and dm in bf16 beside float64
    attention   shared keys, windows, heads of 256, float32: which kernel ran, how exact it is, how much room it takes
    vocabulary  head and loss of 128k and 256k tokens
    curves      the losses of CPU and card on the same batches in float32, and the adapters that come out
    plan        what `qlora.plan` predicts beside what was measured
    long        one example of 8k, and of 32k tokens
    optimizer   a step with the paged optimizer resident and spilled, and the optimizer's step alone
    cap         the README's lines with a 7B in 24 GB, `--memory 8GB`, and the smallest limit under which a step
                still runs
    train8B     as train, of an 8B
    generate    tokens/s, one at a time

    sanitize    (with --sanitize, a call of its own) compute-sanitizer's four tools over kernels at small shapes

Weights are random and made on the device, so nothing is downloaded and no dense model ever lives. A second process does
the work and tells every figure at once. A part, or a side of it, that fails is said and the rest runs, in a new process
if need be; the JSON is written after each part. Each part has a limit, all limits of a call are under 8 minutes, and
what Triton compiles in the meantime counts against none. Exit code 1 if something is wrong, 2 if there is no card; a
figure that falls short of what is wanted is marked, no more. Peak memory is what tensors took; what torch reserved for
them, and the smallest limit that works, stand beside it. PEFT runs without `prepare_model_for_kbit_training`, which
would cost it time and memory. Unsloth and Axolotl patch models that they load themselves, so they are not among the
peers.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or poisoning `torch.empty` makes cuBLAS refuse to work
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import record
import torch
from gpu_bench import Bench, Row
from gpu_checks import part_doctor, part_sanitize, part_selftest
from gpu_kernels import part_bandwidth, part_kernels
from gpu_memory import part_cap, part_plan
from gpu_shapes import part_attention, part_gradients, part_long, part_vocabulary
from gpu_steps import part_records, part_start
from gpu_training import part_curves, part_generate, part_mixed, part_optimizer, part_profile, part_train, part_train8B

from qlora.models.device import resolve_device


class Part(NamedTuple):
    """What measures, and the seconds that it may take on a fast card, compilation not counted."""

    measure: Callable[[Bench], None]
    seconds: float


FIRST = {  # what decides, in the order in which it runs
    "doctor": Part(part_doctor, 10),
    "selftest": Part(part_selftest, 60),
    "kernels": Part(part_kernels, 80),
    "train": Part(part_train, 100),
    "bandwidth": Part(part_bandwidth, 35),
    "start": Part(part_start, 45),
    "records": Part(part_records, 40),
    "mixed": Part(part_mixed, 45),
    "profile": Part(part_profile, 50),
}
REST = {
    "gradients": Part(part_gradients, 15),
    "attention": Part(part_attention, 30),
    "vocabulary": Part(part_vocabulary, 20),
    "curves": Part(part_curves, 40),
    "plan": Part(part_plan, 50),
    "long": Part(part_long, 50),
    "optimizer": Part(part_optimizer, 45),
    "cap": Part(part_cap, 95),
    "train8B": Part(part_train8B, 90),
    "generate": Part(part_generate, 35),
}
SANITIZE = {"sanitize": Part(part_sanitize, 470)}
PARTS = FIRST | REST | SANITIZE
CALLS = {"first": tuple(FIRST), "rest": tuple(REST)}  # a call each, of less than 8 minutes
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")
STARTING = 60  # seconds until a process begins its first part


def about(device: torch.device, small: bool) -> dict[str, Any]:
    facts = record.about(*PACKAGES, device=device.type)
    facts |= facts.pop("versions") | {"device": f"cpu ({facts.pop('machine')})", "python": platform.python_version()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "device": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_bytes": card.total_memory,
            "cuda": torch.version.cuda,
        }
    return facts | {"small": small}


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
    bench = Bench(
        device, small, lambda row: tell({"row": asdict(row)}), compiling=lambda seconds: tell({"compiling": seconds})
    )
    bench.listen()
    for bench.part in parts:
        bench.compiled.clear()
        tell({"begin": bench.part})
        with bench.attempt("the part as a whole"):
            PARTS[bench.part].measure(bench)
        if bench.compiled:
            bench.row("Triton compiled", sum(bench.compiled), f"s, {len(bench.compiled)} kernels")
        bench.wait()  # raises where the card is past saving: the rest needs another process
        tell({"end": bench.part})


def watched(parts: list[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What `work` tells in a process of its own, which is ended when it takes too long over a part, or dies; then
    "lost" is told.
    """
    command = [
        sys.executable,
        __file__,
        "--work",
        ",".join(parts),
        "--device",
        arguments.device,
        *["--small"] * arguments.small,
    ]
    patience = arguments.patience or (1 if arguments.device.startswith("cuda") else 20)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        lost = None
        try:
            yield from in_time(lines, patience)
        except TimeoutError as error:
            process.kill()
            lost = str(error)
        if process.wait() and lost is None:
            lost = f"exit code {process.returncode}"
        said.seek(0)
        text = said.read().decode(errors="replace")
        if "Traceback" in text or lost:
            sys.stderr.write(text[-6000:])
        if lost:
            yield {"lost": lost}


def in_time(lines: queue.Queue[str | None], patience: float) -> Iterator[dict[str, Any]]:
    """What is told, until None comes; seconds of compilation are added to the limit of the part under way.

    Raises:
        TimeoutError: a part takes longer.
    """
    limit = STARTING * patience
    ends = time.monotonic() + limit
    try:
        while (line := lines.get(timeout=max(0.1, ends - time.monotonic()))) is not None:
            told = json.loads(line)
            if "begin" in told:
                limit = PARTS[told["begin"]].seconds * patience
                ends = time.monotonic() + limit
            if "compiling" in told:
                ends += told["compiling"]
            else:
                yield told
    except queue.Empty:
        raise TimeoutError(f"took more than {limit:g} seconds") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="parts with commas between them, first, or rest; both by default")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer too; without --only, nothing else")
    parser.add_argument("--patience", type=float, help="a factor of each part's limit, for slow cards")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work.split(","), resolve_device(arguments.device), arguments.small)
        return 0
    asked = arguments.only or ("" if arguments.sanitize else "first,rest")
    parts = [part for name in asked.split(",") if name for part in CALLS.get(name, (name,))]
    parts += [name for name in SANITIZE if arguments.sanitize and name not in parts]
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"--only {','.join(unknown)}: no such part. Choose from {', '.join([*PARTS, *CALLS])}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"--device {arguments.device}: torch {torch.__version__} sees no CUDA device. "
            "Run with --device cpu --small, or see: qlora doctor",
            file=sys.stderr,
        )
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
            rows = [asdict(row) for row in found]
            record.write(arguments.json, {"about": facts, "seconds": seconds, "failed": failed, "rows": rows})

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
    said = {"failed": failed, "wrong": wrong, "short": short}
    print(
        f"{sum(seconds.values()):.0f} s; "
        + "; ".join(f"{what}: {', '.join(names) or 'nothing'}" for what, names in said.items())
    )
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())

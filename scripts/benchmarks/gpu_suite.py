"""Everything that only a card can show, in one command: is it right, how fast, in how much memory, beside PEFT +
bitsandbytes.

    export PYTHONPATH=.:kernels
    python3 scripts/benchmarks/gpu_suite.py --only first --json scripts/results/gpu.json   what decides, under 8 minutes
    python3 scripts/benchmarks/gpu_suite.py --only rest --json scripts/results/gpu_rest.json
    python3 scripts/benchmarks/gpu_suite.py --only kernels,train                            some parts
    python3 scripts/benchmarks/gpu_suite.py --device cpu --small      tiny shapes, where there is no card

    kernels     each operator against the reference, real and odd shapes, float32 and bf16, outputs poisoned with NaN
    bandwidth   GB/s of the operators beside a copy and bitsandbytes
    train       step time, tokens/s and peak memory of LoRA and DoRA at the shape of a 7B, ours and PEFT + bitsandbytes
    mixed       steps of examples of different lengths beside equal ones, and of new lengths every time
    profile     where the time of a 7B step goes: kernels by time, launches, and how long the card waits for them
    optimizer   a step with the paged optimizer resident and spilled, and the optimizer's step alone
    curves      the losses of CPU and card on the same batches in float32, and the adapters that come out
    plan        what `qlora.plan` predicts beside what was measured
    cap         the README's lines with a 7B in 24 GB, `--memory 8GB`, and the smallest limit under which a step
                still runs
    train8B     as train, of an 8B
    generate    tokens/s, one at a time

Weights are random and made on the device, so nothing is downloaded and no dense model ever lives. A second process does
the work and tells every figure at once. A part, or a side of it, that fails is said and the rest runs, in a new process
if need be; the JSON is written after each part. Exit code 1 if something is wrong, 2 if there is no card; a figure that
falls short of what is wanted is marked, no more. Peak memory is what tensors took; what torch reserved for them, and
the smallest limit that works, stand beside it. PEFT runs without `prepare_model_for_kbit_training`, which would cost it
time and memory. Unsloth and Axolotl patch models that they load themselves, so they are not among the peers.
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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or poisoning `torch.empty` makes cuBLAS refuse to work
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import record
import torch
from gpu_bench import Bench, Row
from gpu_kernels import part_bandwidth, part_kernels
from gpu_memory import part_cap, part_plan
from gpu_training import part_curves, part_generate, part_mixed, part_optimizer, part_profile, part_train, part_train8B

from qlora.models.device import resolve_device

PARTS = {  # in the order in which they run: cheap and important first
    "kernels": part_kernels,
    "bandwidth": part_bandwidth,
    "train": part_train,
    "mixed": part_mixed,
    "profile": part_profile,
    "optimizer": part_optimizer,
    "curves": part_curves,
    "plan": part_plan,
    "cap": part_cap,
    "train8B": part_train8B,
    "generate": part_generate,
}
CALLS = {"first": tuple(PARTS)[:5], "rest": tuple(PARTS)[5:]}  # a call each, of less than 8 minutes
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")
SECONDS = 150  # that a part may take
COMPILING = 150  # and more for the first, which compiles most of the kernels


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
    bench = Bench(device, small, lambda row: tell({"row": asdict(row)}))
    for bench.part in parts:
        tell({"begin": bench.part})
        with bench.attempt("the part as a whole"):
            PARTS[bench.part](bench)
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
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        ends, lost = time.monotonic() + SECONDS + COMPILING, None
        try:
            while (line := lines.get(timeout=max(0.1, ends - time.monotonic()))) is not None:
                told = json.loads(line)
                if "begin" in told:
                    ends = time.monotonic() + SECONDS + COMPILING * (told["begin"] == parts[0])
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
    parser.add_argument("--only", default=",".join(PARTS), help="parts with commas between them, first, or rest")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work.split(","), resolve_device(arguments.device), arguments.small)
        return 0
    parts = [part for name in arguments.only.split(",") for part in CALLS.get(name, (name,))]
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

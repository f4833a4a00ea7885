"""`qlora finetune --memory X` for X from generous to just possible: is the budget kept, and is it the same run?

    python scripts/benchmarks/measure_budget.py [--data FILE] [--budgets 5] [--json FILE]

SmolLM2-135M, DoRA of rank 16, steps of 16 real records on a CPU. First a run without a budget; then one that is
refused, which names the smallest budget that works; then that budget, and others up to more than the free run takes;
last one below. Each run is the command itself in a process of its own, and this process reads its RssAnon in /proc
every 2 ms from its first moment to its last. Exit code 1 if a run took more than its budget, its losses are off by more
than 2 %, or what a refusal says is not so.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from record import SCRIPTS, about, write

TICKETS = SCRIPTS / "data/tickets_train.jsonl"
OPTIONS = (
    "--model smollm2-135m --method dora --rank 16 --batch-size 16 --max-tokens 256 --warmup 1 "
    "--learning-rate 5e-4 --device cpu --dtype bf16 --adapter-init zero"
)
EVERY = 0.002


def watched(command: list[str]) -> dict:
    """Exit code, what was said, and the highest RssAnon of a command."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaint:
        process = subprocess.Popen(command, stdout=said, stderr=complaint, text=True)
        peak, status = 0, Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(EVERY)
        for file in (said, complaint):
            file.seek(0)
        return {"code": process.returncode, "peak": peak, "said": said.read(), "complaint": complaint.read()}


def finetune(data: str, steps: int, memory: int | None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "qlora",
            "finetune",
            *OPTIONS.split(),
            "--data",
            data,
            "--steps",
            str(steps),
            "--output",
            str(output),
        ]
        run = watched(command + (["--memory", str(memory)] if memory is not None else []))
        if run["code"] == 0:
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            lines = [line for line in lines if line["step"] > 0]  # before them is the gap to 16 bits
            run |= {
                "losses": [line["loss"] for line in lines],
                "tokens_per_second": median(line["tokens_per_second"] for line in lines[1:]),
            }
        return run


def row(memory: int, run: dict, free: dict) -> dict:
    """A run with a budget beside the free one."""
    settings = re.search(r"^memory +\d+ MB: (.*)$", run["said"], re.MULTILINE)
    predicted, measured = re.search(r"predicted (\d+) MB, measured (\d+) MB", run["said"]).groups()
    return {
        "memory": memory,
        "settings": settings[1],
        "peak": run["peak"],
        "predicted": int(predicted) * 10**6,
        "reported": int(measured) * 10**6,
        "losses": run["losses"],
        "losses_off": max(abs(a / b - 1) for a, b in zip(run["losses"], free["losses"], strict=True)),
        "speed": run["tokens_per_second"] / free["tokens_per_second"],
    }


def refused(data: str, steps: int, memory: int) -> tuple[str, int]:
    """The one line that a budget below the possible is answered with, and the budget it names."""
    run = finetune(data, steps, memory)
    (line,) = run["complaint"].splitlines()
    assert run["code"] == 2, run
    return line, int(re.search(r"the smallest that works is (\d+)MB", line)[1]) * 10**6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(TICKETS), help="records for finetune")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--budgets", type=int, default=5, help="how many, the smallest that works and the most generous included"
    )
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    data, steps = arguments.data, arguments.steps
    free = finetune(data, steps, None)
    assert free["code"] == 0, free["complaint"]
    losses = " ".join(f"{x:.4f}" for x in free["losses"])
    print(f"no budget: peak {free['peak'] / 1e6:.0f} MB, {free['tokens_per_second']:.0f} tokens/s, losses {losses}")
    line, least = refused(data, steps, 10**6)
    print(line)
    ratio = 1.35 * free["peak"] / least
    rows, wrong = [], []
    for number in reversed(range(arguments.budgets)):
        memory = int(least * ratio ** (number / max(1, arguments.budgets - 1)))
        run = finetune(data, steps, memory)
        if run["code"] != 0:
            print(f"{memory / 1e6:6.0f} MB  {run['complaint']}")
            wrong.append(memory)
            continue
        rows.append(found := row(memory, run, free))
        wrong += [memory] * (found["peak"] > memory or found["losses_off"] > 0.02)
        print(
            f"{memory / 1e6:6.0f} MB  peak {found['peak'] / 1e6:6.0f} MB  "
            f"predicted {found['predicted'] / 1e6:6.0f} MB  losses off {found['losses_off']:.1e}  "
            f"speed {found['speed']:.2f}  {found['settings']}",
            flush=True,
        )
    below, again = refused(data, steps, int(0.97 * least))
    print(below)
    record = about("torch", "transformers") | {
        "data": Path(data).name,
        "free": {name: free[name] for name in ("peak", "losses", "tokens_per_second")},
        "rows": rows,
        "refusals": [line, below],
        "smallest": [least, again],
    }
    write(arguments.json, record)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""Tokens per second and peak memory of a training step, ours beside PEFT + bitsandbytes.

    python scripts/bench_train.py [--shape 4x256] [--rounds 2] [--steps 5] [--json FILE]

SmolLM2-135M, rank 16, all-linear, bf16, AdamW, no activation checkpointing, the same batches and the same loop. PEFT runs in both
recipes, with `prepare_model_for_kbit_training` and without. Each measurement is a process of its own, and the contestants take
turns (A B C ... A B C ...), so that a machine that slows down slows all of them; figures are medians over all rounds. Peak memory
is RssAnon, the baseline after imports included. The losses of the first step must agree, or it is not the same work.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

SIDES = ("ours", "peft", "peft+prepare")


def measure(side: str, method: str, shape: str, steps: int, folder: str) -> dict:
    """One contestant in this process: seconds of each step but the first, first loss, peak bytes."""
    import torch
    import transformers

    import qlora
    from compare_peft import ALPHA, RANK, theirs
    from qlora.data import Example, collate
    from qlora.train import PeakMemory, optimizer_step

    transformers.utils.logging.disable_progress_bar()
    batch_size, length = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 49000, (batch_size, length), generator=generator).tolist()
    batch = collate([Example(tuple(row), (False,) + (True,) * (length - 1)) for row in ids])
    with PeakMemory(torch.device("cpu")) as memory:
        torch.manual_seed(0)
        if side == "ours":
            model = qlora.attach_adapters(qlora.load_base(folder, bits=4, dtype="bf16"), method=method, rank=RANK, alpha=ALPHA)
        else:
            model = theirs(folder, method, 4, "bf16", side == "peft+prepare", None)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        model.train()
        seconds, losses = [], []
        for step in range(steps + 1):
            started = time.perf_counter()
            losses.append(optimizer_step(model, optimizer, [batch], 1e-4, 1.0, step)["loss"])
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds[1:], "loss": losses[0], "peak": memory.peak(), "tokens": batch.tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4x256", help="examples x tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="measured steps in each process, after one to warm up")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        side, method, folder = arguments.one
        print(json.dumps(measure(side, method, arguments.shape, arguments.steps, folder)))
        return

    import tempfile

    import bitsandbytes
    import peft
    import torch
    import transformers

    import qlora
    from qlora_kernels import ops

    transformers.utils.logging.disable_progress_bar()
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        dense = qlora.load_base("smollm2-135m", bits=16, dtype="bf16")
        dense.save_pretrained(folder)
        del dense
        for _ in range(arguments.rounds):
            for method in ("lora", "dora"):
                for side in SIDES:
                    command = [sys.executable, __file__, "--one", side, method, folder, "--shape", arguments.shape, "--steps", str(arguments.steps)]
                    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
                    result = json.loads(done.stdout.splitlines()[-1])
                    found.setdefault(f"{method} {side}", []).append(result)
                    print(f"{method} {side:13} {result['tokens'] / median(result['seconds']):6.0f} tokens/s  {result['peak'] / 1e9:.2f} GB  loss {result['loss']:.4f}", flush=True)

    rows = {}
    print(f"\n{arguments.shape} tokens, rank 16, all-linear, bf16, {torch.get_num_threads()} threads, {ops.backends()['cpu']}")
    print(f"{'':20}{'tokens/s':>10}{'peak GB':>9}{'ours is':>22}")
    for name, results in found.items():
        method, side = name.split(" ")
        speed = results[0]["tokens"] / median(s for r in results for s in r["seconds"])
        peak = median(r["peak"] for r in results)
        rows[name] = {"tokens_per_second": speed, "peak_bytes": peak, "first_loss": results[0]["loss"]}
        ours = rows[f"{method} ours"]
        ratio = "" if side == "ours" else f"{ours['tokens_per_second'] / speed:.2f}x as fast, {ours['peak_bytes'] / peak:.2f} of it"
        print(f"{name:20}{speed:10.0f}{peak / 1e9:9.2f}   {ratio}")
    print(f"our DoRA runs at {rows['dora ours']['tokens_per_second'] / rows['lora ours']['tokens_per_second']:.2f} of our LoRA")
    losses = [row["first_loss"] for row in rows.values()]
    agree = max(losses) / min(losses) - 1
    print(f"first losses agree to {agree:.2%}" if agree < 0.01 else f"THE LOSSES DISAGREE by {agree:.2%}: this is not the same work")
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        about = {"commit": commit, "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "backend": ops.backends()["cpu"]}
        about |= {m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes)}
        Path(arguments.json).write_text(json.dumps({**about, "shape": arguments.shape, "rows": rows, "runs": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()

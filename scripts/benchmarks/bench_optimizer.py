"""An optimizer step alone: PagedAdamW resident, half spilled and fully spilled, beside torch's and bitsandbytes'
optimizers.

    python scripts/benchmarks/bench_optimizer.py [--shape 135M ...] [--rounds 9] [--folder FOLDER] [--output FILE]
    # whole training steps instead
    python scripts/benchmarks/bench_optimizer.py --shape --training [--learning DATA.jsonl] [--output ...]

Parameters and random gradients of the DoRA adapters (rank 16, all linear layers) of Llama shapes of 135M, 1B and 7B
parameters, and of a full embedding and head (32000 x 1024 each). Every candidate steps once a round on the same
parameters and gradients, round after round (A B A B ...); times are medians, ratios the medians of the ratios within a
round to the resident PagedAdamW. The file is warm after
the first rounds, which do not count: it lies in the page cache, as it does in training while memory allows.

RssAnon is what a process of its own has more after three steps than before the optimizer was made, by budget.

`--training`: a whole step of SmolLM2 (DoRA, rank 16, all-linear, 4 x 256 random tokens, bf16) with resident and with
fully spilled state, in turns on the same model, so that what else the machine does meets both. `--learning`: two runs
of `finetune` on the same batches of real records that differ in --optimizer-state alone, float32 and 8bit; the training
loss is the mean over the last ten steps.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import about, child, write

import qlora
from qlora.optim.pages import state_bytes
from qlora.train.memory import anonymous_memory

RANK = 16
SHAPES = {
    "135M": (576, 1536, 30, 576, 192),
    "1B": (2048, 8192, 16, 2048, 512),
    "7B": (4096, 11008, 32, 4096, 4096),
}  # hidden, mlp, layers, q, kv
WARM = 2


def sizes(shape: str) -> list[tuple[int, ...]]:
    """The shapes of the parameters that are trained."""
    if shape == "embedding":
        return [(32000, 1024)] * 2
    hidden, mlp, layers, q, kv = SHAPES[shape]
    linear = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (mlp, hidden), (mlp, hidden), (hidden, mlp)]
    return [part for out, columns in linear * layers for part in ((RANK, columns), (out, RANK), (out,))]


def parameters(shape: str) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    result = [torch.nn.Parameter(torch.randn(size) * 0.02) for size in sizes(shape)]
    for p in result:
        p.grad = torch.randn_like(p) * 0.01
    return result


def candidates(params: list[torch.nn.Parameter], folder: str) -> dict[str, Callable]:
    """What makes each optimizer."""
    numels = [p.numel() for p in params]
    half = sum(state_bytes(numels)) // 2
    result: dict[str, Callable] = {
        "resident": lambda: qlora.PagedAdamW(params, memory="all"),
        "half spilled": lambda: qlora.PagedAdamW(params, memory=half, folder=folder),
        "spilled": lambda: qlora.PagedAdamW(params, memory="none", folder=folder),
        "8bit resident": lambda: qlora.PagedAdamW(params, memory="all", state="8bit"),
        "8bit spilled": lambda: qlora.PagedAdamW(params, memory="none", state="8bit", folder=folder),
        "torch foreach": lambda: torch.optim.AdamW(params, foreach=True),
        "torch single": lambda: torch.optim.AdamW(params, foreach=False, fused=False),
        "torch fused": lambda: torch.optim.AdamW(params, fused=True),
    }
    import bitsandbytes

    for name in ("AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit"):
        result[f"bitsandbytes {name}"] = functools.partial(getattr(bitsandbytes.optim, name), params)
    return result


def measure(shape: str, rounds: int, folder: str) -> dict:
    params = parameters(shape)
    made, refused = {}, {}
    for name, make in candidates(params, folder).items():
        try:
            optimizer = make()
            optimizer.step()
            made[name] = optimizer
        except Exception as error:  # whatever keeps a peer from running here is told; ours has to run
            if not name.startswith("bitsandbytes"):
                raise
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(WARM + rounds):
        for name, optimizer in made.items():
            began = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - began)
    rows = {}
    for name, all_times in times.items():
        mine, reference = all_times[WARM:], times["resident"][WARM:]
        ratio = statistics.median(a / b for a, b in zip(mine, reference, strict=True))
        rows[name] = {
            "ms": round(statistics.median(mine) * 1e3, 2),
            "least_ms": round(min(mine) * 1e3, 2),
            "ratio": round(ratio, 3),
        }
        if hasattr(made[name], "pager"):
            rows[name] |= {
                "resident": made[name].pager.resident,
                "spilled": made[name].pager.spilled,
                "stalls": made[name].pager.stalls,
            }
    return {
        "tensors": len(params),
        "parameters": sum(p.numel() for p in params),
        "steps": rows,
        "does not run on this device": refused,
    }


def memory(shape: str, share: float, folder: str) -> dict:
    """RssAnon of a budget, in this process."""
    params = parameters(shape)
    budget = int(sum(state_bytes([p.numel() for p in params])) * share)
    gc.collect()
    before = anonymous_memory()
    optimizer = qlora.PagedAdamW(params, memory=budget, folder=folder)
    for _ in range(3):
        optimizer.step()
    gc.collect()
    return {
        "resident": optimizer.pager.resident,
        "spilled": optimizer.pager.spilled,
        "rss_anon": anonymous_memory() - before,
    }


def training(rounds: int, folder: str) -> dict:
    """Whole training steps with resident and with spilled state, in turns (A B, B A, ...); the ratio is the median of
    the pairs'.
    """
    import transformers
    from bench_train import random_batch

    from qlora.layers.attach import adapter_parameters
    from qlora.train.step import optimizer_step

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = qlora.attach_adapters(
        qlora.load_base("smollm2-135m", dtype="bf16", device="cpu"), method="dora", rank=RANK
    ).train()
    params, batch = adapter_parameters(model), random_batch("4x256")
    optimizers = {
        "resident": qlora.PagedAdamW(params, memory="all"),
        "spilled": qlora.PagedAdamW(params, memory="none", folder=folder),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(WARM + rounds):
        for name in sorted(optimizers, reverse=number % 2 == 1):
            began = time.perf_counter()
            optimizer_step(model, optimizers[name], [batch], 1e-4, 1.0)
            times[name].append(time.perf_counter() - began)
    resident, spilled = (times[name][WARM:] for name in ("resident", "spilled"))
    ratios = sorted(a / b for a, b in zip(spilled, resident, strict=True))
    return {
        "pairs": rounds,
        "seconds": {"resident": statistics.median(resident), "spilled": statistics.median(spilled)},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "spilled": optimizers["spilled"].pager.spilled,
    }


def learning(data: str, steps: int, folder: str) -> dict:
    """What float32 and 8-bit state come to on the same batches of real records."""
    found: dict = {"data": Path(data).name, "steps": steps}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for state in ("float32", "8bit"):
            result = qlora.finetune(
                qlora.FinetuneConfig(
                    model="smollm2-135m",
                    data=data,
                    eval_fraction=0.05,
                    output=f"{scratch}/{state}",
                    steps=steps,
                    batch_size=4,
                    learning_rate=5e-4,
                    warmup=5,
                    max_tokens=256,
                    dtype="bf16",
                    device="cpu",
                    optimizer_state=state,
                )
            )
            lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
            losses = [line["loss"] for line in lines if line["step"] > 0]
            found[state] = {
                "first_loss": losses[0],
                "training_loss": statistics.mean(losses[-10:]),
                "held_out_before": result.eval_loss_before,
                "held_out_loss": result.eval_loss_after,
            }
    for name in ("training_loss", "held_out_loss"):
        found[f"{name}_ratio"] = found["8bit"][name] / found["float32"][name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="*", choices=[*SHAPES, "embedding"], default=[*SHAPES, "embedding"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", default=".", help="where the spilled pages lie: on a disk")
    parser.add_argument("--training", action="store_true", help="whole training steps of SmolLM2, resident and spilled")
    parser.add_argument(
        "--learning", metavar="DATA", help="two runs on these records, with float32 and with 8-bit state"
    )
    parser.add_argument("--steps", type=int, default=40, help="of each run of --learning")
    parser.add_argument("--output", help="write the figures here, as JSON, over those of the same kind")
    parser.add_argument("--memory", nargs=2, metavar=("SHAPE", "SHARE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(memory(arguments.memory[0], float(arguments.memory[1]), arguments.folder)))
        return
    facts = about("torch", "bitsandbytes")
    commit = facts.pop("commit")  # of each part: what is not measured now stays in the file
    result = facts | {"shapes": {}}
    for shape in arguments.shape:
        found = {"commit": commit, **measure(shape, arguments.rounds, arguments.folder)}
        gc.collect()
        found["memory"] = {}
        for share in (1.0, 0.1, 0.0):
            row = child(__file__, "--folder", arguments.folder, "--memory", shape, share)
            found["memory"][f"{share:.0%}"] = row
        result["shapes"][shape] = found
        print(f"{shape}: {found['parameters']:,} parameters in {found['tensors']} tensors")
        for name, row in found["steps"].items():
            print(f"  {name:28} {row['ms']:8.1f} ms  {row['ratio']:5.2f}")
        for name, why in found["does not run on this device"].items():
            print(f"  {name:28} {why}")
        for share, row in found["memory"].items():
            resident, spilled, anonymous = (row[name] / 1e6 for name in ("resident", "spilled", "rss_anon"))
            print(
                f"  budget {share:>4}: {resident:7.1f} MB resident, {spilled:7.1f} MB spilled, "
                f"RssAnon {anonymous:7.1f} MB"
            )
    if arguments.training:
        result["training"] = found = {"commit": commit, **training(arguments.rounds, arguments.folder)}
        print(
            f"training step: {found['seconds']['resident']:.3f} s resident, spilled {found['ratio']:.3f} of it "
            f"(of {found['pairs']} pairs the median)"
        )
    if arguments.learning:
        result["learning"] = found = {
            "commit": commit,
            **learning(arguments.learning, arguments.steps, arguments.folder),
        }
        for name in ("training_loss", "held_out_loss"):
            full, small, ratio = found["float32"][name], found["8bit"][name], found[f"{name}_ratio"]
            print(f"{name}: float32 {full:.4f}, 8bit {small:.4f}, {ratio - 1:+.2%}")
    if arguments.output:
        path = Path(arguments.output)
        if path.exists():  # what was not measured now stays
            before = json.loads(path.read_text())
            result = {**before, **result, "shapes": {**before["shapes"], **result["shapes"]}}
        write(path, result)


if __name__ == "__main__":
    main()

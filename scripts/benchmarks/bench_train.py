"""Tokens per second and peak memory of a training step, ours beside PEFT + bitsandbytes; and steps of models that fill
a laptop.

    python scripts/benchmarks/bench_train.py [--shape 4x256 8x512] [--data FILE] [--rounds 2] [--steps 4] [--large]
                                             [--dtype auto|bf16|fp32|int16]
                                             [--isa avx512|avx_vnni|avx2|portable] [--json FILE]

SmolLM2-135M, rank 16, all-linear, AdamW (ours: PagedAdamW, the default of `finetune`; PEFT: torch's), no activation
checkpointing, the same batches and the same loop. Ours runs in what `finetune --dtype auto` would choose, or `--dtype`
(int16: float32 whose products are of 16-bit integers, as `auto` is with AVX-512 VNNI or AVX2, and without bf16);
PEFT in both recipes, with `prepare_model_for_kbit_training` and without, each in bf16 and in fp32 in the first round
and in the faster of the two from then on: ours is held beside that. (In fp32 alone where torch has no product of bf16
but a plain loop, which takes minutes a step: a CPU with AVX2 alone.) Each measurement is a process of its own, and the
contestants take turns (A B C ... A B C ...), so that a machine that slows down slows all of them; figures are medians
over all rounds. Peak memory is RssAnon, the baseline after imports included. The losses of the first step must agree,
or it is not the same work.

The ceiling is a process too: torch's product of dense matrices of the dtype, on every product of the model's own linear
layers and head, forward and backward, and nothing else. Our tokens/s are given as a part of what it would allow. An
adapter's products, attention and all between count as nothing there, so it is not to be reached.

`--isa` measures as if on a processor that has no more than that: our kernels, torch's, MKL's and oneDNN's are held to
it (bitsandbytes has no such switch), and "auto" is fp32 or int16 then, as it is where nothing multiplies bf16.

What our DoRA costs beside our LoRA is a few percent, less than processes differ among themselves. So a last process
holds both models and steps them in turns; the ratio is the median over the pairs of steps.

A shape is examples x tokens, all of one length. `--data` adds batches of 4 real records, whose lengths differ (tokens
are counted without padding). `--large` adds a DoRA step of a 1B and of a 7B model (random NF4 weights; checkpointed
activations for 7B).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from record import about, child, write

SIDES = ("peft", "peft+prepare")
# What holds a process to an instruction set: ours, torch's own loops, MKL's and oneDNN's products.
HELD = {
    "avx512": {
        "QLORA_CPU_ISA": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
    },
    "avx_vnni": {
        "QLORA_CPU_ISA": "avx_vnni",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
    },
    "avx2": {
        "QLORA_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "portable": {"QLORA_CPU_ISA": "portable"},
}
WARM_UP = 2  # steps of a process that are not counted: they touch memory for the first time
PAIRS = 20  # steps of our LoRA and our DoRA in turns; half as many where a batch has 2048 tokens or more
LARGE = (("1B", "4x256", False), ("7B", "1x128", True))  # model, batch, checkpointing


def random_batch(shape: str):
    """One batch of random tokens, all but the first of each example targets."""
    import random_models

    count, length = map(int, shape.split("x"))
    return random_models.random_batch(length, 30000, count, lowest=5)


def real_batches(path: str, count: int) -> list:
    import qlora
    from qlora.data.batch import pack
    from qlora.data.records import read_records
    from qlora.data.tokenize import tokenize

    records = read_records(path)[: 4 * count]
    examples = tokenize(records, qlora.load_tokenizer("smollm2-135m"), max_tokens=512).examples
    return [pack(examples[4 * i : 4 * i + 4]) for i in range(count)]


def stepper(model, adamw) -> Callable:
    """Takes an optimizer step on a batch: seconds and loss."""
    from qlora.train.step import optimizer_step

    optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step(batch) -> tuple[float, float]:
        started = time.perf_counter()
        loss = optimizer_step(model, optimizer, [batch], 1e-4, 1.0)["loss"]
        return time.perf_counter() - started, loss

    return step


def take_steps(model, batches: list, adamw) -> dict:
    """An optimizer step a batch; first loss, seconds and tokens of each but the first ones, which warm up."""
    step = stepper(model, adamw)
    seconds, losses = zip(*(step(batch) for batch in batches), strict=True)
    return {"seconds": seconds[WARM_UP:], "loss": losses[0], "tokens": [batch.tokens for batch in batches[WARM_UP:]]}


def batches_of(work: str, count: int) -> list:
    return real_batches(work, count) if Path(work).exists() else [random_batch(work)] * count


def ours(method: str, folder: str, dtype: str):
    import torch
    from compare_peft import ALPHA, RANK

    import qlora
    from qlora.cli import bound_kernel_caches
    from qlora.models.device import DTYPES
    from qlora_kernels import backends

    bound_kernel_caches()  # as every command does
    if dtype == "int16" or backends.is_widened(torch.empty(0, dtype=DTYPES[dtype])):
        torch.set_float32_matmul_precision("high")  # as models.device.products_of
        dtype = "fp32" if dtype == "int16" else dtype
    torch.manual_seed(0)
    return qlora.attach_adapters(qlora.load_base(folder, bits=4, dtype=dtype), method=method, rank=RANK, alpha=ALPHA)


def our_dtype(isa: str | None) -> str:
    """What `finetune --dtype auto` takes, on a processor that has no more than `isa` (None: on this one)."""
    import torch

    from qlora.models.device import resolve_dtype
    from qlora_kernels import backends

    dtype = "fp32" if isa else resolve_dtype("auto", torch.device("cpu"))
    return "int16" if dtype == "fp32" and backends.multiplies_by_integers() else dtype


def measure(method: str, side: str, dtype: str, work: str, steps: int, folder: str) -> dict:
    """One contestant in this process."""
    import torch
    from compare_peft import theirs

    import qlora
    from qlora.train.memory import PeakMemory

    batches = batches_of(work, WARM_UP + steps)
    with PeakMemory(torch.device("cpu")) as memory:
        torch.manual_seed(0)
        model = (
            ours(method, folder, dtype)
            if side == "ours"
            else theirs(folder, method, 4, dtype, side == "peft+prepare", None)
        )
        return take_steps(model, batches, qlora.PagedAdamW if side == "ours" else torch.optim.AdamW) | {
            "peak": memory.peak(),
            "model": type(model).__name__,
        }


def products(folder: str) -> dict[tuple[int, int], int]:
    """How many weights [out, in] of each shape multiply every token: linear layers and head."""
    from collections import Counter

    import torch
    import transformers

    from qlora.layers.linear import frozen_weight, linear_names

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    layers = [*map(model.get_submodule, linear_names(model)), model.get_output_embeddings()]
    return dict(Counter(frozen_weight(layer).shape for layer in layers))


def measure_ceiling(dtype: str, work: str, folder: str, repeats: int = 7) -> dict:
    """Seconds of torch's products of dense matrices for a step on a batch, each the median of its repeats; and
    GFLOP/s.
    """
    import torch

    from qlora.models.device import DTYPES

    tokens = batches_of(work, 1)[0].tokens
    seconds = operations = 0.0
    for (out, columns), count in products(folder).items():
        x, W = torch.randn(tokens, columns).to(DTYPES[dtype]), torch.randn(out, columns).to(DTYPES[dtype])
        y, dx = x.new_empty(tokens, out), torch.empty_like(x)
        for left, right, to in ((x, W.t(), y), (y, W, dx)):
            taken = []
            for _ in range(1 + repeats):
                started = time.perf_counter()
                torch.mm(left, right, out=to)
                taken.append(time.perf_counter() - started)
            seconds += count * median(taken[1:])
            operations += 2.0 * count * tokens * out * columns
    return {"seconds": seconds, "tokens": tokens, "gflops": operations / seconds / 1e9}


def measure_pair(work: str, folder: str, dtype: str) -> dict[str, list[float]]:
    """Seconds of our LoRA's and our DoRA's steps, in turns in this process."""
    import qlora

    batches = batches_of(work, WARM_UP + PAIRS)
    batches = batches[: WARM_UP + max(PAIRS // 2, min(PAIRS, PAIRS * 1024 // batches[0].tokens))]
    steps = {method: stepper(ours(method, folder, dtype), qlora.PagedAdamW) for method in ("lora", "dora")}
    seconds = [{method: step(batch)[0] for method, step in steps.items()} for batch in batches]
    return {method: [pair[method] for pair in seconds[WARM_UP:]] for method in steps}


def measure_large(shape: str, work: str, checkpointing: bool) -> dict:
    """DoRA steps of a large model of random weights in this process."""
    import torch
    from random_models import build

    import qlora
    from qlora.train.memory import PeakMemory
    from qlora.train.step import checkpoint_activations

    with PeakMemory(torch.device("cpu")) as memory:
        model = qlora.attach_adapters(build(shape), method="dora", rank=16, alpha=32)
        if checkpointing:
            checkpoint_activations(model)
        return take_steps(model, [random_batch(work)] * (WARM_UP + 2), qlora.PagedAdamW) | {"peak": memory.peak()}


def speed(results: list[dict]) -> float:
    return median(tokens / seconds for r in results for tokens, seconds in zip(r["tokens"], r["seconds"], strict=True))


def their_dtypes() -> tuple[str, ...]:
    import torch

    return ("bf16", "fp32") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("fp32",)


def take_turns(work: str, folder: str, dtype: str, rounds: int, steps: int) -> dict[str, list[dict]]:
    """The results of each contestant, "METHOD SIDE DTYPE": all in turns, PEFT from the second round on in its faster
    dtype alone.
    """
    found: dict[str, list[dict]] = {}
    for turn in range(rounds):
        for method in ("lora", "dora"):
            names = [f"{method} ours {dtype}"]
            for side in SIDES:
                both = [f"{method} {side} {theirs}" for theirs in their_dtypes()]
                names += both if turn == 0 else [best for best in [fastest(found, both)] if best]
            for name in names:
                arguments = (*name.split(" "), work, "--folder", folder, "--steps", steps)
                try:
                    result = child(__file__, "--one", *arguments, quiet=True)
                except subprocess.CalledProcessError as error:  # -9: this machine has not enough memory for it
                    print(f"  {name:23} did not finish, exit code {error.returncode}", flush=True)
                    continue
                found.setdefault(name, []).append(result)
                figures = f"{speed([result]):6.0f} tokens/s  {result['peak'] / 1e9:.2f} GB  loss {result['loss']:.4f}"
                print(f"  {name:23} {figures}", flush=True)
    return found


def fastest(found: dict[str, list[dict]], names: list[str]) -> str | None:
    return max((name for name in names if name in found), key=lambda name: speed(found[name]), default=None)


def compare(work: str, folder: str, dtype: str, rounds: int, steps: int) -> dict:
    """All contestants in turns on one kind of batch; prints a table and returns its rows."""
    found = take_turns(work, folder, dtype, rounds, steps)
    multiplied = "fp32" if dtype not in their_dtypes() else dtype
    ceiling = child(__file__, "--ceiling", multiplied, work, "--folder", folder, quiet=True)
    allowed = ceiling["tokens"] / ceiling["seconds"]
    rows: dict[str, dict] = {}
    print(f"\n{Path(work).name:23}{'tokens/s':>10}{'peak GB':>9}{'ours is':>22}")
    for name in sorted(found, key=lambda name: name.split(" ")[1] != "ours"):
        method, side, _ = name.split(" ")
        results = found[name]
        rows[name] = {
            "tokens_per_second": speed(results),
            "peak_bytes": median(r["peak"] for r in results),
            "first_loss": results[0]["loss"],
        }
        ours = rows[f"{method} ours {dtype}"]
        if side == "ours":
            rows[name]["of_the_ceiling"] = rows[name]["tokens_per_second"] / allowed
            ratio = f"{rows[name]['of_the_ceiling']:.2f} of the ceiling"
        else:
            rows[name] |= {
                "ours_is_as_fast": ours["tokens_per_second"] / rows[name]["tokens_per_second"],
                "ours_takes": ours["peak_bytes"] / rows[name]["peak_bytes"],
                "best_dtype": name == fastest(found, [f"{method} {side} {theirs}" for theirs in their_dtypes()]),
            }
            ratio = f"{rows[name]['ours_is_as_fast']:.2f}x as fast, {rows[name]['ours_takes']:.2f} of it"
            ratio += "" if rows[name]["best_dtype"] else " (not its best dtype)"
        print(f"{name:23}{rows[name]['tokens_per_second']:10.0f}{rows[name]['peak_bytes'] / 1e9:9.2f}   {ratio}")
    print(
        f"{'ceiling ' + multiplied:23}{allowed:10.0f}{'':9}   torch's products alone, {ceiling['gflops']:.0f} GFLOP/s"
    )
    lora, dora = (rows[f"{method} ours {dtype}"]["tokens_per_second"] for method in ("lora", "dora"))
    pair = child(__file__, "--pair", work, dtype, "--folder", folder, quiet=True)
    in_turns = median(lora / dora for lora, dora in zip(pair["lora"], pair["dora"], strict=True))
    print(
        f"our DoRA runs at {in_turns:.3f} of our LoRA: {len(pair['lora'])} steps of each in turns in one process "
        f"({dora / lora:.2f} by the processes above)"
    )
    losses = [row["first_loss"] for row in rows.values()]
    agree = max(losses) / min(losses) - 1
    print(
        f"first losses agree to {agree:.2%}\n"
        if agree < 0.01
        else f"THE LOSSES DISAGREE by {agree:.2%}: this is not the same work\n",
        flush=True,
    )
    ratios = {
        "our_dora_beside_our_lora_in_turns": in_turns,
        "our_dora_beside_our_lora_in_separate_processes": dora / lora,
    }
    return {"rows": rows, "ceiling": ceiling, "losses_agree_to": agree, **ratios, "runs": found, "in_turns": pair}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="*", default=["4x256", "8x512"], help="examples x tokens")
    parser.add_argument(
        "--data", help="records whose batches of 4 are one more kind of work, such as GSM8K's train.jsonl"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=4, help=f"measured steps in each process, after {WARM_UP} to warm up"
    )
    parser.add_argument("--large", action="store_true", help="also DoRA steps of a 1B and a 7B model (about 5 minutes)")
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32", "int16"), default="auto", help="of ours; PEFT runs in both"
    )
    parser.add_argument("--isa", choices=HELD, help="hold all that is measured to this instruction set")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--one-large", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--ceiling", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--pair", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.steps, arguments.folder)))
        return
    if arguments.pair:
        work, dtype = arguments.pair
        print(json.dumps(measure_pair(work, arguments.folder, dtype)))
        return
    if arguments.ceiling:
        print(json.dumps(measure_ceiling(*arguments.ceiling, arguments.folder)))
        return
    if arguments.one_large:
        shape, work, checkpointing = arguments.one_large
        print(json.dumps(measure_large(shape, work, checkpointing == "True")))
        return

    os.environ.update(HELD.get(arguments.isa, {}))  # before anything that reads it is loaded; children inherit it
    import tempfile

    import transformers

    import qlora

    dtype = our_dtype(arguments.isa) if arguments.dtype == "auto" else arguments.dtype
    transformers.utils.logging.disable_progress_bar()
    record = about("torch", "transformers", "peft", "bitsandbytes") | {"dtype": dtype, "isa": arguments.isa}
    print(f"rank 16, all-linear, {dtype}, {record['threads']} threads, {record['backend']}\n")
    with tempfile.TemporaryDirectory() as folder:
        dense = qlora.load_base("smollm2-135m", bits=16, dtype="bf16")
        dense.save_pretrained(folder)
        del dense
        for work in [*arguments.shape, *([arguments.data] if arguments.data else [])]:
            record[Path(work).name] = compare(work, folder, dtype, arguments.rounds, arguments.steps)
            write(arguments.json, record)
    if arguments.large:
        record["large"] = {}
        for shape, work, checkpointing in LARGE:
            result = child(__file__, "--one-large", shape, work, checkpointing, quiet=True)
            record["large"][shape] = {"batch": work, "checkpointing": checkpointing, **result}
            how = ", activations recomputed" if checkpointing else ""
            seconds, peak = median(result["seconds"]), result["peak"] / 1e9
            print(f"{shape} DoRA {work}{how}: {seconds:.1f} s a step, peak {peak:.2f} GB", flush=True)
    write(arguments.json, record)


if __name__ == "__main__":
    main()

"""Peak anonymous memory of loading and of merging, beside what docs/memory.md promises; and how fast loading is.

    python scripts/benchmarks/measure_memory.py [--parameters 1B] [--model FOLDER] [--json FILE]

    loading   the quantized model + about two of its largest tensors
    merging   about two tensors
    speed     loading and quantizing beside reading the same tensors and converting them to float32 with plain torch,
              files cached

Without --model it writes a Llama of random bf16 weights to a temporary folder (about 2.5 GB for 1B, tied embeddings as
in Llama 3.2 1B). Each measurement runs in a process of its own: RssAnon is sampled every few milliseconds by a thread,
the baseline is read after the imports. RssAnon leaves out pages mapped from the checkpoint's files, which the system
can drop at any time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from record import about, child, write


def write_random_llama(folder: Path, shape: str) -> None:
    """A checkpoint of random bf16 weights in shards of about 1 GB, written without holding the model."""
    import torch
    from random_models import llama_config
    from transformers import AutoModelForCausalLM

    from qlora.export.shards import ShardWriter

    config = llama_config(shape)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    writer = ShardWriter(folder, 10**9)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in skeleton.named_parameters():
        if "norm" in name:
            writer.add(name, torch.ones(parameter.shape, dtype=torch.bfloat16))
        else:
            writer.add(name, torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
    writer.close()
    config.save_pretrained(folder)
    from qlora.models.source import load_tokenizer

    load_tokenizer("smollm2-135m").save_pretrained(folder)


def measure(task: str, folder: str, adapter: str, output: str) -> dict:
    """Run one task in this process and return its figures in bytes and seconds."""
    import torch
    from safetensors import safe_open

    from qlora.train.memory import PeakMemory, anonymous_memory

    torch.zeros(1)  # the first tensor starts the thread pool

    import qlora
    from qlora.cli import bound_kernel_caches

    bound_kernel_caches()  # as every command does
    if task == "read":
        started = time.perf_counter()
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    file.get_tensor(name).float()
        return {"task": task, "seconds": round(time.perf_counter() - started, 2)}
    baseline = anonymous_memory()
    started = time.perf_counter()
    with PeakMemory(torch.device("cpu")) as memory:
        if task == "merge":
            qlora.merge(adapter, output)
            held = 0
        else:
            model = qlora.load_base(folder, bits=4, dtype="bf16")
            seconds = time.perf_counter() - started
            held = sum(
                t.numel() * t.element_size()
                for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values()
            )
            peak = memory.peak()
            largest = max(p.numel() * p.element_size() for p in model.parameters())
            if task == "adapter":
                qlora.attach_adapters(model, method="dora", rank=16)
                qlora.save_adapter(model, adapter, qlora.load_tokenizer(folder))
            return {
                "task": task,
                "baseline": baseline,
                "peak_over_baseline": peak - baseline,
                "model": held,
                "largest_tensor": largest,
                "seconds": round(seconds, 2),
            }
        seconds = time.perf_counter() - started
        peak = memory.peak()
    return {"task": task, "baseline": baseline, "peak_over_baseline": peak - baseline, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", choices=("135M", "1B", "3B"), default="1B")
    parser.add_argument("--model", help="measure this model instead of random weights")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--task", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(measure(*arguments.task)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or str(Path(scratch) / "model")
        if not arguments.model:
            write_random_llama(Path(folder), arguments.parameters)
        rows = []
        for task in ("read", "load", "read", "load", "adapter", "merge"):
            rows.append(child(__file__, "--task", task, folder, f"{scratch}/adapter", f"{scratch}/merged"))
        _, _, read, load, _, merge = rows  # the first two brought the files into the page cache
        for row in (load, merge):
            peak, baseline = row["peak_over_baseline"] / 1e6, row["baseline"] / 1e6
            print(f"{row['task']:6} peak {peak:8.0f} MB over a baseline of {baseline:.0f} MB, {row['seconds']} s")
        print(
            f"loading and quantizing: {load['seconds']} s; reading and converting to float32: {read['seconds']} s, "
            f"so {read['seconds'] / load['seconds']:.2f} of its speed"
        )
        model, largest = load["model"] / 1e6, load["largest_tensor"] / 1e6
        print(f"loading: {model:.0f} MB of model + 2 x {largest:.0f} MB = {model + 2 * largest:.0f} MB allowed")
        print(f"merging: 2 x {largest:.0f} MB = {2 * largest:.0f} MB allowed")
        write(arguments.json, about("torch", "transformers") | {"rows": rows})


if __name__ == "__main__":
    main()

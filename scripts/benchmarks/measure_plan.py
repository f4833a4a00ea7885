"""Predicted against measured peak memory on a CPU, over a grid of settings; each run is a process of its own.

    python scripts/benchmarks/measure_plan.py [--quick] [--json FILE]

The models are SmolLM2-135M from its GGUF file, the same from a safetensors file in bf16 (what is used as it is stored
stays mapped from there and is no anonymous memory), both in what `--dtype auto` takes here, and a Llama of the 1B shape
with random NF4 weights, in bf16. Three optimizer steps, after chosen codes and an error start where a row has them, on
random tokens of the largest batch the settings allow. glibc is told to keep no freed memory (a run with a budget gives
it back only where it must, `measure_budget.py`); the native kernels keep that of their results, as in any run. RssAnon
is read every 3 ms. Both figures are above the process' baseline after its imports, which is printed too. Exit code 1 if
one is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile

from record import about, child, write

FILE = "smollm2-135m, safetensors"
TOKENS = 1024  # that codes and an error start are made from
KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "131072"}
FIELDS = (
    "model",
    "method",
    "rank",
    "batch_size",
    "max_tokens",
    "gradient_checkpointing",
    "optimizer_memory",
    "accumulate",
    "bits",
    "adapter_init",
    "codes",
)
QUICK = [
    ("smollm2-135m", "dora", 16, 2, 128, False, "all", 1, 4, "zero", "nearest"),
    (FILE, "lora", 64, 1, 128, True, "none", 2, 4, "zero", "nearest"),
    ("smollm2-135m", "dora", 16, 2, 256, True, "all", 1, 4, "error", "nearest"),
]
GRID = [
    *QUICK,
    ("smollm2-135m", "lora", 16, 2, 256, True, "all", 1, 4, "error", "gptq"),
    (FILE, "dora", 16, 2, 128, False, "all", 1, 16, "zero", "nearest"),
    ("smollm2-135m", "dora", 16, 4, 256, False, "all", 1, 4, "zero", "nearest"),
    ("smollm2-135m", "dora", 16, 4, 256, True, "all", 1, 4, "zero", "nearest"),
    ("smollm2-135m", "lora", 64, 4, 256, False, "20MB", 2, 4, "zero", "nearest"),
    ("smollm2-135m", "lora", 16, 1, 1024, False, "all", 1, 4, "zero", "nearest"),
    ("1B", "dora", 16, 1, 128, False, "all", 1, 4, "zero", "nearest"),
    ("1B", "lora", 64, 1, 128, True, "none", 1, 4, "zero", "nearest"),
    ("1B", "dora", 16, 2, 128, True, "50MB", 2, 4, "zero", "nearest"),
]


def measure(row: dict) -> dict:
    """One run in this process."""
    import torch
    import transformers
    from random_models import build as random_nf4_llama
    from random_models import llama_config, random_batch

    import qlora
    from qlora.calibrate.codes import choose_codes_of
    from qlora.calibrate.gap import measure_gap
    from qlora.calibrate.moments import forward_tokens, rectangles
    from qlora.calibrate.start import start_by_error
    from qlora.cli import bound_kernel_caches
    from qlora.config.commands import FinetuneConfig
    from qlora.data.batch import Example
    from qlora.models.device import resolve_dtype
    from qlora.models.originals import originals
    from qlora.plan.fit import peak_batches, predict, requested
    from qlora.plan.meta import MetaRun
    from qlora.run.inputs import find_model
    from qlora.run.optimizer import adapter_optimizer
    from qlora.train.memory import PeakMemory, anonymous_memory
    from qlora.train.step import checkpoint_activations, optimizer_step

    bound_kernel_caches()  # as every command does
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.zeros(1)  # the first tensor starts the thread pool
    dtype = "bf16" if row["model"] == "1B" else resolve_dtype("auto", torch.device("cpu"))
    baseline = anonymous_memory()
    with tempfile.TemporaryDirectory() as folder, PeakMemory(torch.device("cpu"), every=0.003) as memory:
        if row["model"] == "1B":
            model = random_nf4_llama("1B")
            llama_config("1B").save_pretrained(folder)
        else:
            name = row["file"] or row["model"]
            model = qlora.load_base(name, bits=row["bits"], dtype=dtype, device="cpu")
        name = folder if row["model"] == "1B" else name
        config = FinetuneConfig(
            **{field: row[field] for field in FIELDS} | {"model": name},
            data="-",
            output=folder,
            dtype=dtype,
            device="cpu",
            calibrate=f"-:{TOKENS}" if row["adapter_init"] == "error" else None,
        )
        rows = torch.randint(5, 49000, (TOKENS // config.max_tokens, config.max_tokens)).tolist()
        texts = [Example(tuple(ids), (False,) + (True,) * (len(ids) - 1)) for ids in rows]
        if config.codes == "gptq":
            text = rectangles(texts, TOKENS, 0, config.batch_size)
            choose_codes_of(model.eval(), originals(find_model(config)), text)
        torch.manual_seed(0)
        qlora.attach_adapters(model, method=config.method, rank=config.rank)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        if config.adapter_init == "error":
            weights = originals(find_model(config))
            fill = forward_tokens(config.batch_size, config.max_tokens)  # as `run.start` has it
            start_by_error(model.eval(), weights, rectangles(texts, TOKENS, 0, config.batch_size, fill))
            measure_gap(model, weights, texts[:4], config.batch_size, fill)
        batch = random_batch(config.max_tokens, 49000, config.batch_size, lowest=5)
        optimizer = adapter_optimizer(model, config.optimizer(), folder)
        model.train()
        for step in range(3):
            optimizer_step(model, optimizer, [batch] * config.accumulate, 1e-4, 1.0, step)
        measured = memory.peak() - baseline
        run = MetaRun(config, find_model(config, weights=False))
        if row["model"] == "1B":
            run.still.mapped = 0  # it came from no file
        plan = predict(run, requested(config), peak_batches(config))
        parameters = [p for p in model.parameters() if p.requires_grad]
        exact = {
            "adapters": sum(p.numel() * 4 for p in parameters),
            "gradients": sum(p.grad.numel() * 4 for p in parameters),
            "optimizer": optimizer.pager.resident,
            "model": sum(
                t.numel() * t.element_size()
                for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values()
            )
            - sum(p.numel() * 4 for p in parameters),
        }
        optimizer.close()
    found = {**plan.parts, "model": run.still.model}
    assert {name: found[name] for name in exact} == exact, (found, exact)
    return {
        **row,
        "baseline": baseline,
        "predicted": plan.training if row["model"] == "1B" else plan.peak,
        "measured": measured,
        "parts": plan.parts,
    }


def write_file(folder: str) -> None:
    """SmolLM2 in bf16 as safetensors."""
    import qlora

    model = qlora.load_base("smollm2-135m", bits=16, dtype="bf16", device="cpu")
    model.save_pretrained(folder)


def run(row: tuple, folder: str) -> dict:
    one = dict(zip(FIELDS, row, strict=True)) | {"file": folder if row[0] == FILE else None}
    return child(__file__, "--one", json.dumps(one), environment=KEEP_NOTHING)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three small runs")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
        return 0
    rows = []
    scratch = tempfile.TemporaryDirectory()
    write_file(scratch.name)
    for row in QUICK if arguments.quick else GRID:
        found = run(row, scratch.name)
        rows.append({name: value for name, value in found.items() if name != "file"})
        off = found["predicted"] / found["measured"] - 1
        settings = " ".join(str(found[name]) for name in FIELDS)
        predicted, measured = found["predicted"] / 1e6, found["measured"] / 1e6
        print(f"{settings:52} predicted {predicted:7.0f} MB  measured {measured:7.0f} MB  {off:+6.1%}", flush=True)
        write(arguments.json, about("torch", "transformers") | {"rows": rows})  # after each row
    return int(any(abs(row["predicted"] / row["measured"] - 1) > 0.1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())

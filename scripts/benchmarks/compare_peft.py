"""Does it learn as PEFT + bitsandbytes does? Held-out loss before and after, the same batches and the same start.

    python scripts/benchmarks/compare_peft.py --data gsm8k_train.jsonl --eval-data gsm8k_test.jsonl [--full]
                                              [--json FILE]

Ours and PEFT's, LoRA and DoRA, on NF4 and on the 16-bit weights: batch 4, rank 16, all-linear, AdamW, 30 steps, 2 seeds
(60 steps, 3 seeds with --full). Both start from the same A, see the same batches in the same order and are measured by
the same loss; each quantizes the 16-bit checkpoint itself. PEFT runs as its users run it, without
`prepare_model_for_kbit_training` unless --prepare is given (that keeps embeddings, norms and head in float32).
bitsandbytes' repacked CPU product is switched off: after the first evaluation it computes something else.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from statistics import mean

import peft
import torch
import transformers
from record import about, write

import qlora
from qlora.data.batch import pack
from qlora.data.order import step_indices
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.evaluate import evaluate
from qlora.train.step import learning_rate, optimizer_step

RANK, ALPHA, BATCH, RATE, WARMUP = 16, 32.0, 4, 5e-4, 4


def ours(folder: str, method: str, bits: int, dtype: str):
    model = qlora.load_base(folder, bits=bits, dtype=dtype)
    return qlora.attach_adapters(model, method=method, rank=RANK, alpha=ALPHA)


def theirs(folder: str, method: str, bits: int, dtype: str, prepare: bool, start: dict[str, torch.Tensor] | None):
    """PEFT's model on the same checkpoint; its A are those of `start`, by module, where given."""
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch_dtype
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch_dtype, quantization_config=quantization if bits == 4 else None
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if bits == 4 and prepare:
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name and start is not None:
                parameter.copy_(start[name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")])
    return model


def run(model, examples, held_out, steps: int, seed: int) -> dict[str, float]:
    """Train and measure; the same loop, loss and optimizer for both sides."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    before = evaluate(model, held_out, 8).loss
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        batch = pack([examples[i] for i in step_indices(len(examples), BATCH, seed, step)])
        optimizer_step(model, optimizer, [batch], learning_rate(step, steps, RATE, WARMUP, "cosine"), 1.0, step)
    seconds = time.perf_counter() - started
    return {"before": before, "after": evaluate(model, held_out, 8).loss, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="training records, such as GSM8K's train.jsonl")
    parser.add_argument("--eval-data", required=True, help="held-out records")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--held-out", type=int, default=64, help="how many held-out records to measure on")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="60 steps, 3 seeds")
    parser.add_argument("--prepare", action="store_true", help="run PEFT with prepare_model_for_kbit_training")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--bits", type=int, choices=(4, 16), action="append", help="only these (may be given twice)")
    parser.add_argument("--method", choices=("lora", "dora"), action="append", help="only these (may be given twice)")
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    methods = arguments.method or ("lora", "dora")
    steps, seeds = (60, 3) if arguments.full else (arguments.steps, arguments.seeds)

    tokenizer = qlora.load_tokenizer(arguments.model)
    examples = tokenize(read_records(arguments.data), tokenizer, max_tokens=512).examples
    held_out = tokenize(read_records(arguments.eval_data)[: arguments.held_out], tokenizer, max_tokens=512).examples
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense = qlora.load_base(arguments.model, bits=16, dtype=arguments.dtype)
        dense.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del dense
        for bits in arguments.bits or (4, 16):
            for method in methods:
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    model = ours(folder, method, bits, arguments.dtype)
                    start = {name: adapter.lora_A.detach().clone() for name, adapter in qlora.named_adapters(model)}
                    mine = run(model, examples, held_out, steps, seed)
                    del model
                    gc.collect()
                    other = run(
                        theirs(folder, method, bits, arguments.dtype, arguments.prepare, start),
                        examples,
                        held_out,
                        steps,
                        seed,
                    )
                    gc.collect()  # a PEFT model is a cycle
                    rows.append({"bits": bits, "method": method, "seed": seed, "ours": mine, "peft": other})
                    apart = mine["after"] / other["after"] - 1
                    print(
                        f"{bits:2} bits  {method}  seed {seed}  before {mine['before']:.4f} / {other['before']:.4f}  "
                        f"after ours {mine['after']:.4f}  PEFT {other['after']:.4f}  ({apart:+.2%})",
                        flush=True,
                    )

    def average(side: str, bits: int, method: str) -> float:
        return mean(row[side]["after"] for row in rows if (row["bits"], row["method"]) == (bits, method))

    summary = {}
    print(f"\n{'':12}{'ours':>9}{'PEFT':>9}{'ours/PEFT':>11}")
    for bits in arguments.bits or (4, 16):
        for method in methods:
            mine, other = average("ours", bits, method), average("peft", bits, method)
            summary[f"{method}-{bits}"] = {"ours": mine, "peft": other, "ratio": mine / other}
            seconds = [
                sum(row[side]["seconds"] for row in rows if (row["bits"], row["method"]) == (bits, method))
                for side in ("ours", "peft")
            ]
            summary[f"{method}-{bits}"]["times_as_fast"] = seconds[1] / seconds[0]
            print(
                f"{method} {bits:2} bits{mine:9.4f}{other:9.4f}{mine / other:11.4f}   "
                f"trained {seconds[1] / seconds[0]:.2f} times as fast"
            )
    if not arguments.bits:
        for method in methods:
            gap = average("ours", 4, method) / average("ours", 16, method) - 1
            summary[f"{method}-nf4-gap"] = gap
            print(f"{method}: NF4 ends {gap:+.2%} from 16 bits")
    settings = {
        "steps": steps,
        "seeds": seeds,
        "prepare": arguments.prepare,
        "dtype": arguments.dtype,
        "held_out": len(held_out),
    }
    facts = about("torch", "transformers", "peft", "bitsandbytes") | settings
    write(arguments.json, facts | {"summary": summary, "runs": rows})


if __name__ == "__main__":
    main()

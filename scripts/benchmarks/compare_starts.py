"""How much of what 4 bits cost an adapter's start and GPTQ codes give back: before training, and after some steps.

    python scripts/benchmarks/compare_starts.py --data held_out.jsonl --train train.jsonl --steps 30 --json out.json

Each kind of base and start against the 16-bit model: loss and KL on held-out records before training, then the loss
after the same training of all of them. Calibration text is the training data, or --calibrate for text of another kind.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from record import about, write

import qlora
from qlora.calibrate.codes import choose_codes_of
from qlora.calibrate.gap import measure_gap
from qlora.calibrate.moments import rectangles
from qlora.calibrate.start import start_by_error
from qlora.data.batch import Example, pack
from qlora.data.order import step_indices
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.evaluate import evaluate
from qlora.models.device import products_of, resolve_device
from qlora.models.originals import originals
from qlora.models.source import resolve
from qlora.train.step import learning_rate, optimizer_step

BATCH = 4
STARTS = ("zero", "error", "gptq", "gptq and error")


def shifted(name: str, shift: int, folder: Path) -> str:
    """A folder with the same Llama model whose blocks begin elsewhere: the residual stream and the MLP's values in
    another order, by `shift`. (The inputs of o_proj stay: the heads of grouped attention cannot be rolled.)
    """
    if not shift:
        return name
    model = qlora.load_base(name, bits=16, dtype="bf16")
    for parameter, value in model.named_parameters():
        kind = parameter.split(".")[-2]
        inputs = value.dim() == 1 or kind not in ("o_proj",)
        outputs = kind in ("o_proj", "down_proj", "gate_proj", "up_proj")
        value.data = value.data.roll(shift, dims=-1) if inputs else value.data
        value.data = value.data.roll(shift, dims=0) if outputs else value.data
    model.save_pretrained(folder)
    qlora.load_tokenizer(name).save_pretrained(folder)
    return str(folder)


def train(model: torch.nn.Module, examples: list[Example], steps: list[int], rate: float, seed: int) -> Iterator[int]:
    """AdamW with a cosine schedule over the last of `steps`, the same batches for every start; pauses after each of
    `steps` with the model in evaluation mode.
    """
    optimizer = torch.optim.AdamW(qlora.adapter_parameters(model), lr=rate, weight_decay=0.0)
    for step in range(steps[-1]):
        batch = pack([examples[i] for i in step_indices(len(examples), BATCH, seed, step)])
        optimizer_step(model.train(), optimizer, [batch], learning_rate(step, steps[-1], rate, 4, "cosine"), 1.0, step)
        if step + 1 in steps:
            model.eval()
            yield step + 1


def numbers(text: str) -> list[int]:
    """ "30,60" as a rising list."""
    return sorted(int(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="held-out records")
    parser.add_argument("--train", required=True, help="training records")
    parser.add_argument("--calibrate", help="calibration records, if not the training's")
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--methods", default="lora,dora")
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument(
        "--steps", type=numbers, default=[], help="30,60: held-out loss after 30 and after 60, the last"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--shifts",
        type=numbers,
        default=[0],
        help="0,16,32: blocks begin so many columns later (Llama), by seed in turn",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    with products_of(given.dtype, resolve_device("auto")):  # as finetune computes
        compare(given)


def compare(given: argparse.Namespace) -> None:
    """All that was asked for, a printed line and a row of the file for each model as soon as it is measured."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = qlora.load_tokenizer(given.model)
    held_out, examples, text = (
        tokenize(read_records(path)[:count], tokenizer, max_tokens=512).examples
        for path, count in ((given.data, given.records), (given.train, None), (given.calibrate or given.train, None))
    )
    folder = tempfile.TemporaryDirectory()
    places = [shifted(given.model, shift, Path(folder.name) / str(shift)) for shift in given.shifts]
    rows = []
    settings = {name: str(value) for name, value in vars(given).items() if name not in ("json", "data", "train")}
    for method in given.methods.split(","):
        for seed in range(given.seeds):
            sixteen: dict[int, float] = {}
            turn = seed % len(places)
            place, weights = places[turn], originals(resolve(places[turn]))
            for start in ("16 bits", *given.starts.split(",")):
                bits = 16 if start == "16 bits" else 4
                if bits == 16 and not given.steps:
                    continue
                model = qlora.load_base(place, bits=bits, dtype=given.dtype)
                batches = rectangles(text, given.tokens, seed, BATCH)
                row: dict[str, object] = {"method": method, "seed": seed, "shift": given.shifts[turn], "start": start}
                began = time.process_time()
                if "gptq" in start:
                    choose_codes_of(model, weights, batches)
                torch.manual_seed(seed)
                qlora.attach_adapters(model, method=method, rank=given.rank, alpha=2.0 * given.rank).eval()
                if "error" in start:
                    start_by_error(model, weights, batches)
                row["cpu seconds"] = time.process_time() - began
                if bits == 4:
                    gap = measure_gap(model, weights, held_out, 8)
                    row |= {"loss16": gap.loss16, "over": gap.loss / gap.loss16 - 1, "kl": gap.kl}
                    row |= {"base over": gap.loss_base / gap.loss16 - 1, "base kl": gap.kl_base}
                if given.steps:
                    for step in train(model, examples, given.steps, given.rate, seed):
                        loss = evaluate(model, held_out, 8).loss
                        sixteen.setdefault(step, loss)  # 16 bits come first
                        row |= {f"after {step}": loss, f"after {step} over": loss / sixteen[step] - 1}
                rows.append(row)
                print(*(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
                write(given.json, about("torch", "transformers") | settings | {"rows": rows})


if __name__ == "__main__":
    main()

"""What the ways out of a DoRA adapter on SmolLM2 lose, as bitsandbytes and PEFT compute them without qlora.

    python scripts/trials/fold.py --adapter runs/dora/adapter [--adapter ...] [--texts 6] [--output fold.json]

Each way is written, then loaded in a process that cannot import qlora (AutoModelForCausalLM, bitsandbytes, PeftModel),
in float32, and held against our adapted model on held-out tickets. It prints a line of JSON for each:

    error     the largest difference of two logits, over the largest logit
    kl        KL of our adapted model, in nats a token

    fold                 `qlora export --to bnb4-lora`; its error must be at most 1e-5, else the exit code is 1
    fold, double quant   the same with constants in 8 bits
    peft                 the adapter as it is on the base of its training: PEFT's own DoRA, which few servers have
    without magnitude    the same, taken for a LoRA
    quantized again      `qlora export --to bnb4`
    without adapter      the base
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HOUSE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOUSE), str(HOUSE / "kernels"), str(HOUSE / "tests/support"), str(HOUSE / "scripts/benchmarks")]

import torch
import transformers
from record import about, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from without_us import logits_without_us

from qlora import ExportSpec, export_adapter
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.export.adapted_source import open_adapted
from qlora.export.peft import OWN_CONFIG, PEFT_CONFIG, TENSORS, read_adapter

MOST = 1e-5
DATA = HOUSE / "scripts/data/tickets_test.jsonl"


def as_lora(adapter: Path, folder: Path) -> Path:
    """A DoRA adapter without its magnitudes."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("manifest.json", "start.safetensors"))
    config, own = (json.loads((adapter / name).read_text()) for name in (PEFT_CONFIG, OWN_CONFIG))
    (folder / PEFT_CONFIG).write_text(json.dumps(config | {"use_dora": False}))
    (folder / OWN_CONFIG).write_text(json.dumps({"format": own["format"], "base": own["base"], "manifest": False}))
    save_file({k: v for k, v in load_file(adapter / TENSORS).items() if "magnitude" not in k}, folder / TENSORS)
    return folder


def ways(adapter: Path, place: Path) -> dict[str, Path]:
    """Every way out, written into `place`."""
    lora = as_lora(adapter, place / "lora")
    written = {
        "fold": (adapter, ExportSpec("bnb4-lora", dtype="fp32")),
        "fold, double quant": (adapter, ExportSpec("bnb4-lora", dtype="fp32", double_quant=True)),
        "quantized again": (adapter, ExportSpec("bnb4", dtype="fp32")),
        "without magnitude": (lora, ExportSpec("bnb4-lora", dtype="fp32")),  # the base of the training, as it is
    }
    folders = {
        name: export_adapter(source, place / name, spec, verify=None).folder for name, (source, spec) in written.items()
    }
    for name in ("peft", "without adapter"):
        folders[name] = place / name
        shutil.copytree(folders["without magnitude"], place / name, ignore=shutil.ignore_patterns("adapter"))
    shutil.copytree(adapter, place / "peft" / "adapter")
    return folders


def compared(wanted: list[Tensor], got: list[Tensor]) -> dict[str, float]:
    """`error` and `kl` of the logits [tokens, vocabulary] of each text."""
    differences = [(q - p).abs().max() for p, q in zip(wanted, got, strict=True)]
    logs = [(p.double().log_softmax(-1), q.double().log_softmax(-1)) for p, q in zip(wanted, got, strict=True)]
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in logs])
    largest = max(logits.abs().max() for logits in wanted)
    return {"error": float(max(differences) / largest), "kl": float(kl.mean())}


def measure(adapter: Path, count: int) -> list[dict[str, Any]]:
    """A row for each way."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found, _ = open_adapted(read_adapter(adapter), place / "none", [], model=None, trust_remote_code=False)
        examples = tokenize(read_records(str(DATA))[:count], found.tokenizer, max_tokens=256).examples
        texts = [list(example.input_ids) for example in examples]
        ours: Any = found.load("fp32")
        with torch.no_grad():
            wanted = [ours(input_ids=torch.tensor([text])).logits[0] for text in texts]
        del ours
        folders = ways(adapter, place)
        served = logits_without_us(folders.values(), texts, place)
    start = "zero" if found.files.start is None else "error"
    told = {"adapter": f"{found.files.spec.method}, start {start}", "tokens": sum(len(text) for text in texts)}
    return [told | {"way": way} | compared(wanted, served[str(folder)]) for way, folder in folders.items()]


def main() -> None:
    """Print every row, write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", action="append", required=True, type=Path, help="trained DoRA; may be given again")
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for adapter in arguments.adapter:
        for row in measure(adapter, arguments.texts):
            rows.append(row)
            print(json.dumps(row), flush=True)
    write(arguments.output, about("torch", "transformers", "bitsandbytes", "peft") | {"rows": rows})
    sys.exit(max(row["error"] for row in rows if row["way"] == "fold") > MOST)


if __name__ == "__main__":
    main()

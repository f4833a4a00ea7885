"""SmolLM2, and an adapter on it, as llama.cpp serves them: greedy texts and KL against our own model, by GGUF type.

    python scripts/trials/serve_gguf.py [--prompts 20] [--tokens 32] [--types F16 Q8_0] [--output results.json]

llama.cpp writes greedily after each prompt and lists the log probabilities of its 512 likeliest tokens; our model (in
float32, the adapted one on its NF4 base) sees the same tokens. The rest of the vocabulary counts as one token, which
can only make a KL smaller, by less than the mass of that rest. The adapter is a DoRA away from its start.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOUSE), str(HOUSE / "kernels"), str(HOUSE / "tests/support")]

import torch
from llama_cpp import LlamaCpp
from tiny import disturb

from qlora import attach_adapters, load_base, load_tokenizer, save_adapter
from qlora.export.formats import export_adapter
from qlora.export.gguf import ADAPTER, BASE, MODEL, convert_to_gguf
from qlora.specs import ExportSpec

LISTED = 512
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time there was",
    "The three primary colours are",
    "In 1969, the first man",
    "To bake bread you need",
    "The opposite of hot is",
    "Photosynthesis is the process",
    "Dear Sir or Madam,",
    "SELECT name FROM users WHERE",
    "The largest planet in the solar system",
    "My favourite book is",
    "1, 1, 2, 3, 5, 8,",
    "A triangle has three",
    "The meeting was moved from Monday to",
    "Shakespeare wrote",
    "If it rains tomorrow, we",
    "The recipe calls for 250 g of",
    "Gravity is a force that",
]


def kl(logs: torch.Tensor, top: dict[int, float]) -> float:
    """KL in nats of one token: p of ours [vocabulary], q of llama.cpp by token id."""
    p, q = logs.double()[list(top)], torch.tensor(list(top.values()), dtype=torch.float64)
    rest_p, rest_q = 1 - p.exp().sum(), 1 - q.exp().sum()
    rest = rest_p * (rest_p.clamp_min(1e-12) / rest_q.clamp_min(1e-12)).log()
    return float((p.exp() * (p - q)).sum() + rest)


@torch.no_grad()
def measure(model: torch.nn.Module, files: tuple[Path, ...], prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """How many texts are those of `model`, the mean and largest KL of a token, and the largest `gap`: by how much our
    likeliest token had the larger logit where llama.cpp took another.
    """
    equal, values, gap = 0, [], 0.0
    with LlamaCpp(*files, context=512) as served:
        for ids in prompts:
            found, listed = served.write(ids, tokens, LISTED)
            logits = model(input_ids=torch.tensor([ids + found])).logits[0, len(ids) - 1 : -1].float()
            best, chosen = logits.max(-1), logits.gather(-1, torch.tensor(found).unsqueeze(-1)).squeeze(-1)
            equal += best.indices.tolist() == found
            gap = max(gap, (best.values - chosen).max().item())
            values += [kl(*pair) for pair in zip(logits.log_softmax(-1), listed, strict=True)]
    return {
        "texts": len(prompts),
        "equal": equal,
        "kl": sum(values) / len(values),
        "largest_kl": max(values),
        "gap": gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--types", nargs="+", default=["F16", "BF16", "Q8_0", "Q4_0"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer("smollm2-135m")
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS[: arguments.prompts]]
    rows = []

    def row(what: str, model: torch.nn.Module, *files: Path) -> None:
        rows.append({"what": what} | measure(model, files, prompts, arguments.tokens))
        print(json.dumps(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory() as place:
        plain = load_base("smollm2-135m", bits=16, dtype="fp32")
        for type in arguments.types:
            row(f"base, {type}", plain, convert_to_gguf("smollm2-135m", Path(place, type), type=type))
        del plain
        base = load_base("smollm2-135m", dtype="fp32")
        ours = disturb(attach_adapters(base, method="dora", rank=8), spread=0.01, magnitudes=0.05)
        save_adapter(ours, Path(place, "adapter"))
        for to, type in [*(("gguf", type) for type in arguments.types), ("gguf-lora", "Q8_0")]:
            spec = ExportSpec(to, type=type)
            folder = export_adapter(Path(place, "adapter"), Path(place, to + type), spec, verify=None).folder
            files = (folder / MODEL,) if to == "gguf" else (folder / BASE, folder / ADAPTER)
            row(f"DoRA, {to} {type}", ours, *files)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

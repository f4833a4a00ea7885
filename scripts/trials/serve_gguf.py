"""SmolLM2 and trained adapters on it, as llama.cpp serves them: greedy texts and KL against our own model.

    python scripts/trials/serve_gguf.py --adapter runs/dora/adapter --adapter runs/lora/adapter
        [--what base gguf gguf-lora] [--types F16 BF16 Q8_0 Q4_0] [--prompts 20] [--tokens 32] [--output results.json]

llama.cpp writes greedily after each prompt and lists the log probabilities of its 512 likeliest tokens; our model (in
float32, the adapted one on its NF4 base) sees the same tokens. The rest of the vocabulary counts as one token, which
can only make a KL smaller, by less than the mass of that rest. Of each KL two parts are computed beside it:

    kl_file       ours || what is in the file, decoded by our reader, in float32          the format's own rounding
    kl_inputs     ours || the same with the inputs of every product rounded as llama.cpp rounds them: to fp16 for F16,
                  to bf16 for BF16, to Q8_0 (32 int8 and a scale) for Q8_0 and Q4_0       and the server's products;
                  not those of a LoRA, whose A and B are float32 and are multiplied in it

It prints a line of JSON for each file; `differences` are the first tokens that differ, by which logit ours was larger.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HOUSE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOUSE), str(HOUSE / "kernels"), str(HOUSE / "tests/support"), str(HOUSE / "scripts/benchmarks")]

import gguf
import torch
import transformers
from llama_cpp import LlamaCpp
from record import about, write
from torch import nn

from qlora import load_base, load_tokenizer
from qlora.export.adapted_source import AdaptedSource, open_adapted
from qlora.export.formats import FORMATS, export_adapter
from qlora.export.gguf import ADAPTER, BASE, MODEL, convert_to_gguf
from qlora.export.peft import read_adapter
from qlora.layers.adapters import AdaptedLinear
from qlora.specs import ExportSpec

LISTED = 512
ENDS = [0, 2, 4]  # tokens that end a text for llama.cpp, which is told to write on and takes none of them; nor do we
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


def mean_kl(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Mean KL in nats a token, of logits [tokens, vocabulary] of each text."""
    logs = [(p.double().log_softmax(-1), q.double().log_softmax(-1)) for p, q in zip(wanted, found, strict=True)]
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in logs]).mean().item()


@torch.no_grad()
def logits_of(model: nn.Module, texts: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """[written tokens, vocabulary] of each (prompt, text)."""
    return [
        model(input_ids=torch.tensor([ids + found])).logits[0, len(ids) - 1 : -1].float().clone()
        for ids, found in texts
    ]


def rounded(kind: str, x: torch.Tensor) -> torch.Tensor:
    """The input of a product as llama.cpp rounds it where the weight is of this kind."""
    if kind in ("F16", "BF16"):
        return x.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
    q8 = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.dequantize(gguf.quantize(x.contiguous().numpy(), q8), q8)).view_as(x)


def round_inputs(decoded: nn.Module, type: str) -> None:
    """Let every layer of a file of this type compute from rounded inputs, a LoRA on it from its own."""

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x, base = inputs[0], getattr(module, "base", module)
        return output + nn.functional.linear(rounded(kinds[module], x) - x, base.weight)

    kinds = {}
    for name, module in decoded.named_modules():
        if isinstance(module, (nn.Linear, AdaptedLinear)) and not name.endswith(".base"):
            kinds[module] = "F16" if type == "Q8_0" and name.endswith("v_proj") else type
            module.register_forward_hook(hook)


def differences(logits: list[torch.Tensor], texts: list[tuple[list[int], list[int]]]) -> list[dict[str, float]]:
    """Where llama.cpp first took another token than we, for each text that differs: `margin`, by how much the logit of
    ours is larger than that of theirs.
    """
    found = []
    for number, (all_logits, (_, written)) in enumerate(zip(logits, texts, strict=True)):
        ours = all_logits.index_fill(-1, torch.tensor(ENDS), -torch.inf)
        best, chosen = ours.max(-1), ours.gather(-1, torch.tensor(written).unsqueeze(-1)).squeeze(-1)
        other = (best.indices != torch.tensor(written)).nonzero().flatten().tolist()
        if other:
            margin = (best.values - chosen)[other[0]].item()
            found.append({"prompt": number, "token": other[0], "margin": margin})
    return found


def measure(
    ours: nn.Module, decoded: nn.Module, type: str, files: tuple[Path, ...], prompts: list[list[int]], tokens: int
) -> dict[str, Any]:
    """How many texts are those of `ours`, where the others part, and the KL (see the head)."""
    with LlamaCpp(*files, context=512) as served:
        answers = [served.write(ids, tokens, LISTED) for ids in prompts]
    texts = [(ids, found) for ids, (found, _) in zip(prompts, answers, strict=True)]
    wanted = logits_of(ours, texts)
    values = [
        kl(*pair)
        for logits, (_, listed) in zip(wanted, answers, strict=True)
        for pair in zip(logits.log_softmax(-1), listed, strict=True)
    ]
    other = differences(wanted, texts)
    file = mean_kl(wanted, logits_of(decoded, texts))
    round_inputs(decoded, type)
    return {
        "equal": len(texts) - len(other),
        "texts": len(texts),
        "kl": sum(values) / len(values),
        "largest_kl": max(values),
        "kl_file": file,
        "kl_inputs": mean_kl(wanted, logits_of(decoded, texts)),
        "differences": other,
    }


def exported(found: AdaptedSource, to: str, type: str, place: Path) -> tuple[tuple[Path, ...], nn.Module]:
    """(the files that llama.cpp loads, the model as our reader decodes them)."""
    folder = export_adapter(found.files.folder, place, ExportSpec(to, type=type), verify=None).folder
    files = (folder / MODEL,) if to == "gguf" else (folder / BASE, folder / ADAPTER)
    return files, FORMATS[to].load(folder, found, torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", action="append", default=[], type=Path, help="of SmolLM2; may be given again")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--what", nargs="+", default=["base", "gguf", "gguf-lora"])
    parser.add_argument("--types", nargs="+", default=["F16", "BF16", "Q8_0", "Q4_0"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer("smollm2-135m")
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS[: arguments.prompts]]
    rows = []

    def row(what: str, type: str, ours: nn.Module, files: tuple[Path, ...], decoded: nn.Module) -> None:
        rows.append({"what": what, "type": type} | measure(ours, decoded, type, files, prompts, arguments.tokens))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.output:
            write(arguments.output, about("torch", "transformers", "gguf", "xllamacpp") | {"rows": rows})

    with tempfile.TemporaryDirectory() as place:
        for type in arguments.types if "base" in arguments.what else []:
            plain = load_base("smollm2-135m", bits=16, dtype="fp32").eval()
            file = convert_to_gguf("smollm2-135m", Path(place, type), type=type)
            row("base", type, plain, (file,), load_base(str(file), bits=16, dtype="fp32").eval())
        for number, adapter in enumerate(arguments.adapter):
            files = read_adapter(adapter)
            found, _ = open_adapted(files, Path(place, "none"), [], model=None, trust_remote_code=False)
            ours, method = found.load("fp32"), files.spec.method
            for to, type in [(to, type) for to in arguments.what if to != "base" for type in arguments.types]:
                written = exported(found, to, type, Path(place, f"{number}-{to}-{type}"))
                row(f"{method}, {to}", type, ours, *written)


if __name__ == "__main__":
    main()

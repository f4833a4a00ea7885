"""Every type of `AutoModelForCausalLM`, tiny and random, through the product: right, refused, wrong, or a crash.

    python scripts/sweep_architectures.py --out sweep.jsonl [--only bert,falcon] [--seconds 120] [--table table.md]

For each type: `assemble` (4 bits, DoRA on every linear layer) against plain transformers with the decoded weights;
a batch of two examples against each alone; whether a later token moves earlier logits; the gradients of A, B and m
against autograd on the definition of DoRA; steps; save and load; merge and reload in plain transformers; recomputation;
`plan`. One process a type. The file is appended to, and what is in it is not run again.

The reference shares no code with the product but the decoding of NF4. The alternative, a list of architectures that
somebody tried, is out of date with the next release of transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tiny_architectures import LEFT_OUT, VOCABULARY, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from qlora.config.commands import PlanConfig
from qlora.data.batch import Example, pack
from qlora.errors import UserError
from qlora.export.formats import merge
from qlora.export.peft import load_adapter
from qlora.export.peft_write import save_adapter
from qlora.layers.attach import adapter_parameters, forget_row_norms, named_adapters
from qlora.layers.forward_mode import forward_mode
from qlora.layers.linear import NF4Linear, frozen_weight, left_alone
from qlora.layers.loss import logit_chunks, loss_sum
from qlora.models.info import info
from qlora.models.load import load_base
from qlora.models.source import resolve
from qlora.plan.report import describe
from qlora.run.assemble import ModelSpec, assemble
from qlora.specs import AdapterSpec, Quantization
from qlora.train.step import checkpoint_activations

LENGTHS = (40, 23)  # tokens of the two examples; longer than any tiny window
LOGITS, GRADIENTS = 1e-4, 2e-3  # allowed differences, of the largest value
VARIANTS = {"+is_decoder": {"is_decoder": True}}


class Wrong(Exception):
    """A number of the product is not the reference's."""


class Definition(nn.Module):
    """DoRA as the paper writes it, on a dense weight [out, in]; n is a constant."""

    def __init__(self, weight: Tensor, bias: Tensor | None, adapter: nn.Module):
        super().__init__()
        self.weight, self.bias, self.scaling = weight, bias, adapter.scaling
        self.A, self.B, self.m = (
            nn.Parameter(getattr(adapter, name).detach().clone()) for name in ("lora_A", "lora_B", "magnitude")
        )

    def forward(self, x: Tensor) -> Tensor:
        whole = self.weight + self.scaling * self.B @ self.A
        y = F.linear(x, (self.m / whole.norm(dim=1).detach()).unsqueeze(1) * whole)
        return y if self.bias is None else y + self.bias


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, of the largest of `expected`."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def demand(what: str, found: Tensor, expected: Tensor, most: float, row: dict[str, Any]) -> None:
    """Note how far two tensors are apart, and raise where it is too far."""
    apart = difference(found, expected)
    row[what] = max(row.get(what, 0.0), apart)
    if not apart <= most:
        raise Wrong(f"{what}: {apart:.1e} of the largest away")


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(5, VOCABULARY - 10, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Example(tuple(row), (False,) + (True,) * (len(row) - 1)) for row in rows]


def alone(model: nn.Module, example: Example) -> Tensor:
    """Logits of an example by a model's own forward, at the positions that predict."""
    return model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0, :-1]


def write_tokenizer(folder: Path) -> None:
    """One token a byte: what `merge` copies."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(folder)


def dense(folder: Path) -> nn.Module:
    """The model of a folder by plain transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def decoded(folder: Path, base: nn.Module) -> nn.Module:
    """Plain transformers with the weights that the product's NF4 layers hold."""
    plain = dense(folder)
    for name, layer in base.named_modules():
        if isinstance(layer, NF4Linear):
            weight = frozen_weight(layer).dense(torch.float32)
            place: Any = plain.get_submodule(name.removesuffix(".base"))
            place.weight = nn.Parameter(weight.t().contiguous() if isinstance(place, Conv1D) else weight, False)
    return plain


def disturb(model: nn.Module) -> None:
    """Move every adapter away from its start, where it computes the base."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in named_adapters(model):
            layer.lora_B.normal_(0, 0.05, generator=generator)
            layer.magnitude *= 1 + 0.3 * torch.rand(layer.magnitude.shape, generator=generator)
    forget_row_norms(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    parts = ("lora_A", "lora_B", "magnitude")
    return {
        f"{name}.{part}": getattr(layer, part).grad.clone()
        for name, layer in named_adapters(model)
        for part in parts
        if getattr(layer, part).grad is not None
    }


def same_gradients(what: str, found: dict[str, Tensor], expected: dict[str, Tensor], row: dict[str, Any]) -> None:
    """All gradients, each against the largest of its kind."""
    for name, gradient in expected.items():
        kind = name.rsplit(".", 1)[1]
        largest = max(g.abs().max() for n, g in expected.items() if n.endswith(kind))
        other = found.get(name, torch.zeros_like(gradient))
        apart = ((other - gradient).abs().max() / largest.clamp_min(1e-30)).item()
        row[what] = max(row.get(what, 0.0), apart)
        if not apart <= GRADIENTS:
            raise Wrong(f"{what}: of {name} {apart:.1e} of the largest away")


def examine(kind: str, folder: Path, row: dict[str, Any]) -> None:
    """Everything that is tried on one type; raises what it finds."""
    name, _, variant = kind.partition("+")
    config = tiny_config(name, **VARIANTS.get(f"+{variant}" if variant else "", {}))
    row["stage"] = "transformers"
    tiny_model(config).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    first, second = examples()
    with torch.no_grad():
        alone(dense(folder / "model"), first)
    row["stage"] = "assemble"
    source = resolve(str(folder / "model"))
    spec = ModelSpec(Quantization(4), AdapterSpec(method="dora", rank=4, alpha=8.0), "fp32")
    model = assemble(source, spec, torch.device("cpu"))
    mode = forward_mode(model)
    row |= {"runs": mode.batches, "adapted": len(list(named_adapters(model))), **shares(model)}
    row["left_alone"] = len(left_alone(model))
    row["unreached"] = len(info(model).unreached)
    row["stage"] = "base"
    plain = decoded(folder / "model", model)
    with torch.no_grad():
        demand("base", alone(model.eval(), first), alone(plain, first), LOGITS, row)
    row["stage"] = "adapter"
    disturb(model)
    for name, layer in named_adapters(model):
        place: Any = plain.get_submodule(name)
        weight = place.weight.t() if isinstance(place, Conv1D) else place.weight
        plain.set_submodule(name, Definition(weight.detach(), place.bias, layer))
    with torch.no_grad():
        expected = [alone(plain, example) for example in (first, second)]
        demand("adapter", alone(model, first), expected[0], LOGITS, row)
        later = Example((*first.input_ids[:-1], first.input_ids[-1] + 1), first.loss_mask)
        demand("causal", alone(plain, later)[:-1], expected[0][:-1], LOGITS, row)
        for order in ((0, 1), (1, 0)):
            batch = pack([(first, second)[i] for i in order])
            found = torch.cat([logits for logits, _ in logit_chunks(model, batch)])
            demand("batch", found, torch.cat([expected[i] for i in order]), LOGITS, row)
    row["stage"] = "gradients"
    batch = pack([first, second])
    loss_sum(model.train(), batch).backward()
    total = sum(
        F.cross_entropy(alone(plain.train(), example), torch.tensor(example.input_ids[1:]), reduction="sum")
        for example in (first, second)
    )
    assert isinstance(total, Tensor)
    total.backward()
    found = gradients(model)
    named = {"A": "lora_A", "B": "lora_B", "m": "magnitude"}
    wanted = {
        f"{name}.{named[part]}": parameter.grad
        for name, module in plain.named_modules()
        if isinstance(module, Definition)
        for part, parameter in module.named_parameters(recurse=False)
        if part in named and parameter.grad is not None
    }
    same_gradients("gradients", found, wanted, row)
    row["stage"] = "steps"
    take_steps(model, batch)
    row["stage"] = "save, load, merge"
    save_and_merge(model, folder, first, row)
    row["stage"] = "plan"
    planned(folder / "model", row)
    row["stage"] = "recomputation"
    recomputed(model, batch, row)


def shares(model: nn.Module) -> dict[str, Any]:
    """How much of the matrices but embeddings and head is NF4, and how much fused experts."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    known = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    known |= {id(p) for p in head.parameters()} if head is not None else set()
    rest = [p for p in model.parameters() if p.dim() >= 2 and not p.requires_grad and id(p) not in known]
    experts = sum(p.numel() for p in rest if p.dim() == 3)
    whole = packed + sum(p.numel() for p in rest)
    return {"nf4": packed / max(1, whole), "experts": experts / max(1, whole)}


def recomputed(model: Any, batch: Any, row: dict[str, Any]) -> None:
    """The gradients with recomputation are those without; what cannot is refused by a run's trial step."""
    model.zero_grad()
    loss_sum(model.train(), batch).backward()
    expected = gradients(model)
    model.zero_grad()
    try:
        checkpoint_activations(model)
        loss_sum(model.train(), batch).backward()
    except (RuntimeError, ValueError) as error:
        row["recomputation"] = str(error).splitlines()[0][:100]
    else:
        same_gradients("recomputed", gradients(model), expected, row)


def take_steps(model: nn.Module, batch: Any) -> None:
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_sum(model.train(), batch)
        loss.backward()
        if not loss.isfinite():
            raise Wrong("steps: the loss is not finite")
        optimizer.step()


def save_and_merge(model: nn.Module, folder: Path, example: Example, row: dict[str, Any]) -> None:
    save_adapter(model, folder / "adapter")
    with torch.no_grad():
        trained = alone(model.eval(), example)
        again = load_base(str(folder / "model"), dtype="fp32", device="cpu")
        load_adapter(again, folder / "adapter")
        demand("loaded", alone(again.eval(), example), trained, LOGITS, row)
        merge(folder / "adapter", folder / "merged", dtype="fp32")
        demand("merged", alone(dense(folder / "merged"), example), trained, LOGITS, row)


def planned(folder: Path, row: dict[str, Any]) -> None:
    """Whether `plan` can follow the model; a refusal is no fault."""
    try:
        found = describe(PlanConfig(model=str(folder), max_tokens=64, device="cpu"), resolve(str(folder)))
        row["plan"] = f"{found['peak'] / 1e6:.0f} MB"
    except UserError as error:
        row["plan"] = "refused: " + error.problems[0]


def verdict(kind: str) -> dict[str, Any]:
    """The row of one type."""
    row: dict[str, Any] = {"type": kind}
    with tempfile.TemporaryDirectory() as folder:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                examine(kind, Path(folder), row)
            row["result"] = "OK"
        except UserError as error:
            row |= {"result": "REFUSED", "what": error.problems[0].replace(folder, "FOLDER")}
        except Wrong as error:
            row |= {"result": "WRONG", "what": str(error)}
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {str(error)[:200]} [{Path(where.filename).name}:{where.lineno}]"
            result = "SKIPPED" if row.get("stage", "transformers") == "transformers" else "CRASH"
            row |= {"result": result, "what": said.replace(folder, "FOLDER").replace("\n", " ")}
    return row


def in_child(work: Callable[[str], dict[str, Any]], kind: str, seconds: float) -> dict[str, Any]:
    """`work(kind)` in a process of its own, with a time limit."""
    context = multiprocessing.get_context("fork")  # nothing has run a kernel here yet
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(work(kind)))
    child.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            row: dict[str, Any] = ours.recv()
            return row
        return {"type": kind, "result": "CRASH", "what": f"no end after {seconds:.0f} s"}
    except EOFError:
        return {"type": kind, "result": "CRASH", "what": "the process ended without a word"}
    finally:
        child.kill()
        child.join()


def table(rows: list[dict[str, Any]]) -> str:
    """The support table of docs/architectures.md."""
    lines = ["| type | result | batches | NF4 | experts | remarks |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["type"]):
        nf4 = f"{row['nf4']:.0%}" if "nf4" in row else "-"
        experts = f"{row['experts']:.0%}" if row.get("experts") else ""
        lines.append(
            f"| {row['type']} | {row['result']} | {row.get('runs', '-')} | {nf4} | {experts} | {remarks(row)} |"
        )
    return "\n".join(lines)


def remarks(row: dict[str, Any]) -> str:
    """What there is to say of a row besides its numbers."""
    said = [row["what"][:200]] if "what" in row else []
    if row.get("left_alone"):
        said.append(f"{row['left_alone']} layers stay dense")
    if row.get("unreached"):
        said.append(f"{row['unreached']} adapters that no text reaches")
    if "recomputation" in row:
        said.append("no recomputation")
    if str(row.get("plan", "")).startswith("refused"):
        said.append("no plan")
    return "; ".join(said).replace("|", "/")


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--out", type=Path, required=True, help="JSONL, appended to")
    arguments.add_argument("--only", help="types separated by commas; run again if they are in the file")
    arguments.add_argument("--seconds", type=float, default=120, help="limit for one type")
    arguments.add_argument("--table", type=Path, help="write the support table here")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    there = {row["type"] for row in done}
    kinds = options.only.split(",") if options.only else [k for k in all_types() if k not in there]
    with options.out.open("a") as file:
        for kind in kinds:
            left_out = LEFT_OUT.get(kind)
            row = {"type": kind, "result": "SKIPPED", "what": left_out} if left_out else None
            row = row or in_child(verdict, kind, options.seconds)
            print(json.dumps(row), file=file, flush=True)
            print(f"{kind:28} {row['result']:8} {row.get('runs', '')} {remarks(row)}", flush=True)
    rows = {row["type"]: row for row in map(json.loads, options.out.read_text().splitlines())}
    counts: dict[str, int] = {}
    for row in rows.values():
        counts[row["result"]] = counts.get(row["result"], 0) + 1
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())), f"of {len(rows)}")
    if options.table:
        options.table.write_text(table(list(rows.values())) + "\n")


def all_types() -> list[str]:
    """Every type, and those that say whether they are decoders also as one."""
    kinds = []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kinds.append(kind)
        with contextlib.suppress(Exception):
            if getattr(transformers.CONFIG_MAPPING[kind](), "is_decoder", None) is False:
                kinds.append(f"{kind}+is_decoder")
    return kinds


if __name__ == "__main__":
    main()

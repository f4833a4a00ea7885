"""Which 4-bit format loses how much? Weight error and held-out loss of bf16, NF4 (absmax and mse scales), FP4 and Int4
in blocks of 64.

    python scripts/benchmarks/compare_formats.py --data gsm8k_test.jsonl [--records 64]
                                                 [--train gsm8k_train.jsonl --steps 30] [--json FILE]

    FP4    the levels of bitsandbytes, E2M1 but for 1/192 in the place of 1/12; E2M1 proper beside it
    Int4   k/7, k = -7..7
All scales are float32, so that only levels and scales differ; weights are decoded to bf16 and the model computes in
bf16.

Two figures: the loss, which a damaged model can also lower, where it was sure of the wrong token; and the divergence,
the mean of KL(bf16 model || quantized model) at the same tokens, which damage only raises. One quantization is one draw
of rounding errors. So every format is measured `--shifts` times, with blocks that begin elsewhere, and the brackets
give two standard errors: over records (differences are paired, the tokens of a record are one draw), and over these
draws. Besides: one kind of layer quantized alone, kinds of tokens, and weight errors of random matrices, as they are
and after a pass through Q4_1 (uniform levels between minimum and maximum of blocks of 32), in which SmolLM2's wheel
comes. `--cache` keeps what was measured: a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from bitsandbytes.functional import get_4bit_type
from record import about, write
from torch import Tensor

import qlora
from qlora.data.batch import Example, pack
from qlora.data.order import step_indices
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.layers import nf4
from qlora.layers.forward import target_logits
from qlora.layers.linear import linear_names
from qlora.train.step import learning_rate, optimizer_step

BLOCKSIZE, BATCH = 64, 8
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6


def nearest(levels: Tensor) -> Callable[[Tensor], Tensor]:
    """The quantizer of a code book with absmax scales: weight -> its float32 values."""
    levels = levels.unique()
    midpoints = (levels[1:] + levels[:-1]) / 2

    def values(weight: Tensor) -> Tensor:
        blocks = weight.float().reshape(-1, BLOCKSIZE)
        scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
        return (levels[torch.bucketize(blocks / scales, midpoints)] * scales).view(weight.shape)

    return values


def fitted_nf4(weight: Tensor) -> Tensor:
    return nf4.dequantize(nf4.quantize(weight.float(), BLOCKSIZE, double_quant=False, scales="mse"))


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "NF4 absmax": nearest(get_4bit_type("nf4", "cpu")),
    "NF4 mse": fitted_nf4,
    "FP4": nearest(get_4bit_type("fp4", "cpu")),
    "FP4 E2M1": nearest(torch.cat([E2M1, -E2M1])),
    "Int4": nearest(torch.arange(-7, 8) / 7),
}


def shifted(values: Callable[[Tensor], Tensor], weight: Tensor, shift: int) -> Tensor:
    """`values` of `weight` with blocks that begin `shift` elements later."""
    return values(weight.reshape(-1).roll(-shift).view(weight.shape)).reshape(-1).roll(shift).view(weight.shape)


def q4_1(weight: Tensor) -> Tensor:
    """llama.cpp's Q4_1, with float32 constants."""
    blocks = weight.reshape(-1, 32)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = (high - low) / 15
    return (((blocks - low) / step).round() * step + low).view(weight.shape)


# ---------------------------------------------------------------- weight errors


def weight_errors(weights: Sequence[Tensor]) -> dict[str, float]:
    """Squared error over squared weight, by format."""
    size = sum(w.double().square().sum().item() for w in weights)
    return {name: sum((f(w).double() - w).square().sum().item() for w in weights) / size for name, f in FORMATS.items()}


def controls(embedding: Tensor) -> dict[str, dict[str, float]]:
    """Weight errors of matrices that no 4-bit format has touched, and of the same after Q4_1. Q8_0 holds SmolLM2's
    embedding.
    """
    torch.manual_seed(0)
    made = {
        "Gaussian": torch.randn(1024, 4096),
        "Student-t, 5 degrees": torch.distributions.StudentT(5.0).sample((1024, 4096)),
    }
    made["embedding of SmolLM2"] = embedding.float()
    found = {}
    for name, weight in made.items():
        found[name] = weight_errors([weight])
        found[f"{name}, after Q4_1"] = weight_errors([q4_1(weight)])
    return found


# ---------------------------------------------------------------- held-out loss


class HeldOut:
    """Held-out examples; per target token its record and its kind."""

    def __init__(self, examples: list[Example], tokenizer):
        self.examples = sorted(examples, key=lambda example: len(example.input_ids))
        tokens = [[i for i, counted in zip(e.input_ids, e.loss_mask, strict=True) if counted] for e in self.examples]
        self.record = torch.arange(len(tokens)).repeat_interleave(torch.tensor([len(row) for row in tokens]))
        texts = [text for row in tokens for text in tokenizer.batch_decode([[i] for i in row])]
        self.kinds = {
            "digits": torch.tensor([any(c.isdigit() for c in text) for text in texts]),
            "words": torch.tensor([any(c.isalpha() for c in text) and "<|" not in text for text in texts]),
        }
        self.kinds["signs and ends"] = ~(self.kinds["digits"] | self.kinds["words"])

    def logits(self, model: torch.nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch by batch, logits and tokens in the order of `record`."""
        model.eval()
        with torch.no_grad():
            for start in range(0, len(self.examples), BATCH):
                yield target_logits(model, pack(self.examples[start : start + BATCH]))

    def losses(self, model: torch.nn.Module, exact: list[Tensor]) -> Tensor:
        """Of every target token the loss and the divergence from `exact`, float16 log-probabilities by batch: float64
        [2, tokens].
        """
        found = []
        for (logits, tokens), sure in zip(self.logits(model), exact, strict=True):
            logs = logits.float().log_softmax(-1)
            divergence = F.kl_div(logs, sure.float(), log_target=True, reduction="none").sum(-1)
            found.append(torch.stack([F.nll_loss(logs, tokens, reduction="none"), divergence]))
        return torch.cat(found, 1).double()

    def mean(self, values: Tensor, among: Tensor | None = None) -> dict[str, float]:
        """Mean of [draws, tokens], and its standard errors: with a record's tokens as one draw of the data, and over
        the draws.
        """
        among = torch.ones_like(self.record, dtype=torch.bool) if among is None else among
        counts = torch.zeros(len(self.examples), dtype=torch.float64).index_add_(0, self.record, among.double())
        sums = torch.zeros_like(counts).index_add_(0, self.record, values.mean(0) * among)
        mean = sums.sum() / counts.sum()
        found = {"mean": mean.item(), "se": ((sums - mean * counts).square().sum().sqrt() / counts.sum()).item()}
        if len(values) > 1:
            found["se of draws"] = (values[:, among].mean(1).std() / len(values) ** 0.5).item()
        return found


class Measurements:
    """The model, its weights, and the token losses by what was quantized; each measured once."""

    def __init__(self, name: str, held_out: HeldOut, cache: Path | None):
        self.name, self.held_out, self.cache = name, held_out, cache
        self.known: dict[tuple, Tensor] = torch.load(cache) if cache is not None and cache.exists() else {}
        self.model = qlora.load_base(name, bits=16, dtype="bf16")
        self.weights = {
            layer: self.model.get_submodule(layer).weight.detach().clone() for layer in linear_names(self.model)
        }
        self.layers = sorted({layer.rsplit(".", 1)[1] for layer in self.weights})

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """The log-probabilities of the bf16 model, by batch."""
        model = qlora.load_base(self.name, bits=16, dtype="bf16")
        return [logits.log_softmax(-1, dtype=torch.float32).half() for logits, _ in self.held_out.logits(model)]

    def tokens(
        self, fmt: str, only: str = "", shift: int = 0, after: Callable[[torch.nn.Module], None] | None = None
    ) -> Tensor:
        """[2, tokens], as `HeldOut.losses` says, with the layers of kind `only` (all if empty)
        in the format; `after` trains the model first."""
        key = (fmt, only, shift, after is not None)
        if key not in self.known:
            model = self.model if after is None else qlora.load_base(self.name, bits=16, dtype="bf16")
            with torch.no_grad():
                for layer, weight in self.weights.items():
                    quantized = fmt in FORMATS and layer.endswith(only)
                    model.get_submodule(layer).weight.copy_(
                        shifted(FORMATS[fmt], weight, shift) if quantized else weight
                    )
            if after is not None:
                after(model)
            self.known[key] = self.held_out.losses(model, self.exact)
            loss, divergence = self.known[key].mean(1).tolist()
            what = f"{fmt:12} {only:10} shift {shift:2} {'trained' if after else '':8}"
            print(f"{what} loss {loss:.4f}  KL {divergence:.4f}", flush=True)
            if self.cache is not None:
                torch.save(self.known, self.cache)
        return self.known[key]


def whole_model(measured: Measurements, shifts: Sequence[int], after=None) -> dict[str, dict]:
    """Every format over bf16 and over NF4 absmax, paired; and by kind of token."""
    held_out, bf16 = measured.held_out, measured.tokens("bf16", after=after)
    drawn = {fmt: torch.stack([measured.tokens(fmt, shift=shift, after=after) for shift in shifts]) for fmt in FORMATS}
    found: dict[str, dict] = {"bf16": {"loss": held_out.mean(bf16[:1])}}
    kinds: dict[str, dict] = {
        kind: {"tokens": int(at.sum()), "bf16": held_out.mean(bf16[:1], at)} for kind, at in held_out.kinds.items()
    }
    for fmt, draws in drawn.items():
        loss, divergence = draws.unbind(1)
        usual = drawn["NF4 absmax"]
        found[fmt] = {
            "loss": held_out.mean(loss),
            "loss over bf16": held_out.mean(loss - bf16[0]),
            "divergence": held_out.mean(divergence),
        }
        if fmt != "NF4 absmax":
            found[fmt]["loss over NF4 absmax"] = held_out.mean(loss - usual[:, 0])
            found[fmt]["divergence over NF4 absmax"] = held_out.mean(divergence - usual[:, 1])
        for kind, at in held_out.kinds.items():
            kinds[kind][fmt] = {
                "loss over bf16": held_out.mean(loss - bf16[0], at),
                "divergence": held_out.mean(divergence, at),
            }
    return {"formats": found, "tokens": kinds}


def trainer(path: str, tokenizer, steps: int) -> Callable[[torch.nn.Module], None]:
    """What trains a model: LoRA of rank 16 on all linear layers, batch 4, the same batches for every format."""
    examples = tokenize(read_records(path), tokenizer, max_tokens=512).examples

    def train(model: torch.nn.Module) -> None:
        torch.manual_seed(0)
        qlora.attach_adapters(model, method="lora", rank=16, alpha=32.0).train()
        optimizer = torch.optim.AdamW(qlora.adapter_parameters(model), lr=5e-4, weight_decay=0.0)
        for step in range(steps):
            batch = pack([examples[i] for i in step_indices(len(examples), 4, 0, step)])
            optimizer_step(model, optimizer, [batch], learning_rate(step, steps, 5e-4, 4, "cosine"), 1.0, step)

    return train


# ---------------------------------------------------------------- what is said


def table(title: str, columns: Sequence[str], rows: dict[str, Sequence[str]]) -> str:
    lines = [f"\n{title}", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def shown(figure: dict[str, float]) -> str:
    draws = f", {figure['se of draws']:.4f}" if "se of draws" in figure else ""
    return f"{figure['mean']:.4f} ({figure['se']:.4f}{draws})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="held-out records")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--shifts", type=int, default=4, help="draws of the rounding errors")
    parser.add_argument("--train", help="training records, for --steps")
    parser.add_argument("--steps", type=int, default=0, help="measure after so many training steps too")
    parser.add_argument("--cache", type=Path, help="keep token losses here; of one set of options only")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if bool(arguments.train) != bool(arguments.steps):
        parser.error("--train and --steps go together")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = qlora.load_tokenizer(arguments.model)
    held_out = HeldOut(
        tokenize(read_records(arguments.data)[: arguments.records], tokenizer, max_tokens=512).examples, tokenizer
    )
    measured = Measurements(arguments.model, held_out, arguments.cache)

    shifts = [BLOCKSIZE * i // arguments.shifts for i in range(arguments.shifts)]
    whole = whole_model(measured, shifts)
    bf16 = measured.tokens("bf16")
    alone: dict[str, dict] = {only: {} for only in measured.layers}
    for only, fmt in itertools.product(measured.layers, FORMATS):
        loss, divergence = measured.tokens(fmt, only)
        alone[only][fmt] = {
            "loss over bf16": held_out.mean((loss - bf16[0])[None]),
            "divergence": held_out.mean(divergence[None]),
        }
    kinds = {
        only: [w.float() for name, w in measured.weights.items() if name.endswith(only)] for only in measured.layers
    }
    kinds["all layers"] = [w for weights in kinds.values() for w in weights]
    errors = {only: weight_errors(weights) for only, weights in kinds.items()} | controls(
        measured.model.get_input_embeddings().weight.detach()
    )
    results = {
        "weight errors": errors,
        "loss": whole["formats"],
        "by kind of token": whole["tokens"],
        "one kind of layer quantized": alone,
    }
    if arguments.steps:
        after = trainer(arguments.train, tokenizer, arguments.steps)
        results["loss after training"] = whole_model(measured, [0], after)["formats"]
        for row in results["loss after training"].values():  # the model that they diverge from is the untrained one
            for figure in ("divergence", "divergence over NF4 absmax"):
                row.pop(figure, None)

    size = f"{len(held_out.examples)} records, {len(held_out.record)} tokens"
    print(
        table(
            "Squared weight error over squared weight, %",
            list(FORMATS),
            {k: [f"{100 * v:.3f}" for v in row.values()] for k, row in errors.items()},
        )
    )
    for name in ("loss", "loss after training"):
        columns = list(results.get(name, {}).get("Int4", {}))
        if columns:
            rows = {fmt: [shown(row[k]) if k in row else "" for k in columns] for fmt, row in results[name].items()}
            print(table(f"{name.capitalize()}, {size}", columns, rows))
    for name in ("by kind of token", "one kind of layer quantized"):
        for figure in ("loss over bf16", "divergence"):
            rows = {
                f"{k} ({row['tokens']})" if "tokens" in row else k: [shown(row[fmt][figure]) for fmt in FORMATS]
                for k, row in results[name].items()
            }
            print(table(f"{figure.capitalize()}, {name}", list(FORMATS), rows))
    settings = {
        "model": arguments.model,
        "data": Path(arguments.data).name,
        "records": len(held_out.examples),
        "tokens": len(held_out.record),
        "shifts": shifts,
        "steps": arguments.steps,
    }
    write(arguments.json, about("torch", "transformers", "bitsandbytes") | settings | results)


if __name__ == "__main__":
    main()

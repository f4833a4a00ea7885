"""What a model has to keep whatever its kernels are: each check is a difference, and the largest that may be.

    fresh adapter        logits with a new adapter, beside those of the base
    merged               logits of the merged folder by plain transformers, beside the adapted model
    a step               A, B, m and their gradients, beside PEFT's definition and torch.optim.AdamW in float64
    spilled              parameters after steps with the optimizer's state spilled, beside resident
    resumed              the adapter of a run in two parts, beside that of a run in one

The model is a tiny Llama of random weights, made here. The alternative, a model from the hub, needs a network.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from qlora.config.commands import FinetuneConfig
from qlora.export.formats import merge
from qlora.layers import nf4
from qlora.layers.attach import adapter_parameters, attach, disabled
from qlora.layers.linear import NF4Linear
from qlora.models.load import load_base
from qlora.optim.adamw import PagedAdamW
from qlora.optim.disk_tier import in_memory
from qlora.run.adapted import load_adapted
from qlora.run.recipe import finetune
from qlora.run.verify import differences
from qlora.selftest.names import TRAINING as NAMES
from qlora.specs import AdapterSpec

RATE, SCALING = 1e-2, 2.0
Check = Callable[[torch.device], tuple[float, float]]  # (the difference, the largest that may be)


def write_model(folder: Path) -> None:
    """A random Llama with a tokenizer of one token a byte, and data for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(models.BPE(vocab=letters | {"<end>": 256}, merges=[]))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<end>").save_pretrained(
        folder / "model"
    )
    dice = random.Random(0)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(16):
            a, b = dice.randint(0, 99), dice.randint(0, 9)
            file.write(json.dumps({"question": f"{a}+{b}?", "answer": f"{a + b} " * dice.randint(1, 6)}) + "\n")


def _options(folder: Path, device: torch.device, output: str, **changes) -> FinetuneConfig:
    usual: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "output": str(folder / output),
    }
    usual |= {"device": str(device), "dtype": "fp32", "batch_size": 2, "rank": 4, "learning_rate": RATE, "steps": 4}
    usual |= {"schedule": "constant", "warmup": 0, "adapter_init": "zero", "max_tokens": 64}
    return FinetuneConfig(**{**usual, **changes})


def fresh_adapter(device: torch.device) -> tuple[float, float]:
    """A new DoRA adapter computes its base, up to rounding."""
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        model = attach(load_base(f"{name}/model", dtype="fp32", device=str(device)), AdapterSpec(method="dora"))
        ids = torch.arange(2, 40, device=device).view(2, -1)
        with torch.no_grad():
            found = model(input_ids=ids).logits
            with disabled(model):
                expected = model(input_ids=ids).logits
    return _relative(found, expected), 1e-4


def merged(device: torch.device) -> tuple[float, float]:
    """A trained adapter merged into its base, loaded by plain transformers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        finetune(_options(folder, device, "run"))
        merge(folder / "run/adapter", folder / "merged", dtype="fp32", verify=False)
        plain = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
        adapted, _ = load_adapted(folder / "run/adapter", device=str(device))
        ids = torch.arange(2, 40, device=device).view(2, -1)
        with torch.no_grad():
            return _relative(plain(input_ids=ids.cpu()).logits, adapted(input_ids=ids).logits.cpu()), 1e-4


def resumed(device: torch.device) -> tuple[float, float]:
    """The differences between a run of four steps and the same in two parts, to the bit: their number."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        finetune(_options(folder, device, "whole", save_every=2))
        finetune(_options(folder, device, "parts", save_every=2, steps=2))
        finetune(_options(folder, device, "parts", save_every=2, resume=True))
        return float(len(differences(folder / "whole", folder / "parts"))), 0.0


def spilled(device: torch.device) -> tuple[float, float]:
    """Five steps of AdamW with no state in memory, and with all of it: equal to the bit."""
    ends = []
    for memory in ("none", "all"):
        generator = torch.Generator().manual_seed(0)
        draws = [torch.randn(shape, generator=generator) for shape in ((64, 57), (1000,), (3,)) for _ in range(6)]
        parameters = [nn.Parameter(draws[6 * i].to(device)) for i in range(3)]
        optimizer = PagedAdamW(parameters, lr=RATE, memory=memory, folder=_on_a_disk())
        for step in range(5):
            for i, parameter in enumerate(parameters):
                parameter.grad = draws[6 * i + step + 1].to(device)
            optimizer.step()
        optimizer.close()
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    return float((ends[0] != ends[1]).sum()), 0.0


def _on_a_disk() -> Path:
    """A folder on a disk; that for temporary files lies in memory on many systems, and nothing is spilled there."""
    usual = Path(tempfile.gettempdir())
    others = (folder for folder in (Path("/var/tmp"), Path.home(), Path.cwd()) if os.access(folder, os.W_OK))
    return next((folder for folder in (usual, *others) if not in_memory(folder)), usual)


def lora_step(device: torch.device) -> tuple[float, float]:
    """A step of LoRA."""
    return _step("lora", device)


def dora_step(device: torch.device) -> tuple[float, float]:
    """A step of DoRA, whose norm is constant in the graph."""
    return _step("dora", device)


def _step(method: str, device: torch.device) -> tuple[float, float]:
    """A, B, m of one NF4 layer and their gradients in a step, beside the same in float64 by the definition."""
    generator = torch.Generator().manual_seed(0)
    dense, x, dy = (torch.randn(*shape, generator=generator) for shape in ((96, 128), (40, 128), (40, 96)))
    layer = NF4Linear(128, 96, False)
    layer.quantized = nf4.quantize((0.05 * dense).to(device))
    model = nn.Sequential(layer)
    attach(model, AdapterSpec(method="lora" if method == "lora" else "dora", rank=8, alpha=16.0))
    parameters = dict(zip("ABm", adapter_parameters(model), strict=False))
    with torch.no_grad():
        parameters["B"].copy_(0.05 * torch.randn(parameters["B"].shape, generator=generator))
    W = nf4.dequantize(layer.quantized, torch.float64)
    exact = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    optimizer = PagedAdamW(parameters.values(), lr=RATE)
    (model(x.to(device)) * dy.to(device)).sum().backward()
    optimizer.step()
    optimizer.close()
    updated = W + SCALING * exact["B"] @ exact["A"]
    if "m" in exact:
        updated = (exact["m"] / updated.norm(dim=1).detach()).unsqueeze(1) * updated
    theirs = torch.optim.AdamW(exact.values(), lr=RATE)
    ((x.to(device).double() @ updated.t()) * dy.to(device).double()).sum().backward()
    theirs.step()
    pairs = [(p, exact[name]) for name, p in parameters.items()]
    gradients = [(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None]
    assert len(gradients) == len(pairs)
    # the first step of AdamW knows little more than signs
    return max(_relative(found, wanted) for found, wanted in pairs + gradients), 1e-3


def _relative(found: Tensor, expected: Tensor) -> float:
    error = ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    return error if error == error else float("inf")


CHECKS: dict[str, Check] = dict(
    zip(NAMES, (fresh_adapter, merged, lora_step, dora_step, spilled, resumed), strict=True)
)

"""PEFT + bitsandbytes as the oracle, on the real SmolLM2: the same quantized bytes, the same A, B and m."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import relative, without_quantized_gemm
from tiny import disturb

from qlora import adapter_parameters, attach_adapters, load_base, named_adapters, save_adapter
from qlora.data.batch import pack
from qlora.data.tokenize import tokenize
from qlora.export.bnb import quantize_checkpoint
from qlora.layers.loss import loss_sum

TICKETS = Path(__file__).parents[2] / "scripts" / "data" / "tickets_test.jsonl"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """SmolLM2 as a 4-bit checkpoint, and an adapter of each method for it, away from its start."""
    folder = tmp_path_factory.mktemp("peft")
    quantize_checkpoint("smollm2-135m", folder / "base", dtype="fp32")
    for method in ("lora", "dora"):
        torch.manual_seed(3)
        model = attach_adapters(load_base(str(folder / "base"), dtype="fp32"), method=method, rank=7, alpha=10.0)
        disturb(model, spread=0.01, magnitudes=0.1)
        save_adapter(model, folder / method)
    return folder


@pytest.fixture(scope="module")
def batches(tokenizer):
    records = [json.loads(line) for line in TICKETS.read_text().splitlines()[:8]]
    examples = tokenize(records, tokenizer).examples
    return [pack(examples[i : i + 2]) for i in range(0, 8, 2)]


@pytest.fixture(scope="module")
def affordable(batches, tokenizer):
    """What PEFT can be given in bf16: where torch has no product of it but a plain loop (a CPU with AVX2 alone), the
    four batches would take it six minutes, and there one example has to do.
    """
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return batches
    record = json.loads(TICKETS.read_text().splitlines()[0])
    return [pack(tokenize([record], tokenizer).examples)]


@pytest.fixture
def batch(batches):
    return batches[0]


def ours(folder, method, dtype):
    from qlora import load_adapter

    return load_adapter(load_base(str(folder / "base"), dtype=dtype), folder / method)


def theirs(folder, method, dtype):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    # transformers leaves what a 4-bit checkpoint holds in float32 as it is: embeddings and norms are cast here as ours
    # are
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in base.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    return peft.PeftModel.from_pretrained(without_quantized_gemm(base), folder / method, is_trainable=True)


def loss_and_gradients(model, batch) -> dict[str, torch.Tensor]:
    """The mean loss and every adapter gradient under PEFT's name for it."""
    loss = loss_sum(model, batch) / batch.target_tokens
    loss.backward()
    if isinstance(model, peft.PeftModel):
        found = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
        found = {
            n.removeprefix("base_model.model.")
            .replace("lora_magnitude_vector.weight", "magnitude")
            .replace(".weight", ""): g
            for n, g in found.items()
        }
    else:
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **found}


def difference(a: list[dict], b: list[dict]) -> float:
    """Relative distance of the gradients of all adapters and batches taken together."""
    off = norm = 0.0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        off += sum((x[k].double() - y[k].double()).square().sum().item() for k in y if k != "loss")
        norm += sum(y[k].double().square().sum().item() for k in y if k != "loss")
    return (off / norm) ** 0.5


def over(model, batches) -> list[dict]:
    results = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        results.append(loss_and_gradients(model, batch))
    return results


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_same_loss_and_gradients(quantized, affordable, method):
    """fp32: the same loss to 1e-5. bf16: our error against fp32 is no larger than PEFT's.

    The error in bf16 is that of 30 layers of bf16 activations, which both share; the two draw other roundings from the
    same floor, so over four batches they differ by a few percent either way, and 10 % is allowed.
    """
    batches = affordable
    exact = over(ours(quantized, method, "fp32"), batches)
    peft_exact = over(theirs(quantized, method, torch.float32), batches)
    for mine, other in zip(exact, peft_exact, strict=True):
        assert abs(mine["loss"] - other["loss"]) < 1e-5 * other["loss"]
    assert difference(exact, peft_exact) < 1e-3
    half = over(ours(quantized, method, "bf16"), batches)
    peft_half = over(theirs(quantized, method, torch.bfloat16), batches)
    errors = {"ours": difference(half, exact), "PEFT": difference(peft_half, exact)}
    losses = {
        name: sum(abs(h["loss"] - e["loss"]).item() for h, e in zip(results, exact, strict=True)) / len(exact)
        for name, results in (("ours", half), ("PEFT", peft_half))
    }
    print(f"{method}, bf16 against fp32: gradients {errors}; loss {losses}")
    assert errors["ours"] <= 1.1 * errors["PEFT"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapter_files_both_ways(quantized, batch, tmp_path, method):
    """PEFT loads ours and we load PEFT's: fp32 logits equal to 1e-4 of the largest, on the quantized base."""
    from qlora import load_adapter

    mine, other = ours(quantized, method, "fp32").eval(), theirs(quantized, method, torch.float32).eval()
    with torch.no_grad():
        expected = mine(input_ids=batch.padded().input_ids).logits
        assert relative(other(input_ids=batch.padded().input_ids).logits, expected) < 1e-4
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
        other.save_pretrained(tmp_path)
        again = load_adapter(load_base(str(quantized / "base"), dtype="fp32"), tmp_path)
        changed = again(input_ids=batch.padded().input_ids).logits
        assert relative(other(input_ids=batch.padded().input_ids).logits, changed) < 1e-4
        assert relative(changed, expected) > 1e-3
    assert len(list(named_adapters(again))) == 210 and all(p.dtype == torch.float32 for p in adapter_parameters(again))

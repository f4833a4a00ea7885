"""The error start on whole models: what their layers are fed, that every architecture gains, and the gap to 16 bits."""

from __future__ import annotations

import functools

import peft
import pytest
import tiny
import torch
import transformers
from helpers import relative, without_quantized_gemm

from qlora import UserError, attach_adapters, load_base, merge, named_adapters, save_adapter
from qlora.calibrate.gap import can_measure, measure_gap
from qlora.calibrate.moments import input_moments, rectangles
from qlora.calibrate.start import start_by_error
from qlora.evaluate import evaluate
from qlora.export.peft import START, load_adapter
from qlora.models.originals import originals
from qlora.models.source import resolve

IDS = torch.arange(2, 34).view(2, 16)
TEXT = tiny.examples(*[(20 + i % 7, 9) for i in range(12)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(name)` is the folder of a tiny random model of that architecture."""
    place = tmp_path_factory.mktemp("models")

    @functools.cache
    def folder(name: str):
        tiny.build(name).save_pretrained(place / name)
        tiny.tokenizer().save_pretrained(place / name)
        return place / name

    return folder


def started(folder, **spec):
    """(A model with adapters that began by its error, its 16-bit weights, what came of it by layer.)"""
    torch.manual_seed(0)
    model = attach_adapters(load_base(str(folder), dtype="fp32"), **({"rank": 8, "alpha": 4.0} | spec))
    weights = originals(resolve(str(folder)))
    return model, weights, start_by_error(model, weights, rectangles(TEXT, 200, 0, 3))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2: Conv1D, biases
def test_adapted_layers_are_fed_as_by_plain_forward_passes(name):
    model = attach_adapters(tiny.random_model(name), method="lora")
    layers = dict(named_adapters(model))
    fed: dict[str, list[torch.Tensor]] = {module: [] for module in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, module=module: fed[module].append(x[0].flatten(0, 1)))
        for module, layer in layers.items()
    ]
    batches = rectangles(TEXT, 150, 0, 3)
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    found = dict(input_moments(model, {m: a.lora_A.shape[1] for m, a in layers.items()}, batches))
    assert found.keys() == layers.keys()
    for module, H in found.items():
        x = torch.cat(fed[module])
        assert torch.allclose(H[0], x.t() @ x / len(x), rtol=1e-4, atol=1e-5)


def test_rectangles_hold_no_padding_and_as_many_tokens_as_asked_for():
    batches = rectangles(TEXT, 150, 0, 3)
    lengths = [len(example.input_ids) for example in TEXT]
    assert 100 < sum(batch.numel() for batch in batches) <= 150
    starts = {example.input_ids[: min(lengths)] for example in TEXT}
    assert all(tuple(row[: min(lengths)].tolist()) in starts for b in batches for row in b if len(row) >= min(lengths))
    filled = rectangles(TEXT, 150, 0, 3, 100)
    assert len(filled) < len(batches) and all(len(batch) == 3 or batch.numel() <= 100 for batch in filled)
    assert rectangles([], 150, 0, 3) == [] and rectangles(TEXT, 1, 0, 3) == []


@pytest.mark.parametrize("name", [*tiny.CONFIGS, *sorted(tiny.MORE.keys() - {"qwen3_next"})])  # it gains too, in 12 s
def test_every_architecture_gains(folders, name):
    model, weights, layers = started(folders(name), method="lora")
    adapted = dict(named_adapters(model))
    assert weights.there == adapted.keys() and can_measure(model, weights)
    reached = {module: layer for module, layer in layers.items() if layer.before > 0}
    assert len(reached) > len(adapted) // 2
    assert all(layer.after < layer.before for layer in reached.values())
    gap = measure_gap(model, weights, TEXT[:4], 4)
    assert gap.kl < 0.8 * gap.kl_base + 1e-7  # granite: hardly a gap, among rounding


def test_the_gap_is_that_of_the_16_bit_model(folders):
    model, weights, _ = started(folders("llama"))
    sixteen = load_base(str(folders("llama")), bits=16, dtype="fp32")
    four = load_base(str(folders("llama")), dtype="fp32")
    gap, again = measure_gap(model, weights, TEXT, 4), measure_gap(model, weights, TEXT, 4)
    losses = [evaluate(found, TEXT).loss for found in (sixteen, four, model)]
    assert [gap.loss16, gap.loss_base, gap.loss] == pytest.approx(losses, rel=1e-5)
    assert gap == again and gap.kl < gap.kl_base  # and the weights of the file are as they were


def test_magnitudes_take_the_best_factor_of_each_row(folders):
    errors = {method: started(folders("llama"), method=method)[2] for method in ("lora", "dora")}
    assert all(errors["dora"][name].after < layer.after for name, layer in errors["lora"].items())


def test_targets_of_any_kind(folders):
    model, _, layers = started(folders("llama"), targets="q_proj,down_proj")
    assert layers.keys() == dict(named_adapters(model)).keys() and len(layers) == 4


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_untrained_it_merges_onto_the_original_as_nothing(folders, tmp_path, name, method):
    """Else the correction would count twice. Onto the dequantized weights it is merged as it is."""
    model, _, _ = started(folders(name), method=method)
    save_adapter(model, tmp_path / "adapter")
    for base in ("original", "dequantized"):
        merge(tmp_path / "adapter", tmp_path / base, base=base, dtype="fp32")
    sixteen = load_base(str(folders(name)), bits=16, dtype="fp32")
    merged = [load_base(str(tmp_path / base), bits=16, dtype="fp32") for base in ("original", "dequantized")]
    assert relative(logits(merged[0]), logits(sixteen)) < 1e-5
    assert relative(logits(merged[1]), logits(model)) < 1e-4


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_trained_it_merges_onto_the_original_as_what_was_learned(folders, tmp_path, method):
    """LoRA: s (B A - B0 A0) on the 16-bit weights, computed dense."""
    model, weights, _ = started(folders("llama"), method=method)
    start = {name: [p.detach().clone() for p in a.parameters(recurse=False)] for name, a in named_adapters(model)}
    tiny.disturb(model, spread=0.05, magnitudes=0.1)
    save_adapter(model, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base="original", dtype="fp32")
    merged = load_base(str(tmp_path / "merged"), bits=16, dtype="fp32")
    for name, layer in named_adapters(model):
        A, B, m = layer.factors()
        W, s = weights.weight(name), layer.scaling
        A0, B0 = start[name][:2]
        V = W + s * (B @ A - B0 @ A0)
        if m is not None:
            V = V / V.norm(dim=1, keepdim=True) * (m / start[name][2] * W.norm(dim=1)).unsqueeze(1)
        assert relative(merged.get_submodule(name).weight, V.detach()) < 1e-5


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_computes_the_same_on_the_same_base(folders, tmp_path, method):
    """On a base whose weights are the dequantized ones, as bitsandbytes decodes them too (test_nf4.py)."""
    model, _, _ = started(folders("llama"), method=method)
    save_adapter(model, tmp_path)
    plain = tiny.build("llama")
    with torch.no_grad():
        for name, layer in named_adapters(model):
            plain.get_submodule(name).weight.copy_(layer.base.frozen.dense(torch.float32))
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with theirs.disable_adapter():
        assert relative(logits(theirs), logits(model)) > 1e-3
    assert relative(logits(theirs), logits(model)) < 1e-5


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_on_bitsandbytes_computes_the_same(folders, tmp_path, method):
    """On the original, which bitsandbytes quantizes itself as `load_in_4bit`."""
    model, _, _ = started(folders("llama"), method=method)
    save_adapter(model, tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folders("llama"), quantization_config=config, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(without_quantized_gemm(base), str(tmp_path)).eval()
    with theirs.disable_adapter():
        assert relative(logits(theirs), logits(model)) > 1e-3
    assert relative(logits(theirs), logits(model)) < 1e-5


def test_the_start_goes_with_the_adapter(folders, tmp_path):
    """Saved, loaded, saved again, it stays what it was; without its file a merge onto the original is refused."""
    model, _, _ = started(folders("llama"))
    save_adapter(model, tmp_path / "one")
    tiny.disturb(model)
    save_adapter(model, tmp_path / "two")
    again = load_adapter(load_base(str(folders("llama")), dtype="fp32"), tmp_path / "two")
    save_adapter(again, tmp_path / "three")
    files = [(tmp_path / folder / START).read_bytes() for folder in ("one", "two", "three")]
    assert files[0] == files[1] == files[2]
    (tmp_path / "three" / START).unlink()
    with pytest.raises(UserError, match="start"):
        merge(tmp_path / "three", tmp_path / "merged", base="original")
    assert not (tmp_path / "merged").exists()
    save_adapter(attach_adapters(load_base(str(folders("llama")))), tmp_path / "zero")
    assert not (tmp_path / "zero" / START).exists()

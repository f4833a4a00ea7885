"""The codes of a base come from the values that its checkpoint stores, whatever this machine computes in; adapters and
runs of earlier versions, which rounded first, keep the values that they learned on.
"""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from ggufs import write_gguf
from helpers import relative, unsealed
from tiny import adapted, random_model

from qlora import UserError, load_adapter, load_base, merge, save_adapter
from qlora.config.commands import FinetuneConfig
from qlora.export.bnb import quantize_checkpoint
from qlora.run.adapted import load_adapted
from qlora.run.identity import quantization_of
from qlora.specs import Quantization

IDS = torch.arange(2, 20).view(2, 9)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases[kind]` is the same tiny Llama stored in float32, in 16 bits, and as a GGUF file."""
    place = tmp_path_factory.mktemp("bases")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        random_model("llama").to(dtype).save_pretrained(place / name)
        tiny.tokenizer().save_pretrained(place / name)
    found = {name: str(place / name) for name in ("fp32", "bf16", "fp16")}
    return found | {"gguf": str(write_gguf(place / "model.gguf", random_model("llama")))}


def parts(model):
    """Codes and constants by name."""
    return {name: value for name, value in model.named_buffers() if "inv_freq" not in name}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "gguf"])
def test_codes_do_not_depend_on_what_is_computed_in(bases, kind):
    """They are those of the stored values; all else is in the dtype asked for."""
    found = {dtype: load_base(bases[kind], dtype=dtype) for dtype in ("fp32", "bf16", "fp16")}
    assert len(parts(found["fp32"])) == 14 * 4
    assert same(parts(found["fp32"]), parts(found["bf16"])) and same(parts(found["fp32"]), parts(found["fp16"]))
    expected = load_base(bases["fp32"], dtype="fp32") if kind == "gguf" else found["fp32"]
    assert same(parts(found["bf16"]), parts(expected))
    assert found["bf16"].model.embed_tokens.weight.dtype == torch.bfloat16
    assert found["bf16"].qlora.base.stored == ("fp32" if kind == "gguf" else kind)
    rounded = load_base(bases[kind], dtype="fp32", cast_to="bf16")
    assert same(parts(rounded), parts(found["fp32"])) == (kind == "bf16")


def test_a_written_base_has_the_same_codes(bases, tmp_path):
    for dtype in ("fp32", "bf16"):
        quantize_checkpoint(bases["fp32"], tmp_path / dtype, dtype=dtype)
        written = load_base(str(tmp_path / dtype), dtype="fp32")
        assert same(parts(written), parts(load_base(bases["fp32"], dtype="fp32")))


def earlier(folder):
    """An adapter's folder as earlier versions wrote it, whose base was rounded to bf16 first."""
    recipe = unsealed(folder) / "qlora.json"
    own = json.loads(recipe.read_text())
    assert own["base"]["cast"] == "bf16"
    del own["base"]["stored"], own["base"]["cast"]
    recipe.write_text(json.dumps(own))
    return folder


def test_an_adapter_of_before_keeps_its_base(bases, tmp_path):
    model = adapted(load_base(bases["fp32"], dtype="bf16", cast_to="bf16"))
    folder = earlier(save_adapter(model, tmp_path / "adapter", tiny.tokenizer()))
    assert same(parts(load_adapted(folder, device="cpu")[0]), parts(model))
    merge(folder, tmp_path / "merged", dtype="fp32")
    merged = load_base(str(tmp_path / "merged"), bits=16, dtype="fp32")
    again = load_adapter(load_base(bases["fp32"], dtype="fp32", cast_to="bf16"), folder)
    with torch.no_grad():  # training saw all that is not quantized in bf16
        for name, parameter in again.named_parameters():
            if "lora" not in name and "magnitude" not in name:
                parameter.copy_(parameter.bfloat16())
    assert relative(logits(merged), logits(again)) < 1e-4
    with pytest.raises(UserError, match="was trained on weights that were rounded to bf16"):
        load_adapter(load_base(bases["fp32"], dtype="bf16"), folder)


def test_where_rounding_changed_nothing_an_adapter_of_before_loads(bases, tmp_path):
    model = adapted(load_base(bases["bf16"], dtype="bf16", cast_to="bf16"))
    folder = earlier(save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(load_adapter(load_base(bases["bf16"], dtype="bf16"), folder)), logits(model))


def test_a_run_of_before_goes_on_with_its_base(bases, tmp_path):
    """And one of today with the stored values."""
    config = FinetuneConfig(model=bases["fp32"], data="d", output="o")
    today = save_adapter(adapted(load_base(bases["fp32"], dtype="bf16")), tmp_path / "today")
    before = adapted(load_base(bases["fp32"], dtype="bf16", cast_to="bf16"))
    assert quantization_of(config, None) == quantization_of(config, today) == Quantization()
    folder = earlier(save_adapter(before, tmp_path / "before"))
    assert quantization_of(config, folder) == Quantization(cast_to="bf16")
    assert quantization_of(FinetuneConfig(model="m", data="d", output="o", bits=16), folder) == Quantization(16)


def test_a_gguf_base_merges_onto_its_own_weights(bases, tmp_path):
    save_adapter(adapted(load_base(bases["gguf"], dtype="fp32")), tmp_path / "adapter", tiny.tokenizer())
    merge(tmp_path / "adapter", tmp_path / "merged", base="original", dtype="fp32")
    assert load_base(str(tmp_path / "merged"), bits=16).qlora.base.bits == 16


@pytest.mark.parametrize("given", [{"cast_to": "int8"}, {"cast_to": "bf16", "bits": 16}])
def test_what_cannot_be_cast_to(bases, given):
    with pytest.raises(UserError, match=r"cast_to=.*must be bf16, fp16 or fp32"):
        load_base(bases["fp32"], **given)

"""Bases whose codes a text chose: written by `quantize`, trained on by `finetune`, known again, refused where none can
be."""

from __future__ import annotations

import json
import shutil

import bitsandbytes
import pytest
import tiny
import torch
import transformers
from helpers import relative, without_quantized_gemm
from runs import metrics, refused, same_files
from safetensors.torch import load_file

from qlora import load_base, merge
from qlora.calibrate.moments import rectangles
from qlora.cli import main
from qlora.config.commands import QuantizeConfig
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.errors import UserError
from qlora.export.bnb import quantize_checkpoint
from qlora.export.peft import START, load_adapter
from qlora.layers import nf4
from qlora.layers.linear import linear_names
from qlora.models.originals import originals
from qlora.models.source import resolve
from qlora.run.codes import quantize_command
from qlora.run.recipe import finetune

IDS = torch.arange(2, 34).view(2, 16)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def written(place):
    """`quantize --codes gptq` of the tiny model."""
    data = str(place / "data.jsonl")
    options = {"model": str(place / "model"), "dtype": "fp32", "codes": "gptq"}
    quantize_command(QuantizeConfig(output=str(place / "chosen"), calibrate=f"{data}:400", **options))
    return place / "chosen"


def test_bitsandbytes_reads_the_codes_as_we_do(place, written):
    ours = load_base(str(written), dtype="fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    nearest = load_base(str(place / "model"), dtype="fp32")
    for name in linear_names(theirs):
        weight, layer = theirs.get_submodule(name).weight, ours.get_submodule(name)
        decoded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(decoded, nf4.dequantize(layer.quantized))
        assert torch.equal(layer.absmax, nearest.get_submodule(name).absmax)
        assert not torch.equal(layer.weight, nearest.get_submodule(name).weight)
    assert relative(logits(without_quantized_gemm(theirs)), logits(ours)) < 1e-5


def test_the_model_is_nearer_to_its_16_bits(place, written):
    """On text that the codes were not chosen by."""
    records = read_records(str(place / "held.jsonl"))
    (ids, *_) = rectangles(tokenize(records, tiny.tokenizer()).examples, 200, 0, 4)
    sixteen = load_base(str(place / "model"), bits=16, dtype="fp32")
    models = sixteen, load_base(str(written), dtype="fp32"), load_base(str(place / "model"), dtype="fp32")
    with torch.no_grad():
        exact, chosen, nearest = (model(input_ids=ids).logits for model in models)
    assert relative(chosen, exact) < 0.9 * relative(nearest, exact)


@pytest.mark.parametrize("init", ["zero", "error"])
def test_a_run_on_codes_of_its_own(config, tmp_path, capsys, init):
    result = finetune(config(codes="gptq", adapter_init=init, save_every=2))
    assert "codes    chosen in 14 of 14 layers" in capsys.readouterr().out
    base = tmp_path / "run/base"
    own = json.loads((result.adapter / "qlora.json").read_text())
    assert own["base"]["model"] == str(base) and (result.adapter / START).exists() == (init == "error")
    if init == "error":
        first = metrics(tmp_path / "run")[0]
        assert first["layer_error"] < first["layer_error_base"] and first["gap_kl"] < first["gap_kl_base"]
    adapted = load_adapter(load_base(str(base), dtype="fp32"), result.adapter)
    merge(result.adapter, tmp_path / "merged", dtype="fp32")
    assert relative(logits(load_base(str(tmp_path / "merged"), bits=16, dtype="fp32")), logits(adapted)) < 1e-5
    with pytest.raises(UserError, match="no original weights"):
        merge(result.adapter, tmp_path / "again", base="original")


def test_resumed_is_uninterrupted_and_takes_the_base_as_it_is(config, tmp_path, capsys):
    options = {"codes": "gptq", "adapter_init": "error", "save_every": 2}
    finetune(config("whole", **options))
    begun = shutil.copytree(tmp_path / "whole", tmp_path / "begun")
    shutil.rmtree(begun / "adapter")
    shutil.rmtree(begun / "checkpoints/step-000004")
    capsys.readouterr()
    finetune(config("begun", resume=True, **options))
    assert "codes    " not in capsys.readouterr().out
    same_files(tmp_path / "whole/checkpoints/step-000004", begun / "checkpoints/step-000004")
    (problem,) = refused(config("begun", resume=True, adapter_init="error"))
    assert problem.startswith("codes=nearest: the run began with codes=gptq")


def test_a_base_quantized_again_by_other_text_is_refused(config, place, tmp_path):
    result = finetune(config(codes="gptq"))
    other = tiny.write_data(tmp_path / "other.jsonl", seed=9)
    options = {"model": str(place / "model"), "dtype": "fp32", "codes": "gptq"}
    base = tmp_path / "run/base"
    shutil.rmtree(base)
    quantize_command(QuantizeConfig(output=str(base), calibrate=f"{other}:99", **options))
    with pytest.raises(UserError, match="was trained on"):
        load_adapter(load_base(str(base), dtype="fp32"), result.adapter)
    shutil.rmtree(result.adapter)
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = load_file(base / "model.safetensors")
    (problem,) = refused(config(codes="gptq"))
    assert problem.startswith("output=") and "made by other text" in problem and "Remove it" in problem
    assert all(torch.equal(value, before[key]) for key, value in load_file(base / "model.safetensors").items())


def test_what_cannot_be_is_refused_before_anything_is_written(config, place, tmp_path):
    quantize_checkpoint(str(place / "model"), tmp_path / "packed")
    packed = {"model": str(tmp_path / "packed")}
    (problem,) = refused(config(codes="gptq", **packed))
    assert problem.startswith("codes=gptq: the model is 4-bit already")
    options = {"codes": "gptq", "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match="is NF4 already"):
        quantize_command(QuantizeConfig(calibrate=str(place / "data.jsonl"), **packed, **options))
    shutil.copytree(place / "model", tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(load_base(str(place / "model"), bits=16).state_dict(), tmp_path / "pickled/pytorch_model.bin")
    assert not originals(resolve(str(tmp_path / "pickled"))).there
    with pytest.raises(UserError, match=r"codes=gptq: no 16-bit weight .* a pickle"):
        quantize_command(
            QuantizeConfig(model=str(tmp_path / "pickled"), calibrate=str(place / "data.jsonl"), **options)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"codes": "gptq"}, "calibrate=(not given): is needed by codes=gptq"),
        ({"codes": "gptq", "calibrate": "400"}, "calibrate=400: names no data"),
        ({"calibrate": "x.jsonl"}, "calibrate=x.jsonl: nothing is calibrated with the nearest codes"),
        ({"codes": "gptq", "calibrate": "x.jsonl:1"}, "calibrate=x.jsonl:1: must be 2 to 1,000,000,000 tokens"),
    ],
)
def test_options_of_quantize_that_contradict_each_other(options, said):
    with pytest.raises(UserError) as error:
        QuantizeConfig(model="m", output="o", **options)
    assert error.value.problems[0].startswith(said) and len(error.value.problems) == 1


def test_the_command_line_passes_both_on(place, written, tmp_path):
    where = ["--model", str(place / "model"), "--output", str(tmp_path / "chosen"), "--dtype", "fp32"]
    assert main(["quantize", *where, "--codes", "gptq", "--calibrate", f"{place / 'data.jsonl'}:400"]) == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "chosen", written))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_16_bits_have_no_codes(config):
    with pytest.raises(UserError, match="codes=gptq: 16-bit weights have no codes"):
        config(codes="gptq", bits=16)

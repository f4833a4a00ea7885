"""What a Python caller gives is held to the rules of the command line: one line, before anything is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from helpers import unsealed
from torch import nn

import qlora
from qlora.export.bnb import quantize_checkpoint
from qlora.export.peft import adapter_tokenizer, read_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(tiny.write_model(tmp_path_factory.mktemp("callers") / "model"))


@pytest.fixture(scope="module")
def adapter(model) -> Path:
    adapted = qlora.attach_adapters(qlora.load_base(model), rank=2)
    return qlora.save_adapter(adapted, model.parent / "adapter", qlora.load_tokenizer(model))


def refused(call) -> str:
    with pytest.raises(qlora.UserError) as caught:
        call()
    (line,) = caught.value.problems
    assert line.endswith(".") and "\n" not in line
    return line


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float32}, {"dtype": "float32"}, {"dtype": None}, {"device": None}, {"device": "tpu"}, {"bits": 5}],
    ids=str,
)
def test_load_base(model, options):
    (name,) = options
    assert refused(lambda: qlora.load_base(model, **options)).startswith(f"{name}=")


@pytest.mark.parametrize("given", ["no", 0, None])
def test_trust_is_true_or_false(model, adapter, given):
    for call in (qlora.load_base, qlora.load_tokenizer):
        assert refused(lambda call=call: call(model, trust_remote_code=given)).startswith("trust_remote_code=")
    merged = refused(lambda: qlora.merge(adapter, model.parent / "merged", trust_remote_code=given))
    assert merged.startswith("trust_remote_code=") and not (model.parent / "merged").exists()


@pytest.mark.parametrize("name", ["", 3, ["a"]], ids=str)
def test_an_adapter_has_a_name(model, adapter, name):
    base = qlora.load_base(model)
    assert refused(lambda: qlora.load_adapter(base, adapter, name)).startswith("name=")
    qlora.load_adapter(base, adapter, "a/b")
    assert refused(lambda: qlora.load_adapter(base, adapter, "a/b")).startswith("name=a/b:")


def test_a_path_is_a_model(model):
    assert qlora.load_base(model).qlora.base.model == str(model)
    assert qlora.load_tokenizer(model)("word").input_ids


@pytest.mark.parametrize(
    "options",
    [{"rslora": "yes"}, {"targets": 3}, {"targets": [3]}, {"rank": True}, {"alpha": float("nan")}, {"dropout": "0"}],
    ids=str,
)
def test_attach(options):
    (name,) = options
    model = tiny.random_model("llama")
    assert refused(lambda: qlora.attach_adapters(model, **options)).startswith(f"{name}=")


@pytest.mark.parametrize("call", [qlora.quantize_, qlora.attach_adapters])
@pytest.mark.parametrize("module", [nn.Linear(64, 64), nn.Sequential(nn.ReLU())], ids=["a layer", "none"])
def test_nothing_to_quantize_or_adapt(call, module):
    assert "no linear layer beneath it" in refused(lambda: call(module))


@pytest.mark.parametrize("options", [{"bits": 16}, {"bits": 3}, {"blocksize": 65}, {"scales": "max"}], ids=str)
def test_what_quantizes_to_nf4(model, tmp_path, options):
    """`bits=16` had been taken, and the weights quantized all the same."""
    (name,) = options
    quantization, module = qlora.Quantization(**options), nn.Sequential(nn.Linear(64, 64))
    assert refused(lambda: qlora.quantize_(module, quantization)).startswith(f"{name}=")
    assert type(module[0]) is nn.Linear
    made = tmp_path / "made"
    assert refused(lambda: quantize_checkpoint(model, made, quantization=quantization)).startswith(f"{name}=")
    assert refused(lambda: quantize_checkpoint(model, made, shard_size=0)).startswith("shard_size=")
    assert not made.exists()


@pytest.mark.parametrize(
    "spec, verify",
    [
        ({"shard_size": -3}, {}),
        ({"shard_size": 1.5}, {}),
        ({"to": "bnb4-lora", "double_quant": "no"}, {}),
        ({}, {"max_kl": float("nan")}),
        ({}, {"max_kl": 0}),
    ],
    ids=str,
)
def test_export(adapter, tmp_path, spec, verify):
    """Against a limit of NaN everything had been close."""
    name = [*spec, *verify][-1]
    made, spec = tmp_path / "made", qlora.ExportSpec(**spec)
    line = refused(lambda: qlora.export_adapter(adapter, made, spec, verify=qlora.VerifySpec(**verify)))
    assert line.startswith(f"{name}=") and not made.exists()


def test_paths_of_a_config(model):
    config = qlora.FinetuneConfig(model=model, data=model / "data.jsonl", output=Path("out"))
    assert (config.model, config.data, config.output) == (str(model), str(model / "data.jsonl"), "out")
    line = refused(lambda: qlora.FinetuneConfig(model=model, data=model, output="out", rank=Path("eight")))
    assert line.startswith("rank=")


@pytest.fixture
def edited(adapter, tmp_path):
    """Writes one key into a file of a copy of the adapter; gives the copy."""

    def edit(name: str, change: dict) -> Path:
        copy = unsealed(Path(shutil.copytree(adapter, tmp_path / "adapter")))
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | change))
        return copy

    return edit


@pytest.mark.parametrize(
    "change", [{"dtype": "f8"}, {"stored": "int8"}, {"cast": "x" * 9999}], ids=["dtype", "stored", "cast"]
)
def test_a_base_in_no_dtype(adapter, edited, change):
    base = json.loads((adapter / "qlora.json").read_text())["base"]
    folder = edited("qlora.json", {"base": base | change})
    assert f"{next(iter(change))} is " in refused(lambda: read_adapter(folder))


def test_an_adapters_tokenizer_is_tried_like_a_models(edited):
    folder = edited("tokenizer_config.json", {"model_max_length": [[1]]})
    assert "its tokenizer cannot be loaded" in refused(lambda: adapter_tokenizer(folder))

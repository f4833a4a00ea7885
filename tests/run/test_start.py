"""Runs whose adapters begin by undoing the error of the base: resumed to the bit, known by the checkpoint, refused."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import tiny
import torch
from helpers import unsealed
from runs import metrics, refused, same_files
from safetensors.torch import load_file

from qlora import load_base
from qlora.config.commands import FinetuneConfig
from qlora.data.tokenize import tokenize
from qlora.export.bnb import quantize_checkpoint
from qlora.export.peft import START
from qlora.run.recipe import finetune

ALL = {"dropout": 0.1, "weight_decay": 0.1, "rslora": True, "gradient_checkpointing": True}


@pytest.fixture
def error(config):
    """Options of a short run that begins so."""
    return lambda output="run", **changes: config(output, **({"adapter_init": "error"} | changes))


def test_what_a_run_says_of_its_start(error, config, place, tmp_path, capsys):
    result = finetune(error(eval_data=str(place / "held.jsonl")))
    assert "14 of 14 layers undo their quantization error" in capsys.readouterr().out
    first = metrics(tmp_path / "run")[0]
    assert first["step"] == 0 and first["eval_loss"] == result.eval_loss_before
    assert first["gap_kl"] < 0.8 * first["gap_kl_base"] and first["layer_error"] < 0.8 * first["layer_error_base"]
    assert first["gap_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    own = json.loads((result.adapter / "qlora.json").read_text())
    assert own["start"] == "error" and START in own["files"] and "kl_at_the_start" in own["notes"]
    result = finetune(config("zero", adapter_init="zero"))
    assert not (result.adapter / START).exists() and metrics(tmp_path / "zero")[0]["step"] == 1
    assert json.loads((result.adapter / "qlora.json").read_text())["start"] == "zero"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_resumed_is_uninterrupted_to_the_bit(error, tmp_path, method):
    finetune(error("whole", method=method, save_every=2, **ALL))
    begun = shutil.copytree(tmp_path / "whole", tmp_path / "begun")
    shutil.rmtree(begun / "adapter")
    shutil.rmtree(begun / "checkpoints/step-000004")
    torch.manual_seed(99)
    finetune(error("begun", method=method, save_every=2, resume=True, **ALL))
    same_files(tmp_path / "whole/checkpoints/step-000004", begun / "checkpoints/step-000004")
    for folder in ("checkpoints/step-000002", "checkpoints/step-000004", "adapter"):
        assert (tmp_path / "whole" / folder / START).read_bytes() == (begun / folder / START).read_bytes()
    assert metrics(begun)[0]["gap_kl"] > 0


def test_the_start_is_that_of_the_calibration_text(error, place, tmp_path):
    tiny.write_data(tmp_path / "other.jsonl", seed=5)
    for output, calibrate in (("one", None), ("two", str(tmp_path / "other.jsonl:99")), ("three", None)):
        finetune(error(output, steps=1, calibrate=calibrate))
    starts = [load_file(tmp_path / output / "adapter" / START) for output in ("one", "two", "three")]
    assert any(not torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert all(torch.equal(starts[0][key], starts[2][key]) for key in starts[0])


def test_a_number_is_how_many_tokens_of_the_training_data(error, place, tmp_path):
    for output, calibrate in (("number", "99"), ("data", f"{place / 'data.jsonl'}:99"), ("usual", None)):
        finetune(error(output, steps=1, calibrate=calibrate))
    number, data, usual = (load_file(tmp_path / name / "adapter" / START) for name in ("number", "data", "usual"))
    assert all(torch.equal(number[key], data[key]) for key in number)
    assert any(not torch.equal(number[key], usual[key]) for key in number)


def test_a_number_that_is_also_a_name_is_asked_about(error, tmp_path, monkeypatch):
    (tmp_path / "2024").mkdir()
    tiny.write_data(tmp_path / "2024" / "text.jsonl", seed=5)
    monkeypatch.chdir(tmp_path)
    (problem,) = refused(error(calibrate="2024"))
    assert problem.startswith("calibrate=2024: is a number of tokens, and a name in this folder. Give `./2024`")
    assert finetune(error(calibrate="./2024", steps=1)).steps == 1


def test_the_gap_is_measured_on_few_tokens(error, tmp_path):
    """On records that begin within the first 512, where the start took few: three models compute each."""
    records = [{"question": "?" * 40, "answer": f"{n:02d}" * 20} for n in range(10, 30)]
    (tmp_path / "held.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    finetune(error(steps=1, eval_data=str(tmp_path / "held.jsonl"), eval_every=1))
    examples = tokenize(records, tiny.tokenizer()).examples[:16]
    before = itertools.accumulate((len(example.input_ids) for example in examples), initial=0)
    targets = [sum(example.loss_mask) for example, count in zip(examples, before, strict=False) if count < 512]
    assert metrics(tmp_path / "run")[0]["gap_target_tokens"] == sum(targets) and 5 < len(targets) < 16


def test_a_resume_from_another_start_is_refused(error, config, tmp_path):
    finetune(error(save_every=2))
    (problem,) = refused(config(resume=True, adapter_init="zero"))
    assert problem.startswith("adapter_init=zero: the run began with adapter_init=error")
    assert finetune(error(resume=True)).steps == 4
    finetune(config("old", adapter_init="zero"))  # a checkpoint from before the option
    path = unsealed(tmp_path / "old/checkpoints/step-000004") / "state.json"
    state = json.loads(path.read_text())
    del state["run"]["options"]["adapter_init"], state["run"]["options"]["calibrate"]
    path.write_text(json.dumps(state))
    (problem,) = refused(error("old", resume=True))
    assert problem.startswith("adapter_init=error: the run began with adapter_init=zero")
    for goes_on in ("auto", "zero"):
        assert finetune(config("old", adapter_init=goes_on, resume=True)).steps == 4


def test_adapters_undo_the_error_unless_told_otherwise_where_that_is_possible(config, place, tmp_path, capsys):
    quantize_checkpoint(str(place / "model"), tmp_path / "nf4")
    for output, changes, start in (
        ("usual", {}, "error"),
        ("none", {"adapter_init": "zero"}, "zero"),
        ("sixteen", {"bits": 16}, "zero"),
        ("packed", {"model": str(tmp_path / "nf4")}, "zero"),
    ):
        capsys.readouterr()
        result = finetune(config(output, **({"steps": 1, "adapter_init": "auto"} | changes)))
        said = capsys.readouterr().out
        assert json.loads((result.adapter / "qlora.json").read_text())["start"] == start
        assert ("undo their quantization error" in said) == (start == "error")
        assert ("is 4-bit already has no 16-bit weights" in said) == (output == "packed")


def test_what_is_impossible_is_refused_before_anything_is_loaded(error, place, tmp_path):
    quantize_checkpoint(str(place / "model"), tmp_path / "nf4")
    packed = {"model": str(tmp_path / "nf4")}
    (problem,) = refused(error(**packed))
    assert problem.startswith("adapter_init=error: the model is 4-bit already and has no 16-bit weights")
    problems = refused(error(calibrate="nowhere.jsonl", eval_data="nothing.jsonl"))
    assert [any(name in line for line in problems) for name in ("nowhere", "nothing")] == [True, True]


@pytest.mark.parametrize(
    "options, name",
    [
        ({"bits": 16, "adapter_init": "error"}, "adapter_init=error"),
        ({"calibrate": "x.jsonl", "adapter_init": "zero"}, "calibrate=x.jsonl"),
        ({"calibrate": "x.jsonl", "bits": 16}, "calibrate=x.jsonl"),
        ({"adapter_init": "error", "calibrate": "x.jsonl:0"}, "calibrate=x.jsonl:0"),
        ({"adapter_init": "error", "calibrate": "1"}, "calibrate=1: must be 2 to 1,000,000,000 tokens"),
        ({"adapter_init": "error", "calibrate": "9" * 5000}, "calibrate=9"),
        ({"adapter_init": "error", "calibrate": "x.jsonl:" + "9" * 5000}, "calibrate=x.jsonl:9"),
    ],
)
def test_options_that_contradict_each_other(options, name):
    with pytest.raises(ValueError) as error:
        FinetuneConfig(model="m", data="d", output="o", **options)
    assert str(error.value).startswith(name) and "\n" not in str(error.value)


def test_only_some_layers_found_is_said(error, place, tmp_path, capsys):
    """A checkpoint that is a pickle: its tensors cannot be read one by one."""
    model = load_base(str(place / "model"), bits=16, dtype="fp32")
    shutil.copytree(place / "model", tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    finetune(error(model=str(tmp_path / "pickled")))
    assert "0 of 14 layers" in capsys.readouterr().out


def test_the_error_of_each_layer_is_told_on_request(error, capsys):
    finetune(error(steps=1))
    assert "down_proj" not in capsys.readouterr().out.split("start    ")[1]
    finetune(error("more", steps=1, verbose=True, codes="gptq"))
    said = capsys.readouterr().out
    for part in (said.split("codes    ")[1].split("model    ")[0], said.split("start    ")[1]):
        lines = [line.split() for line in part.splitlines() if " % (was " in line and "layers." in line]
        now, was = ([float(value) for value in column] for column in zip(*[(w[0], w[3]) for w in lines], strict=True))
        assert len(lines) == 14 and now == sorted(now, reverse=True)
        assert all(one < other for one, other in zip(now, was, strict=True))

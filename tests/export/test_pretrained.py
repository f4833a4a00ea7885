"""`save_pretrained` of a model of ours writes what loads: an adapter, or bitsandbytes' layout; transformers.Trainer
goes on from it.
"""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import peft
import pytest
import tiny
import torch
import transformers
from helpers import relative, without_quantized_gemm
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import qlora
from qlora import UserError, load_adapter, load_base

IDS = torch.arange(3, 43).reshape(2, 20)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def based(saved_models, family: str, bits: int = 4) -> torch.nn.Module:
    return load_base(str(saved_models(family)), bits=bits, dtype="fp32", device="cpu")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapted_model_saves_an_adapter_that_loads(saved_models, tmp_path, family, method, capsys):
    """Here to the bit, without a note; in PEFT; and by transformers alone, which takes the base from the adapter, but
    passes over magnitudes, PEFT's own too.
    """
    model = tiny.adapted(based(saved_models, family, 16), method)
    model.save_pretrained(tmp_path / "out")
    expected = logits(model)
    again = load_adapter(based(saved_models, family, 16), tmp_path / "out")
    assert torch.equal(logits(again), expected) and not capsys.readouterr().err
    plain = AutoModelForCausalLM.from_pretrained(saved_models(family), dtype=torch.float32)
    assert relative(logits(plain), expected) > 1e-3
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    assert relative(logits(theirs), expected) < 1e-5
    if method == "lora":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert relative(logits(theirs), expected) < 1e-5


def test_it_is_small_and_leaves_what_is_there(saved_models, tmp_path):
    """The frozen weights are not in it; files of others stay, a card too; it can be written again."""
    model = tiny.adapted(based(saved_models, "llama"))
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "thesis.tex").write_text("years")
    for _ in range(2):
        model.save_pretrained(str(tmp_path), max_shard_size="1GB")
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert set(file.keys()) == {name for name, p in model.named_parameters() if p.requires_grad}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "README.md",
        "thesis.tex",
        "adapter_config.json",
        "adapter_model.safetensors",
        "qlora.json",
        "model.safetensors",
    }
    assert (tmp_path / "README.md").read_text() == "mine"
    other = tiny.adapted(based(saved_models, "llama"), seed=9)
    qlora.save_adapter(other, tmp_path / "sealed")
    model.save_pretrained(tmp_path / "sealed")  # the manifest of the other is gone with it
    assert torch.equal(logits(load_adapter(based(saved_models, "llama"), tmp_path / "sealed")), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_bare_base_saves_the_layout_of_bitsandbytes(saved_models, tmp_path, family, double_quant):
    """load_base reads it to the bit; transformers and bitsandbytes compute the same with it; the model is as before."""
    model = load_base(str(saved_models(family)), double_quant=double_quant, dtype="fp32", device="cpu")
    expected, config = logits(model), model.config.to_dict()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(model), expected) and "quantization_config" not in model.config.to_dict()
    assert model.config.to_dict().keys() <= config.keys() | {"architectures", "dtype"}
    again = load_base(str(tmp_path), dtype="fp32", device="cpu")
    assert torch.equal(logits(again), expected) and again.qlora.base.double_quant == double_quant
    if family == "llama":  # bitsandbytes' kernel misreads widths that are no multiple of the block size
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert relative(logits(without_quantized_gemm(theirs)), expected) < 1e-4


def test_detached_it_is_the_base_that_is_saved(saved_models, tmp_path):
    model = tiny.adapted(based(saved_models, "llama"))
    expected = logits(qlora.detach(model))
    model.save_pretrained(tmp_path / "four")
    assert torch.equal(logits(load_base(str(tmp_path / "four"), dtype="fp32", device="cpu")), expected)
    dense = qlora.detach(tiny.adapted(based(saved_models, "llama", 16)))
    dense.save_pretrained(tmp_path / "sixteen")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "sixteen")
    state = dense.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_a_model_quantized_in_memory_and_copies_save_themselves(tmp_path):
    model = tiny.adapted(qlora.quantize_(tiny.llama()))
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            for parameter in qlora.adapter_parameters(twin):
                parameter.mul_(1.5 + number)
        twin.save_pretrained(tmp_path / f"{number}")
        again = load_adapter(qlora.quantize_(tiny.llama()), tmp_path / f"{number}")
        assert torch.equal(logits(again), logits(twin)) and not torch.equal(logits(twin), logits(model))


def test_a_model_that_nobody_has_is_gone_at_once():
    """Its memory is not left to Python's collector."""
    model = tiny.adapted(qlora.quantize_(tiny.llama()))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_what_cannot_be_saved_is_one_line(saved_models, tmp_path):
    model = tiny.adapted(based(saved_models, "llama"))
    (tmp_path / "file").touch()
    other = {name: value * 2 for name, value in model.state_dict().items() if name.endswith("lora_A")}
    name = next(iter(other))
    for options, said in (
        ({"save_directory": tmp_path / "file"}, f"save_directory={tmp_path / 'file'}: is a file"),
        ({"push_to_hub": True}, "push_to_hub=True: an adapter is only written here"),
        ({"state_dict": other}, f"state_dict=14 tensors: holds {name} otherwise than the model"),
    ):
        with pytest.raises(UserError) as error:
            model.save_pretrained(**{"save_directory": tmp_path / "out", **options})
        (line,) = error.value.problems
        assert line.startswith(said)
    with qlora.mixed(model, ["default"]), pytest.raises(UserError, match="in the middle of a mixed batch"):
        model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.nan
    with pytest.raises(UserError, match="no finite numbers"):
        model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- transformers.Trainer


class Sentences(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = torch.randint(0, 320, (8, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer(saved_models, folder, method: str, **arguments) -> transformers.Trainer:
    torch.manual_seed(5)
    model = qlora.attach_adapters(based(saved_models, "llama"), method=method, rank=4)
    options = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    made = transformers.TrainingArguments(output_dir=folder, **options | arguments)
    return transformers.Trainer(
        model=model, args=made, train_dataset=Sentences(), eval_dataset=Sentences(), processing_class=tiny.tokenizer()
    )


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_trainer_goes_on_from_its_checkpoint(saved_models, tmp_path, method, caplog):
    """To the bit, without a word on the base, which is not in it. Each checkpoint is an adapter that loads, with the
    tokenizer that Trainer put beside it.
    """
    whole = trainer(saved_models, tmp_path / "whole", method)
    whole.train()
    resumed = trainer(saved_models, tmp_path / "resumed", method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert "missing keys" not in caplog.text
    ends = [tiny.tensors(run.model) for run in (whole, resumed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    again = load_adapter(based(saved_models, "llama"), tmp_path / "whole/checkpoint-6")
    assert torch.equal(logits(again), logits(whole.model))
    whole.save_model(str(tmp_path / "final"))
    assert torch.equal(logits(load_adapter(based(saved_models, "llama"), tmp_path / "final")), logits(whole.model))
    size = (tmp_path / "whole/checkpoint-6/model.safetensors").stat().st_size
    assert size < 2 * (tmp_path / "whole/checkpoint-6/adapter_model.safetensors").stat().st_size


def test_trainer_finds_its_best_model_again(saved_models, tmp_path):
    """Here the best is the one of the largest loss, so that it is not the last."""
    run = trainer(
        saved_models,
        tmp_path,
        "dora",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    run.train()
    best = run.state.best_model_checkpoint
    scores = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    state = json.loads((tmp_path / "checkpoint-6/trainer_state.json").read_text())
    assert state["best_metric"] == max(scores) and best.endswith("checkpoint-2"), scores
    assert torch.equal(logits(load_adapter(based(saved_models, "llama"), best)), logits(run.model))


def test_a_model_that_nobody_holds_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing holds it any more"):
        tiny.adapted(tiny.llama()).save_pretrained(tmp_path)
    tiny.write_model(tmp_path / "base")
    load_base(str(tmp_path / "base"), bits=16, device="cpu").save_pretrained(tmp_path / "again")  # as ever
    assert (tmp_path / "again/model.safetensors").is_file()

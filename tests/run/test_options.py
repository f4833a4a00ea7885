"""No option of finetune is without effect, seen in what is built from it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import SHORT, refused, same_files
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from qlora.config.commands import FinetuneConfig
from qlora.data.order import run_length
from qlora.layers.attach import named_adapters
from qlora.layers.forward_mode import forward_mode
from qlora.layers.fused import RotaryAttention
from qlora.run.inputs import read_inputs
from qlora.run.recipe import build, finetune

# option: (another value, the parts of a run that it changes). DoRA's magnitudes start at the norms of the base.
CHANGES = {
    "bits": (16, "base adapter"),
    "blocksize": (32, "base adapter"),
    "double_quant": (False, "base adapter"),
    "scales": ("mse", "base adapter"),
    "dtype": ("bf16", "base"),
    "method": ("lora", "adapter optimizer"),
    "rank": (2, "adapter"),
    "alpha": (4.0, "adapter"),
    "rslora": (True, "adapter"),
    "dropout": (0.5, "adapter"),
    "init": ("gaussian", "adapter"),
    "targets": ("q_proj", "adapter"),
    "weight_decay": (0.5, "optimizer"),
    "beta1": (0.5, "optimizer"),
    "beta2": (0.5, "optimizer"),
    "eps": (1e-2, "optimizer"),
    "optimizer_state": ("8bit", "optimizer"),
    "learning_rate": (1e-3, "optimizer schedule"),
    "schedule": ("linear", "schedule"),
    "warmup": (2, "schedule"),
    "clip": (0.01, "schedule"),
    "steps": (3, "schedule batches"),
    "epochs": (0.1, "schedule batches"),
    "batch_size": (3, "batches"),
    "accumulate": (2, "batches"),
    "packing": ("off", "mode"),
    "max_tokens": (34, "batches"),
    "truncate": ("drop", "batches"),
    "train_on_prompt": (True, "batches"),
    "eval_fraction": (0.5, "batches"),
    "seed": (1, "adapter batches"),
}
COMPANIONS = {"truncate": {"max_tokens": 34}}  # an option that does something only beside another
TESTED_ELSEWHERE = {
    "model",
    "data",
    "output",
    "eval_data",
    "eval_every",
    "save_every",
    "save_minutes",
    "on_nan",  # test_unbroken.py, as that above it
    "keep_checkpoints",
    "resume",
    "gradient_checkpointing",
    "optimizer_memory",  # test_resume.py, as those above it
    "format",
    "device",
    "trust_remote_code",
    "revision",
    "tensorboard",  # below
    "memory",  # test_plan.py, test_optim_memory.py
    "allow_endless",  # below
    "adapter_init",  # test_start.py, as the one below it
    "calibrate",
    "codes",  # test_codes.py
    "verbose",  # test_start.py
}


def test_no_option_is_forgotten():
    assert CHANGES.keys() | TESTED_ELSEWHERE == {field.name for field in dataclasses.fields(FinetuneConfig)}


def built(config: FinetuneConfig) -> dict[str, object]:
    """What `finetune` builds from options before it trains, part by part, as values that can be compared."""
    inputs = read_inputs(config)
    per_step, warmup = config.batch_size * config.accumulate, config.warmup
    length = run_length(len(inputs.train), per_step, steps=config.steps, epochs=config.epochs, warmup=warmup)
    parts = build(config, inputs, length, torch.device("cpu"), Path(config.output).parent)
    adapters = [adapter for _, adapter in named_adapters(parts.model)]
    learning = {name for name, p in parts.model.named_parameters() if p.requires_grad}
    tensors = {name: (t.dtype, t.float().tolist()) for name, t in parts.model.state_dict().items()}
    batches = [parts.batches(step) for step in range(length["steps"])]
    pager, groups = parts.optimizer.pager, parts.optimizer.param_groups
    numel = sum(p.numel() for group in groups for p in group["params"])
    found = {
        "base": {name.replace(".base.", "."): value for name, value in tensors.items() if name not in learning},
        "adapter": [{name: tensors[name] for name in learning}, [(a.scaling, a.dropout_p) for a in adapters]],
        "mode": forward_mode(parts.model),
        "optimizer": [pager.resident // numel, [{**group, "params": 0} for group in groups]],
        "schedule": [parts.schedule.clip, [parts.schedule.rate(step) for step in range(length["steps"])]],
        "batches": [[(b.input_ids.tolist(), b.labels.tolist()) for b in step] for step in batches],
    }
    parts.optimizer.close()
    return found


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_changes_what_is_built(config, option):
    value, parts = CHANGES[option]
    companions = COMPANIONS.get(option, {})
    before, after = built(config(**companions)), built(config(**{option: value}, **companions))
    assert {part for part in before if before[part] != after[part]} == set(parts.split())


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain") / "run"
    where = {"model": str(place / "model"), "data": str(place / "data.jsonl"), "output": str(output)}
    finetune(FinetuneConfig(**where, **SHORT))
    return output


@pytest.mark.parametrize("option", ["bits", "dropout", "beta2", "clip", "train_on_prompt"])  # of each part one
def test_what_is_built_is_what_trains(config, plain, tmp_path, option):
    finetune(config(**{option: CHANGES[option][0]}))
    before, after = (load_file(output / "adapter/adapter_model.safetensors") for output in (plain, tmp_path / "run"))
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)


def test_the_same_options_give_the_same_bits(config, plain, tmp_path):
    torch.manual_seed(4321)
    finetune(config())
    same_files(plain / "checkpoints/step-000004", tmp_path / "run/checkpoints/step-000004")


def test_weight_decay_leaves_magnitudes_alone(config, tmp_path):
    """Decayed to 0, m would take the base's own weights along."""
    for output, decay in (("without", 0.0), ("with", 0.9)):
        finetune(config(output, steps=1, weight_decay=decay))
    one, two = (load_file(tmp_path / output / "adapter/adapter_model.safetensors") for output in ("without", "with"))
    assert all(torch.equal(one[key], two[key]) for key in one if key.endswith("lora_magnitude_vector"))
    assert not any(torch.equal(one[key], two[key]) for key in one if key.endswith("lora_A.weight"))


def test_tensorboard(config, tmp_path):
    finetune(config(tensorboard=True))
    assert any(path.name.startswith("events") for path in (tmp_path / "run/tensorboard").iterdir())


def test_gradient_checkpointing_is_used(config):
    """Each attention runs twice a step."""
    calls, counted = [], []
    hook = register_module_forward_pre_hook(
        lambda module, inputs: calls.append(1) if isinstance(module, RotaryAttention) else None
    )
    with hook:
        for checkpointing in (False, True):
            calls.clear()
            finetune(config(str(checkpointing), gradient_checkpointing=checkpointing))
            counted.append(len(calls))
    assert counted[1] - counted[0] == 2 * (1 + 4)  # two layers; the trial step, and four steps


def test_options_about_the_input_are_passed_on(config, tmp_path):
    assert "format=alpaca" in refused(config(format="alpaca"))[0]
    if not torch.cuda.is_available():
        assert any(line.startswith("device=cuda") for line in refused(config(device="cuda")))
    finetune(config(revision="v9"))
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["revision"] == "v9"


def test_a_run_that_never_learns_to_stop_has_to_be_asked_for(config):
    cut = {"max_tokens": 26, "steps": 1}  # in the middle of every answer
    (line,) = refused(config(**cut))
    assert "no example keeps the end of its answer" in line and "`allow_endless`" in line
    assert finetune(config(allow_endless=True, **cut)).steps == 1


def test_code_of_a_model_runs_only_if_asked_for(config, place, tmp_path):
    model = shutil.copytree(place / "model", tmp_path / "model")
    about = json.loads((model / "config.json").read_text())
    about |= {
        "model_type": "our_own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (model / "config.json").write_text(json.dumps(about))
    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'our_own'\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert "trust" in " ".join(refused(config("no", model=str(model))))
    assert finetune(config("yes", model=str(model), trust_remote_code=True)).steps == 4

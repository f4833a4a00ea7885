"""Adapter files against PEFT, both ways; what does not fit, and what is written."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import tiny
import torch
import yaml
from helpers import unsealed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.errors import UserError
from qlora.export.peft import load_adapter, read_adapter_info
from qlora.export.peft_write import save_adapter
from qlora.layers.attach import active_adapter
from qlora.models.load import load_base
from qlora.run.adapted import load_adapted

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(3, 43).reshape(2, 20)
KINDS = [
    {"method": "lora"},
    {"method": "dora"},
    {"method": "dora", "rslora": True, "alpha": 5.0, "rank": 3},
    {"method": "lora", "targets": ["q_proj", "down_proj"]},
]
GPT2_KINDS = [{"method": "lora"}, {"method": "dora", "targets": ["c_attn", "mlp.c_proj"]}]
CASES = [(tiny.llama, kind) for kind in KINDS] + [(tiny.gpt2, kind) for kind in GPT2_KINDS]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    """fp32 logits equal to 1e-4 of the largest; ours come within 1e-6."""
    return bool((one - two).abs().max() <= 1e-5 * two.abs().max())


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize(("build", "kind"), CASES)
def test_peft_loads_ours(tmp_path, build, kind):
    model = tiny.adapted(build(), **kind)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert close(logits(theirs), logits(model))
    assert not close(logits(build()), logits(model))
    attached = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert attached == set(active_adapter(model).modules)


@pytest.mark.parametrize(("build", "kind"), CASES)
def test_ours_loads_peft(tmp_path, build, kind):
    settings = {"method": "dora", "rank": 3, "alpha": 7.0, "rslora": False, "targets": "all-linear"} | kind
    config = peft.LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        use_rslora=settings["rslora"],
        init_lora_weights="gaussian",
        use_dora=settings["method"] == "dora",
        target_modules=settings["targets"],
        task_type="CAUSAL_LM",
        fan_in_fan_out=build is tiny.gpt2,
    )
    theirs = peft.get_peft_model(build(), config)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "magnitude" in name:
                parameter *= 1 + 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_adapter(build(), tmp_path / "adapter")
    assert close(logits(model), logits(theirs))
    assert not close(logits(build()), logits(model))
    base, spec = read_adapter_info(tmp_path / "adapter")
    assert (base.bits, base.fingerprint) == (None, None)
    assert dataclasses.replace(spec, modules=set(spec.modules)) == dataclasses.replace(
        active_adapter(model), modules=set(active_adapter(model).modules)
    )


def test_there_and_back_is_exact(tmp_path):
    for kind in KINDS:
        model = tiny.adapted(tiny.llama(), **kind)
        fresh = load_adapter(tiny.llama(), save_adapter(model, tmp_path / "adapter"))
        assert all(torch.equal(tensor, tiny.tensors(fresh)[name]) for name, tensor in tiny.tensors(model).items())
        assert torch.equal(logits(fresh), logits(model)) and active_adapter(fresh) == active_adapter(model)
        assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]


def test_load_into_adapters_that_have_been_used(tmp_path):
    """The norm that DoRA keeps from a forward pass must not survive the new values."""
    model = tiny.adapted(tiny.llama())
    save_adapter(model, tmp_path / "adapter")
    other = tiny.adapted(tiny.llama(), seed=77)
    assert not close(logits(other), logits(model))
    assert torch.equal(logits(load_adapter(other, tmp_path / "adapter")), logits(model))


def test_the_older_peft_key_for_magnitudes(tmp_path):
    model = tiny.adapted(tiny.llama())
    folder = unsealed(save_adapter(model, tmp_path / "adapter"))
    old = {
        key + ".weight" if key.endswith("magnitude_vector") else key: value
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(old, folder / "adapter_model.safetensors")
    assert torch.equal(logits(load_adapter(tiny.llama(), folder)), logits(model))


def test_target_modules_reach_exactly_what_is_adapted(tmp_path):
    """Short endings where they are exact; whole names where an ending would reach a layer that is not adapted."""
    for targets, written in (
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (r".*\.1\.mlp\.up_proj", ["model.layers.1.mlp.up_proj"]),
    ):
        model = tiny.adapted(tiny.llama(), targets=targets)
        config = json.loads((save_adapter(model, tmp_path / "adapter") / "adapter_config.json").read_text())
        assert config["target_modules"] == written


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type=LOHA"),
        ({"task_type": "SEQ_CLS"}, "task_type=SEQ_CLS"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save=["lm_head"]'),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern="),
        ({"layers_to_transform": [0]}, "layers_to_transform=[0]"),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices=[5]"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=[5]"),
        ({"target_parameters": ["experts"]}, 'target_parameters=["experts"]'),
        ({"use_quantum_lora": True}, "use_quantum_lora=true"),  # of a PEFT to come
        ({"r": None}, "r=None"),
    ],
)
def test_what_we_do_not_do_is_refused_by_name(tmp_path, change, named):
    folder = unsealed(save_adapter(tiny.adapted(tiny.llama()), tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | change | {"fan_in_fan_out": True, "layer_replication": [[0, 1]]})
    )
    model = tiny.llama()
    with pytest.raises(UserError) as error:
        load_adapter(model, folder)
    assert len(error.value.problems) == 2 and "layer_replication=[[0, 1]]" in str(error.value)
    assert any(line.startswith(named) for line in error.value.problems)
    assert torch.equal(logits(model), logits(tiny.llama()))


def test_every_default_of_peft_passes(tmp_path):
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    assert read_adapter_info(tmp_path)[1].rank == 2


# ---------------------------------------------------------------- what does not fit


def test_all_mismatches_are_told_at_once(tmp_path):
    folder = unsealed(save_adapter(tiny.adapted(tiny.llama()), tmp_path / "adapter"))
    path, prefix = folder / "adapter_model.safetensors", "base_model.model.model.layers."
    tensors, wide = load_file(path), tiny.llama().config.intermediate_size
    del tensors[f"{prefix}0.mlp.up_proj.lora_B.weight"]
    tensors[f"{prefix}0.mlp.down_proj.lora_A.weight"] = torch.zeros(7, wide)
    tensors[f"{prefix}1.mlp.up_proj.lora_A.weight"][0, 0] = torch.nan
    tensors[f"{prefix}9.mlp.up_proj.lora_A.weight"] = torch.zeros(3, 64)
    tensors["something.else"] = torch.zeros(2)
    save_file(tensors, path)
    for model in (tiny.llama(), tiny.adapted(tiny.llama(), seed=5)):
        before = tiny.tensors(model)
        with pytest.raises(UserError) as error:
            load_adapter(model, folder)
        problems = {line.split("=")[0]: line for line in error.value.problems}
        assert (
            "(missing)" in problems[f"{prefix}0.mlp.up_proj.lora_B.weight"]
            and f"[{wide}, 3]" in problems[f"{prefix}0.mlp.up_proj.lora_B.weight"]
        )
        assert (
            f"[7, {wide}]" in problems[f"{prefix}0.mlp.down_proj.lora_A.weight"]
            and f"[3, {wide}]" in problems[f"{prefix}0.mlp.down_proj.lora_A.weight"]
        )
        assert "finite" in problems[f"{prefix}1.mlp.up_proj.lora_A.weight"]
        assert "nearest" in problems[f"{prefix}9.mlp.up_proj.lora_A.weight"]
        assert len(problems) == 5 and "something.else" in problems
        assert {n: t.tolist() for n, t in tiny.tensors(model).items()} == {n: t.tolist() for n, t in before.items()}


def test_another_kind_of_adapter(tmp_path):
    folder = save_adapter(tiny.adapted(tiny.llama(), method="lora", rank=2), tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        load_adapter(tiny.adapted(tiny.llama(), method="dora", rank=4, alpha=16.0, rslora=True), folder)
    names = {line.split("=")[0] for line in error.value.problems if not line.startswith("base_model.")}
    assert names == {"method", "rank", "alpha", "rslora"}


def test_another_model(tmp_path):
    folder = save_adapter(tiny.adapted(tiny.llama()), tmp_path / "adapter")
    about = tiny.llama().config
    about.hidden_size, about.head_dim = 32, 8
    narrow = AutoModelForCausalLM.from_config(about)
    with pytest.raises(UserError) as error:
        load_adapter(narrow, folder)
    shapes = [line for line in error.value.problems if "the model needs shape" in line]
    assert len(shapes) == 2 * (
        6 + 5 + 5
    )  # in two layers: A of all but down_proj, B and m of all but gate_proj and up_proj
    assert any("k_proj.lora_A.weight=[3, 64]: the model needs shape [3, 32]" in line for line in shapes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two models of the same shape with other weights."""
    return [tiny.write_model(tmp_path_factory.mktemp("model"), seed) for seed in (1, 2)]


@pytest.mark.parametrize("bits", [4, 16])
def test_another_base_of_the_same_shape(tmp_path, folders, bits):
    one, two = (load_base(str(folder), bits=bits, dtype="fp32", device="cpu") for folder in folders)
    save_adapter(tiny.adapted(one), tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        load_adapter(two, tmp_path / "adapter")
    assert (
        str(folders[0]) in str(error.value)
        and str(folders[1]) in str(error.value)
        and "was trained on" in str(error.value)
    )


@pytest.mark.parametrize("here", [{"scales": "mse"}, {"blocksize": 32}, {"double_quant": False}, {"bits": 16}])
def test_the_same_base_quantized_otherwise(tmp_path, folders, here):
    """The fingerprint knows the checkpoint, not what was made of it. Refused in both directions, and loaded where it is
    the same.
    """
    for trained, other in (({}, here), (here, {})):
        one, two = (load_base(str(folders[0]), dtype="fp32", device="cpu", **options) for options in (trained, other))
        assert one.qlora.base.fingerprint == two.qlora.base.fingerprint and not close(logits(one), logits(two))
        folder = save_adapter(tiny.adapted(one), tmp_path / "adapter")
        before = logits(two)
        with pytest.raises(UserError) as error:
            load_adapter(two, folder)
        words = [f"{name}={getattr(model.qlora.base, name)}" for name in here for model in (one, two)]
        (line,) = error.value.problems
        assert line.startswith(f"adapter={folder}: was trained on bits=") and line.endswith(".")
        rule, remedy = line.split(". ")
        assert words[0] in rule.split("; ")[0] and words[1] in rule.split("; ")[1] and words[0] in remedy
        assert torch.equal(logits(two), before)
        again = load_adapter(load_base(str(folders[0]), dtype="fp32", device="cpu", **trained), folder)
        assert torch.equal(logits(again), logits(one))


@pytest.mark.parametrize("bits", [4, 16])
def test_load_adapted_makes_the_base_again(tmp_path, folders, bits):
    recipe = {"bits": bits, "blocksize": 32, "double_quant": False} if bits == 4 else {"bits": bits}
    model = tiny.adapted(load_base(str(folders[0]), dtype="fp32", device="cpu", **recipe))
    save_adapter(model, tmp_path / "adapter", tiny.tokenizer())
    with pytest.raises(UserError, match=f"bits={20 - bits}: the adapter was trained on {bits} bits"):
        load_adapted(tmp_path / "adapter", bits=20 - bits, device="cpu")
    again, tokenizer = load_adapted(tmp_path / "adapter", device="cpu")
    assert again.qlora.base == model.qlora.base and not again.training
    assert torch.equal(logits(again), logits(model))
    assert tokenizer.chat_template == tiny.TEMPLATE
    moved = shutil.copytree(folders[0], tmp_path / "moved")
    assert torch.equal(logits(load_adapted(tmp_path / "adapter", model=str(moved), device="cpu")[0]), logits(model))


def test_load_adapted_with_an_adapter_that_names_no_base(tmp_path):
    save_adapter(tiny.adapted(tiny.llama()), tmp_path / "adapter")
    with pytest.raises(UserError, match=re.escape("does not name its base model. Give `model` too.")):
        load_adapted(tmp_path / "adapter")


def test_folders_that_hold_no_adapter(tmp_path):
    model = tiny.llama()
    for folder, said in (
        ("nowhere", "no such folder"),
        (".", "has no adapter_config.json and adapter_model.safetensors"),
    ):
        with pytest.raises(UserError, match=said):
            load_adapter(model, tmp_path / folder)
    save_adapter(tiny.adapted(tiny.llama()), tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match=f"holds a run, not an adapter. Give {tmp_path}/run/adapter."):
        load_adapter(model, tmp_path / "run")
    (tmp_path / "run/adapter/adapter_model.safetensors").rename(tmp_path / "run/adapter/adapter_model.bin")
    with pytest.raises(UserError, match="a pickle"):
        load_adapter(model, tmp_path / "run/adapter")


def test_damaged_json(tmp_path):
    folder = unsealed(save_adapter(tiny.adapted(tiny.llama()), tmp_path / "adapter"))
    (folder / "adapter_config.json").write_text('{"r": 4,')
    with pytest.raises(UserError, match=r"adapter_config.json=.*cannot be read"):
        load_adapter(tiny.llama(), folder)


# ---------------------------------------------------------------- what is written


def test_files_and_card(tmp_path, folders):
    model = tiny.adapted(load_base(str(folders[0]), device="cpu", dtype="fp32"))
    folder = save_adapter(
        model, tmp_path / "adapter", tiny.tokenizer(), notes={"data": "sums.jsonl", "steps": 7, "loss": 1.23456}
    )
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "qlora.json",
        "README.md",
        "tokenizer.json",
        "chat_template.jinja",
    }
    own = json.loads((folder / "qlora.json").read_text())
    assert (
        own["base"]["bits"] == 4
        and own["base"]["fingerprint"] == model.qlora.base.fingerprint
        and own["notes"]["steps"] == 7
    )
    assert own["versions"]["torch"] == torch.__version__
    _, front, card = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == str(folders[0]) and yaml.safe_load(front)["library_name"] == "peft"
    assert (
        "QDoRA, rank 3, alpha 7" in card
        and "| loss | 1.2346 |" in card
        and "sums.jsonl" in card
        and "PeftModel.from_pretrained" in card
    )
    header = (folder / "adapter_model.safetensors").read_bytes()
    assert header == (save_adapter(model, tmp_path / "again") / "adapter_model.safetensors").read_bytes()
    (tmp_path / "ordinary").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "ordinary").stat().st_mode}
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}


def test_an_adapter_is_replaced_whole_and_nothing_else_is(tmp_path):
    model = tiny.adapted(tiny.llama())
    folder = save_adapter(model, tmp_path / "adapter", tiny.tokenizer())
    save_adapter(tiny.adapted(tiny.llama(), rank=2), folder)
    assert not (folder / "tokenizer.json").exists() and read_adapter_info(folder)[1].rank == 2
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files of another kind \(thesis.tex\)"):
        save_adapter(model, folder)
    assert read_adapter_info(folder)[1].rank == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    with pytest.raises(UserError, match="has no adapters"):
        save_adapter(tiny.llama(), tmp_path / "new")
    with pytest.raises(UserError, match="cannot be written"):
        save_adapter(model, folder / "qlora.json" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]

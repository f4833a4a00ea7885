"""Manifests of adapters and checkpoints, and what is wrong with them when there is none: one reader, the same lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from helpers import relative, unsealed
from safetensors.torch import load_file, save_file

from qlora import UserError, attach_adapters, load_adapter, load_base, merge, save_adapter
from qlora.export.bnb import quantize_checkpoint
from qlora.run.adapted import load_adapted

IDS = torch.arange(3, 43).reshape(2, 20)
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """A DoRA adapter on 16 bits, with a tokenizer."""
    model = tiny.adapted(load_base(str(base), bits=16, dtype="fp32", device="cpu"))
    return save_adapter(model, tmp_path / "adapter", tiny.tokenizer())


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lines(work, *arguments, **options) -> list[str]:
    with pytest.raises(UserError) as error:
        work(*arguments, **options)
    return error.value.problems


def refused_alike(adapter: Path, base: Path, out: Path) -> list[str]:
    """The lines of `load_adapter`, which are those of `merge` and `load_adapted`; nothing is written."""
    found = lines(load_adapter, load_base(str(base), bits=16, dtype="fp32", device="cpu"), adapter)
    assert lines(merge, adapter, out / "merged", dtype="fp32") == found
    assert lines(load_adapted, adapter, device="cpu") == found
    assert not (out / "merged").exists()
    return found


# ---------------------------------------------------------------- with the manifest


@pytest.mark.parametrize(
    "name", [TENSORS, "adapter_config.json", "qlora.json", "tokenizer.json", "chat_template.jinja"]
)
def test_a_file_that_is_not_what_was_written_is_named(adapter, base, tmp_path, name):
    flip(adapter / name)
    assert [f"{name} is not what was written" in line for line in refused_alike(adapter, base, tmp_path)] == [True]
    (adapter / name).write_bytes((adapter / name).read_bytes()[:-1])
    (line,) = lines(load_adapter, tiny.llama(), adapter)
    assert f"{name} has " in line
    (adapter / name).unlink()
    (line,) = lines(load_adapter, tiny.llama(), adapter)
    assert f"{name} is missing" in line or f"has no {name}" in line


def test_what_a_tokenizer_would_read_may_not_be_added(adapter):
    (adapter / "added_tokens.json").write_text('{"<x>": 300}')
    (line,) = lines(load_adapter, tiny.llama(), adapter)
    assert "added_tokens.json was added" in line


def test_the_card_and_files_of_others_are_free(adapter, base, capsys):
    (adapter / "README.md").write_text("my own words")
    (adapter / "eval_results.json").write_text("{}")
    load_adapted(adapter, device="cpu")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2}'])
def test_a_damaged_manifest_is_refused(adapter, text):
    (adapter / "manifest.json").write_text(text)
    (line,) = lines(load_adapter, tiny.llama(), adapter)
    assert "manifest.json" in line


def test_a_folder_from_before_the_manifest_loads_with_a_note(adapter, base, capsys):
    model, _ = load_adapted(unsealed(adapter), device="cpu")
    assert capsys.readouterr().err.count("note: adapter has no manifest.json") == 1
    (adapter / "chat_template.jinja").unlink()
    (line,) = lines(load_adapter, model, adapter)
    assert "chat_template.jinja is missing" in line


def test_an_adapter_of_peft_loads_without_a_word(tmp_path, capsys):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny.llama(), config).save_pretrained(tmp_path)
    load_adapter(tiny.llama(), tmp_path)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- without it: the content


def named(tensors):
    return {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}


def bare(tensors):
    return {key.removeprefix(PREFIX): value for key, value in tensors.items()}


def without(end: str):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(end)}


def with_nan(tensors):
    next(iter(tensors.values()))[0] = torch.nan
    return tensors


DAMAGED = {
    "carry an adapter name (default)": named,
    "do not begin with base_model.model.": bare,
    "holds no tensors of an adapter": lambda tensors: {},
    "1.mlp.up_proj.lora_B.weight=(missing)": without("1.mlp.up_proj.lora_B.weight"),
    "1.mlp.up_proj.lora_A.weight=(missing)": lambda t: {k: v for k, v in t.items() if "1.mlp.up_proj" not in k},
    "lora_magnitude_vector=(missing)": without("lora_magnitude_vector"),
    "no finite numbers": with_nan,
    "must hold floating-point numbers": lambda t: {
        k: v.int() if "0.mlp.up_proj.lora_A" in k else v for k, v in t.items()
    },
    "lm_head.weight=[330, 64]": lambda t: t | {f"{PREFIX}lm_head.weight": torch.zeros(330, 64)},
    "the model needs shape [3, 64]": lambda t: {
        k: v[:2].contiguous() if "q_proj.lora_A" in k else v for k, v in t.items()
    },
}


@pytest.mark.parametrize("said", DAMAGED)
def test_merge_refuses_what_load_refuses(adapter, base, tmp_path, said):
    path = unsealed(adapter) / TENSORS
    save_file(DAMAGED[said](load_file(path)), path)
    found = refused_alike(adapter, base, tmp_path)
    assert said in "\n".join(found) and all(len(line.splitlines()) == 1 for line in found)


@pytest.mark.parametrize("change", [{"lora_alpha": 160}, {"use_dora": False}, {"use_rslora": True}, {"r": 4}])
def test_two_files_that_say_different_things(adapter, base, tmp_path, change):
    edit(unsealed(adapter) / "adapter_config.json", **change)
    assert "qlora.json says" in "\n".join(refused_alike(adapter, base, tmp_path))


@pytest.mark.parametrize("text", ["", '{"version', "[1, 2]"])
def test_a_damaged_tokenizer_is_one_line(adapter, base, tmp_path, text):
    (unsealed(adapter) / "tokenizer.json").write_text(text)
    for found in (lines(load_adapted, adapter, device="cpu"), lines(merge, adapter, tmp_path / "merged")):
        assert len(found) == 1 and "its tokenizer cannot be loaded" in found[0] and len(found[0].splitlines()) == 1


def test_merge_knows_the_older_key(adapter, tmp_path):
    path = unsealed(adapter) / TENSORS
    old = {key + ".weight" if key.endswith("vector") else key: value for key, value in load_file(path).items()}
    save_file(old, path)
    merge(adapter, tmp_path / "merged", dtype="fp32", base="original")
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), adapter)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert relative(ours.eval()(IDS).logits, theirs.eval()(IDS).logits) < 1e-5


# ---------------------------------------------------------------- what a merge hands out


def test_a_merge_has_the_adapters_tokenizer_and_its_ends(adapter, base, tmp_path):
    """The base's EOS is another token than the end of turn that the template writes."""
    other = shutil.copytree(base, tmp_path / "base")
    edit(other / "tokenizer_config.json", eos_token="!", pad_token="!")
    model = tiny.adapted(load_base(str(other), bits=16, dtype="fp32", device="cpu"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = tiny.TEMPLATE.replace("assistant\\n", "assistant:\\n")
    tokenizer.add_tokens(["<cat>"])
    folder = save_adapter(model, tmp_path / "with", tokenizer)
    written = merge(folder, tmp_path / "merged")
    again = transformers.AutoTokenizer.from_pretrained(written)
    assert again.chat_template == tokenizer.chat_template and again.convert_tokens_to_ids("<cat>") == 258
    ends = json.loads((written / "generation_config.json").read_text())["eos_token_id"]
    assert {again.eos_token_id, again.convert_tokens_to_ids("<|im_end|>")} <= set(ends)


@pytest.mark.parametrize("work", ["merge", "quantize"])
def test_what_fp16_cannot_hold_is_named(tmp_path, work):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight *= 4e6
        model.model.norm.weight *= 4e6
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    if work == "merge":
        adapted = attach_adapters(load_base(str(tmp_path / "base"), bits=16, dtype="fp32", device="cpu"), rank=2)
        found = lines(merge, save_adapter(adapted, tmp_path / "adapter"), tmp_path / "out", dtype="fp16")
        assert len(found) == 2 and all("dtype=fp16: model." in line and "beyond its range" in line for line in found)
    else:
        assert "model." in lines(quantize_checkpoint, str(tmp_path / "base"), tmp_path / "out", dtype="fp16")[0]
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what is saved


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    model = tiny.adapted(tiny.llama())
    folder = save_adapter(model, tmp_path / "adapter")
    before = (folder / TENSORS).read_bytes()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").lora_B[0, 0] = torch.inf
    (line,) = lines(save_adapter, model, folder)
    assert "0.mlp.up_proj.lora_B.weight" in line and (folder / TENSORS).read_bytes() == before


def test_what_else_was_trained_is_named(tmp_path):
    model = tiny.adapted(tiny.llama())
    model.model.norm.weight.requires_grad_(True)
    (line,) = lines(save_adapter, model, tmp_path / "adapter")
    assert line.startswith("model.norm.weight=[64]: is trained too")


def test_another_vocabulary_than_the_bases_is_named(base, tmp_path):
    model = tiny.adapted(load_base(str(base), bits=16, dtype="fp32", device="cpu"))
    model.resize_token_embeddings(330)
    found = lines(save_adapter, model.requires_grad_(False), tmp_path / "adapter")
    assert found[0].startswith("vocabulary=330: the embedding had 320 rows")


@pytest.mark.parametrize("part", ["model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("older", [False, True])
def test_a_base_with_another_embedding_or_norm_is_another_base(adapter, base, tmp_path, part, older):
    """The linear layers are the same; an adapter from before embedding and norms were looked at is loaded."""
    other = tiny.llama()
    with torch.no_grad():
        other.get_parameter(part)[..., 0] += 1
    other.save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    named = {"model": str(tmp_path / "other")}
    if older:
        about = json.loads((adapter / "qlora.json").read_text())["base"]
        edit(unsealed(adapter) / "qlora.json", base=about | {"fingerprint": about["fingerprint"].split("-")[0]})
        load_adapted(adapter, device="cpu", **named)
        merge(adapter, tmp_path / "merged", **named)
    else:
        assert "was trained on" in lines(load_adapted, adapter, device="cpu", **named)[0]
        assert "not those the adapter was trained on" in lines(merge, adapter, tmp_path / "merged", **named)[0]
        merge(adapter, tmp_path / "merged", model=str(base), dtype="fp32", base="original")


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "file/below"])
def test_paths_that_cannot_be(adapter, tmp_path, path):
    (tmp_path / "file").touch()
    for work in (
        lambda: load_adapter(tiny.llama(), tmp_path / path),
        lambda: merge(adapter, tmp_path / path),
        lambda: save_adapter(tiny.adapted(tiny.llama()), tmp_path / path),
    ):
        assert len(lines(work)) == 1


def test_no_targets_are_refused():
    for targets in ([], "", ()):
        assert lines(attach_adapters, tiny.llama(), targets=targets)[0].startswith("targets=")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": 3}, "is damaged (files)"),
        ({"files": [1]}, "is damaged (files)"),
        ({"base": 3, "adapter": "a"}, "is damaged (base, adapter)"),
        ({"base": {"fingerprint": 3}}, "fingerprint is int, not str | None"),
        ({"format": "\n"}, r"qlora.json has format '\n'"),
        ({"files": ["é" * 300]}, "is missing"),
    ],
)
def test_values_of_another_type_are_one_line(adapter, base, tmp_path, changes, said):
    unsealed(adapter)
    edit(adapter / "qlora.json", **changes)
    (line,) = refused_alike(adapter, base, tmp_path)
    assert said in line and "\n" not in line and len(line) < 500


def test_a_manifest_of_no_version_or_step_is_one_line(adapter, base, tmp_path):
    manifest = json.loads((adapter / "manifest.json").read_text())
    (adapter / "manifest.json").write_text(json.dumps(manifest | {"format": "\n"}))
    assert r"(format '\n')" in refused_alike(adapter, base, tmp_path)[0]
    del manifest["step"]
    (adapter / "manifest.json").write_text(json.dumps(manifest))
    adapter.rename(tmp_path / "step-000003")
    assert "manifest.json is that of step None" in refused_alike(tmp_path / "step-000003", base, tmp_path)[0]

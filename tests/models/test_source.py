"""A stranger's model folder: whatever its files hold, an error is one line that names the file, and nothing runs."""

from __future__ import annotations

import http.server
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import tiny
import torch
from helpers import wait
from safetensors.torch import load_file, save_file

from qlora import UserError, load_base, load_tokenizer
from qlora.cli import main
from qlora.config.commands import FinetuneConfig
from qlora.models.source import load_config, resolve


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(folder: object, read=load_base) -> str:
    with pytest.raises(UserError) as caught:
        read(str(folder) if isinstance(folder, Path) else folder)
    (line,) = caught.value.problems
    assert "\n" not in line and line.endswith(".") and "weights_only" not in line
    return line


def edit(folder: Path, name: str = "config.json", **changes) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("text", ["3", "[]", "{", "", "null", '"x"', "[" * 5000, "\xff", '{"a": 1'])
def test_a_config_that_is_no_object(model, text):
    (model / "config.json").write_bytes(text.encode("latin-1"))
    assert f"{model}/config.json" in refused(model)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": "x"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"model_type": []},
        {"model_type": None},
        {"eos_token_id": "x"},
        {"use_cache": -1},
        {"hidden_size": 65},
        {"dtype": "float4"},
        {"hidden_act": "nope"},
        {"pad_token_id": 99999},
        {"auto_map": 3, "model_type": "own"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 1_000_000},
        {"num_hidden_layers": -1},
        {"vocab_size": 10**9},
        {"vocab_size": 10**7},
        {"intermediate_size": 10**7},
        {"text_config": {"num_hidden_layers": 10**12}},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": {"text_config": "someone/kernel"}},
    ],
    ids=str,
)
def test_a_config_that_describes_nothing(model, change):
    edit(model, **change)
    line = refused(model)
    assert str(model) in line or next(iter(change)) in line or line.startswith("model=")


def test_sixteen_bits_that_say_they_are_four(model):
    """Once quantized, then merged: the config kept what is no longer true, and nothing would be quantized."""
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit(model, quantization_config=four)
    assert "holds no 4-bit weight" in refused(model) or "hold no 4-bit weight" in refused(model)
    assert resolve(str(model), weights=False).packed  # a plan has the config alone


@pytest.mark.parametrize("index", [{}, [], {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "b"}}])
def test_an_index_that_is_none(model, index):
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()
    assert str(model) in refused(model)


@pytest.mark.parametrize("place", ["../secret/model.safetensors", "/{}/secret/model.safetensors", "a/../../x"])
def test_no_file_outside_is_read(model, tmp_path, place):
    (tmp_path / "secret").mkdir()
    shutil.move(model / "model.safetensors", tmp_path / "secret/model.safetensors")
    names = load_file(tmp_path / "secret/model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, place.format(tmp_path))}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names a file outside" in refused(model)


def test_damaged_weights(model, tmp_path):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")

    def with_header(**change) -> bytes:
        text = json.dumps(header | change).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    cases = [b"", b"hello", whole[:5], whole[:-9], whole[: len(whole) // 2], (2**60).to_bytes(8, "little") + whole[8:]]
    cases += [with_header(__metadata__=[]), with_header(**{first: header[first] | {"dtype": "XX"}})]
    cases += [with_header(**{first: header[first] | {"data_offsets": [0, 0]}}), with_header(**{first: 3})]
    for case in cases:
        path.write_bytes(case)
        assert str(model) in refused(model)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if name != first}, path, metadata={"format": "pt"})
    assert f"{first} is missing" in refused(model)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (3,), (2, 3, 4)])
def test_a_weight_of_another_shape(model, shape, bits):
    path, name = model / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    save_file(load_file(path) | {name: torch.zeros(shape)}, path, metadata={"format": "pt"})
    line = refused(model, lambda folder: load_base(folder, bits=bits))
    assert line.startswith(f"{name}={shape}: the model needs (64, 64).")


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # torch says it first
def test_layers_without_weights(model):
    edit(model, intermediate_size=0)
    assert "describes layers without weights, model.layers.0.mlp.gate_proj for one" in refused(model)


def test_pickles_are_not_run(model, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (model / "model.safetensors").unlink()
    for content in (b"rubbish", pickle.dumps(Evil()), pickle.dumps({"a": 1})):
        (model / "pytorch_model.bin").write_bytes(content)
        assert "pickle" in refused(model) and not (tmp_path / "ran").exists()
    torch.save({"a": Evil()}, model / "pytorch_model.bin")
    assert "pickle" in refused(model) and not (tmp_path / "ran").exists()
    torch.save(tiny.llama(1).state_dict(), model / "pytorch_model.bin")
    load_base(str(model))


@pytest.mark.parametrize(
    "name, change",
    [
        ("tokenizer_config.json", {"bos_token": 1}),
        ("tokenizer_config.json", {"tokenizer_class": True}),
        ("tokenizer_config.json", {"model_max_length": [1]}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Own"}}),
        ("tokenizer.json", {"model": 3}),
    ],
    ids=str,
)
def test_a_tokenizer_that_does_not_load(model, name, change):
    edit(model, name, **change)
    assert "its tokenizer cannot be loaded" in refused(model, load_tokenizer)
    (model / name).write_text('{"a": ')
    assert "its tokenizer cannot be loaded" in refused(model, load_tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_id": ["a"]},
        {"eos_token_id": "2"},
        {"pad_token_id": 1.5},
        {"bos_token_id": True},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_a_generation_config_that_is_none(model, change):
    """transformers passes over it, and then another token ends an answer."""
    path = model / "generation_config.json"
    load_base(str(model), dtype="fp32")
    path.write_text(json.dumps(change))
    assert str(path) in refused(model)
    path.write_text('{"eos_token_id": ')
    assert str(path) in refused(model)
    path.write_text('{"eos_token_id": [2, 3], "pad_token_id": null}')
    assert load_base(str(model)).generation_config.eos_token_id == [2, 3]


@pytest.mark.parametrize(
    "name", ["", 3, ["a"], None, "x" * 5000, "a\0b", "~nobody-of-this-name/x", "a//b", "https://x/y"]
)
def test_a_name_that_leads_nowhere(name):
    assert refused(name, resolve).startswith("model=")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody")
def test_folders_that_may_not_be_entered(whole, tmp_path, capfd):
    """Root may enter everything, so a child becomes nobody. Every path of the command line is one line."""
    closed = f"{tmp_path}/closed/model"
    shutil.copytree(whole, closed)
    shutil.copytree(whole, tmp_path / "unreadable")
    (tmp_path / "unreadable/config.json").chmod(0)
    (tmp_path / "closed").chmod(0)
    (tmp_path / "bare").mkdir(mode=0)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    paths = (word for name in ("model", "data", "output", "eval-data") for word in (f"--{name}", closed))
    bare = f"{tmp_path}/bare"
    commands = [["finetune", *paths], ["merge", "--adapter", bare, "--output", bare]]
    for name, *_ in commands:
        main([name])  # imports what it needs while it may
    capfd.readouterr()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            lines = [refused(model, resolve) for model in (closed, f"{tmp_path}/unreadable")]
            code = int(not all("model=" in line and "ermission" in line for line in lines))
            code |= int([main(command) for command in commands] != [2, 2])
        finally:
            os._exit(code)
    assert wait(child, 60) == 0
    said = capfd.readouterr().err
    assert said.count("Permission denied") == 6 and "Traceback" not in said


def test_what_comes_from_the_hub_is_said(monkeypatch, capfd):
    """A base that an adapter names was typed by nobody. The hub here knows the model and has none of its files."""
    from huggingface_hub import constants

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.startswith("/api/models/owner/name")
            self.send_response(200 if known else 404)
            self.end_headers()
            if known:
                self.wfile.write(json.dumps({"id": "owner/name", "sha": "0" * 40, "siblings": []}).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        refused("owner/name", resolve)
        server.shutdown()
    assert "Fetching owner/name from http://127.0.0.1" in capfd.readouterr().err


def test_the_config_of_a_command_expands_home(monkeypatch, whole):
    monkeypatch.setenv("HOME", str(whole.parent))
    config = FinetuneConfig(model="~/model", data="~/data", output="~/run")
    assert load_config(resolve(config.model)).num_hidden_layers == 2
    assert (config.data, config.output) == (f"{whole.parent}/data", f"{whole.parent}/run")

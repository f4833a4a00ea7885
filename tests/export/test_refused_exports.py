"""What an export refuses or is interrupted in: the lines of `load_adapter`, before the base is read, and no trace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from helpers import unsealed
from safetensors.torch import load_file, save_file

from qlora import ExportSpec, UserError, export_adapter, load_adapter, load_base, save_adapter
from qlora.export.formats import FORMATS

TENSORS, PREFIX = "adapter_model.safetensors", "base_model.model."


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with `base`, a tiny model, and `adapter`, a DoRA on its 4 bits with a tokenizer."""
    place = tmp_path_factory.mktemp("trained")
    tiny.write_model(place / "base")
    model = tiny.adapted(load_base(str(place / "base"), dtype="fp32", device="cpu"))
    save_adapter(model, place / "adapter", tiny.tokenizer())
    return place


# ---------------------------------------------------------------- damages


def in_tensors(change):
    """A damage to the file of tensors, without a manifest that would tell."""

    def damage(folder: Path) -> None:
        path = unsealed(folder) / TENSORS
        save_file(change(load_file(path)), path)

    return damage


def in_json(name: str, **changes):
    def damage(folder: Path) -> None:
        path = unsealed(folder) / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def overwritten(name: str, data: bytes, sealed: bool = False):
    def damage(folder: Path) -> None:
        (folder if sealed else unsealed(folder)).joinpath(name).write_bytes(data)

    return damage


def removed(name: str, sealed: bool = False):
    def damage(folder: Path) -> None:
        (folder if sealed else unsealed(folder)).joinpath(name).unlink()

    return damage


def changed(end: str, change):
    """The tensors whose keys have `end` in them, changed; None: without them."""

    def change_all(tensors):
        made = {key: change(value) if end in key else value for key, value in tensors.items()}
        return {key: value.contiguous() for key, value in made.items() if value is not None}

    return in_tensors(change_all)


DAMAGES = {
    "another byte": overwritten("adapter_config.json", b"{}", sealed=True),
    "a file gone": removed("tokenizer.json", sealed=True),
    "no JSON": overwritten("adapter_config.json", b'{"r": 4,'),
    "no tensors": overwritten(TENSORS, b"none"),
    "no config": removed("adapter_config.json"),
    "no manifest, a file gone": removed("chat_template.jinja"),
    "another kind": in_json("adapter_config.json", peft_type="LOHA"),
    "another task": in_json("adapter_config.json", task_type="SEQ_CLS"),
    "biases": in_json("adapter_config.json", bias="all"),
    "ranks": in_json("adapter_config.json", rank_pattern={"q_proj": 8}),
    "no rank": in_json("adapter_config.json", r=None),
    "two alphas": in_json("adapter_config.json", lora_alpha=160),
    "two methods": in_json("adapter_config.json", use_dora=False),
    "another format": in_json("qlora.json", format=99),
    "no base": in_json("qlora.json", base=3),
    "an adapter's name": in_tensors(lambda t: {k.replace(".lora_A.", ".lora_A.default."): v for k, v in t.items()}),
    "no prefix": in_tensors(lambda t: {k.removeprefix(PREFIX): v for k, v in t.items()}),
    "empty": in_tensors(lambda t: {}),
    "no B": changed("1.mlp.up_proj.lora_B", lambda v: None),
    "no layer": changed("1.mlp.up_proj", lambda v: None),
    "no magnitudes": changed("lora_magnitude_vector", lambda v: None),
    "not finite": changed("0.self_attn.q_proj.lora_A", lambda v: v * torch.nan),
    "integers": changed("0.mlp.up_proj.lora_A", lambda v: v.int()),
    "another shape": changed("q_proj.lora_A", lambda v: v[:2]),
    "another vocabulary": in_tensors(lambda t: t | {f"{PREFIX}lm_head.weight": torch.zeros(330, 64)}),
    "no such layer": in_tensors(
        lambda t: t | {f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(3, 64)}
    ),
}


def lines(work, *arguments) -> list[str]:
    with pytest.raises(UserError) as error:
        work(*arguments)
    return error.value.problems


@pytest.fixture(scope="module")
def refused(trained, tmp_path_factory) -> dict[str, tuple[Path, list[str]]]:
    """Of each damage: the adapter, and the lines of `load_adapter`. The base's weights are gone then."""
    place, model = tmp_path_factory.mktemp("refused"), load_base(str(trained / "base"), dtype="fp32", device="cpu")
    found = {}
    for name, damage in DAMAGES.items():
        folder = Path(shutil.copytree(trained / "adapter", place / name))
        damage(folder)
        found[name] = folder, lines(load_adapter, model, folder)
    return found


@pytest.mark.parametrize("to", FORMATS)
def test_each_format_refuses_what_load_refuses_before_the_base_is_read(trained, refused, tmp_path, to):
    """In its lines. Where the base is read, its damaged weights are told."""
    weights = trained / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    try:
        for name, (folder, said) in refused.items():
            assert lines(export_adapter, folder, tmp_path / "out", ExportSpec(to)) == said, name
        (line,) = lines(export_adapter, trained / "adapter", tmp_path / "out", ExportSpec(to))
        assert line.startswith(f"model={trained / 'base'}: cannot be loaded")
    finally:
        weights.write_bytes(whole)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- interrupted

# In a child for each case: the command, which gets signals at its own file operations in the folder that it writes.
INTERRUPTED = """
import os, signal, sys
import peft, bitsandbytes, gguf, transformers.models.llama.modeling_llama
import qlora.cli, qlora.export.formats
adapter, place, *cases = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)
for case in cases:
    to, moment, *numbers = case.split()
    child = os.fork()
    if child == 0:
        opened = []
        def hook(event, arguments):
            if event == "open" and ".out.part" in str(arguments[0]):
                opened.append(arguments[0])
            first = event == "open" and len(opened) == int(moment) and len(numbers) == count
            second = event in ("os.remove", "os.rmdir") and len(numbers) == count - 1
            if numbers and (first or second):
                os.kill(os.getpid(), signal.Signals[numbers.pop(0)])
        count = len(numbers)
        sys.addaudithook(hook)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = qlora.cli.main(["export", "--adapter", adapter, "--to", to, "--output", place + "/out"])
        os._exit(code if not numbers else 99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, *sorted(os.listdir(place)), *os.listdir(place + "/out"), flush=True)
"""


def test_an_interrupted_export_of_any_format_leaves_no_trace(trained, tmp_path):
    """When it opens the first file or a later one; a second Ctrl-C comes while it clears up. What was there stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    moments = {"1 SIGTERM": 143, "4 SIGINT": 130, "2 SIGINT SIGINT": 130}
    cases = {f"{to} {moment}": code for to in FORMATS for moment, code in moments.items()}
    command = [sys.executable, "-c", INTERRUPTED, str(trained / "adapter"), str(tmp_path), *cases]
    done = subprocess.run(command, capture_output=True, text=True)
    assert dict(zip(cases, done.stdout.splitlines(), strict=True)) == {
        case: f"{code} mine.txt out" for case, code in cases.items()
    }, done.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"

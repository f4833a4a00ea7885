"""Checkpoints that are in 4 bits already: each fault of their files is one line that names the tensor and the file."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.errors import UserError
from qlora.export.bnb import quantize_checkpoint
from qlora.models.load import load_base

LAYER = "model.layers.0.mlp.down_proj.weight"
STATE = f"{LAYER}.quant_state.bitsandbytes__nf4"
NAMES = ("model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")
Damage = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tiny.write_model(folder / "dense")
    return quantize_checkpoint(str(folder / "dense"), folder / "nf4", dtype="fp32")


def put(key: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda tensors: tensors.__setitem__(key, change(tensors[key]))


def state(**changes: object) -> Damage:
    def change(raw: Tensor) -> Tensor:
        text = json.dumps(json.loads(bytes(raw.tolist())) | changes)
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return put(STATE, change)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "codes cut": (put(LAYER, lambda t: t[:8].clone()), f"{LAYER}=8 of uint8: .* needs 6144"),
    "codes of another type": (put(LAYER, lambda t: t.to(torch.int8)), f"{LAYER}=6144 of int8"),
    "a scale less": (put(f"{LAYER}.absmax", lambda t: t[:-1].clone()), r"absmax=191 of uint8"),
    "scales as floats": (put(f"{LAYER}.absmax", lambda t: t.float()), r"absmax=192 of float32"),
    "a nested scale more": (put(f"{LAYER}.nested_absmax", lambda t: torch.cat([t, t])), "nested_absmax=2 of float32"),
    "a scale as a number": (put(f"{LAYER}.nested_absmax", lambda t: t[0].clone()), "is a single number"),
    "NaN": (put(f"{LAYER}.nested_absmax", lambda t: t * torch.nan), "nested_absmax=NaN or inf"),
    "no scales": (lambda tensors: tensors.pop(f"{LAYER}.absmax"), "needs the tensors .*absmax"),
    "no codes": (lambda tensors: tensors.pop(LAYER), "needs the tensors"),
    "no nested map": (lambda tensors: tensors.pop(f"{LAYER}.nested_quant_map"), "needs the tensors .*nested_quant_map"),
    "another shape": (state(shape=[192, 64]), r"the model needs \(64, 192\)"),
    "a smaller shape": (state(shape=[64, 96]), "needs 3072 of uint8"),
    "a list as shape": (state(shape=[64]), "does not describe a 4-bit weight"),
    "another block size": (state(blocksize=128), "needs 96 of uint8"),
    "no block size": (state(blocksize=0), "does not describe a 4-bit weight"),
    "an infinite offset": (state(nested_offset=float("inf")), "nested_offset must be finite"),
    "an offset that is a word": (state(nested_offset="x"), "does not describe a 4-bit weight"),
    "broken JSON": (put(STATE, lambda t: t[:7].clone()), "does not describe a 4-bit weight in model.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_packed_weight_is_checked_against_itself(packed, tmp_path, name):
    damage, text = DAMAGES[name]
    shutil.copytree(packed, tmp_path / "base")
    tensors = load_file(packed / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=text) as error:
        load_base(str(tmp_path / "base"), device="cpu")
    assert all("\n" not in line and LAYER in line for line in error.value.problems)


@pytest.mark.parametrize("size", [0, 7, 1000, -9])
def test_a_cut_file_is_one_line(packed, tmp_path, size):
    shutil.copytree(packed, tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model=.*model\.safetensors: cannot be read"):
        load_base(str(tmp_path / "base"), device="cpu")
    path.unlink()
    with pytest.raises(UserError, match=r"model=.*model\.safetensors: cannot be read"):
        load_base(str(tmp_path / "base"), device="cpu")


def test_a_config_that_says_4_bits_over_16_bit_weights_is_refused(saved_models, tmp_path):
    shutil.copytree(saved_models("llama"), tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its files hold no 4-bit weight\. Take quantization_config out"):
        load_base(str(tmp_path / "base"), device="cpu")


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_every_weight_is_finite(saved_models, tmp_path, bits, name, value):
    shutil.copytree(saved_models("llama"), tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        load_base(str(tmp_path / "base"), bits=bits, device="cpu")
    assert len(error.value.problems) == 1


def test_threads_load_at_once(saved_models):
    """transformers sets torch's default dtype while it loads."""
    found: list[object] = []
    folder = str(saved_models("qwen2"))  # saved before any thread looks for it

    def load(dtype: str) -> None:
        try:
            model = load_base(folder, dtype=dtype, device="cpu")
            found.append((dtype, str(model.model.norm.weight.dtype), model.qlora.base.fingerprint))
        except UserError as error:
            found.append(error)

    threads = [threading.Thread(target=load, args=(dtype,)) for dtype in ("fp32", "bf16") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {kind[:2] for kind in found if isinstance(kind, tuple)} == {
        ("fp32", "torch.float32"),
        ("bf16", "torch.bfloat16"),
    }
    assert len(found) == 6 and not any(isinstance(kind, UserError) for kind in found)
    assert torch.get_default_dtype() == torch.float32

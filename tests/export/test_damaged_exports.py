"""One tensor of the written files changed before they are verified: seen in every format, and nothing is left."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import ggufs
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import adapted

from qlora import ExportSpec, UserError, export_adapter, load_base, save_adapter
from qlora.export.adapted_source import open_adapted
from qlora.export.formats import FORMATS
from qlora.export.peft import read_adapter
from qlora.export.verify import Text, compare, expect
from qlora.layers import nf4

K_ROWS, NORM = "k_proj", "norm"
NAMES = {
    "safetensors": {K_ROWS: "model.layers.1.self_attn.k_proj", NORM: "model.layers.0.post_attention_layernorm"},
    "gguf": {K_ROWS: "blk.1.attn_k", NORM: "blk.0.ffn_norm"},
}
SPECS = [
    ExportSpec("hf"),
    ExportSpec("hf", dtype="fp32"),
    ExportSpec("hf", base="original"),
    ExportSpec("bnb4-lora"),
    ExportSpec("bnb4-lora", double_quant=True),
    ExportSpec("bnb4"),
    *(ExportSpec("gguf", type=type) for type in ("F16", "BF16", "Q8_0", "Q4_0")),
    ExportSpec("gguf-lora"),
    ExportSpec("gguf-lora", type="Q4_0"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A DoRA adapter on a tiny Llama."""
    place = tmp_path_factory.mktemp("adapter")
    tiny.llama().save_pretrained(place / "model")
    ggufs.bpe_tokenizer().save_pretrained(place / "model")
    return save_adapter(adapted(load_base(str(place / "model"), dtype="fp32")), place / "adapter")


def scale(values: torch.Tensor) -> torch.Tensor:
    """The first 16 rows of a matrix, or a whole norm, times 1.5."""
    values = values.clone()
    values[: 16 if values.dim() == 2 else None] *= 1.5
    return values


def damage_safetensors(path: Path, name: str) -> None:
    """Scale in `path` what `name` is the module of; a 4-bit weight is decoded, and quantized again."""
    tensors = load_file(path)
    weight = f"{name}.weight"
    parts = {key.removeprefix(weight): tensors.pop(key) for key in list(tensors) if key.startswith(f"{weight}.")}
    if parts:
        held = nf4.from_bitsandbytes(parts | {"": tensors.pop(weight)})
        again = nf4.quantize(scale(nf4.dequantize(held)), held.blocksize, held.nested_absmax is not None)
        tensors |= {weight + suffix: part for suffix, part in nf4.to_bitsandbytes(again, torch.float32).items()}
    else:
        tensors[weight] = scale(tensors[weight])
    save_file(tensors, path, metadata={"format": "pt"})


def damage_gguf(path: Path, name: str) -> None:
    tensor = next(tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == f"{name}.weight")
    decoded = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    tensor.data[...] = gguf.quantize(scale(decoded).numpy(), tensor.tensor_type)
    tensor.data.flush()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.to}-{spec.base}-{spec.dtype}-{spec.type}")
def test_one_changed_tensor_is_seen(adapter, tmp_path, spec):
    """A whole export differs from what its format keeps by rounding alone, each damage by far more."""
    found, folder = open_adapted(read_adapter(adapter), tmp_path / "out", [], model=None, trust_remote_code=False)
    row = FORMATS[spec.to]
    spec = dataclasses.replace(spec, dtype=(row.dtype or found.dtype) if spec.dtype == "auto" else spec.dtype)
    folder.mkdir()
    row.write(found, spec, folder)
    expected = expect(found, ([], [Text(tuple(range(60, 100)))]), {spec.base: row.keeps(found, spec)})
    (path,) = [path for path in folder.iterdir() if path.name in ("model.safetensors", "model.gguf", "base.gguf")]
    whole = path.read_bytes()

    def closeness():
        return compare(expected, folder, lambda place: row.load(place, found, torch.float32), spec.base)

    assert closeness().is_whole and 1e-8 < closeness().noise < 1e-5
    for part in (K_ROWS, NORM):
        path.write_bytes(whole)
        damage = damage_gguf if path.suffix == ".gguf" else damage_safetensors
        damage(path, NAMES[path.suffix[1:]][part])
        found_damage = closeness()
        assert not found_damage.is_whole and found_damage.kept_error > 1000 * found_damage.noise, part


def test_a_damaged_export_is_refused_and_leaves_nothing(adapter, tmp_path, monkeypatch):
    """Of the format that loses most: KL 1e-4 would have passed any limit of it."""
    row = FORMATS["bnb4"]

    def damaged(found, spec, folder):
        row.write(found, spec, folder)
        damage_safetensors(folder / "model.safetensors", NAMES["safetensors"][K_ROWS])

    monkeypatch.setitem(FORMATS, "bnb4", dataclasses.replace(row, write=damaged))
    with pytest.raises(UserError) as error:
        export_adapter(adapter, tmp_path / "out", ExportSpec("bnb4"))
    (line,) = error.value.problems
    assert line.startswith("verify=failed: what was written computes another model than its format keeps: logits 0.")
    assert list(tmp_path.iterdir()) == []

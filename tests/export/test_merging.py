"""Merged equals adapted, in every architecture, and a merge never replaces or half-writes anything."""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys

import pytest
import tiny
import torch
import transformers
from helpers import TOLERANCE, relative, unsealed
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import CONFIGS, adapted

import qlora
from qlora import UserError, attach_adapters, load_base, save_adapter
from qlora.export.bnb import quantize_checkpoint
from qlora.export.peft import read_adapter_info
from qlora.export.shards import ShardWriter
from qlora.run.adapted import load_adapted
from qlora.specs import Quantization

IDS = torch.arange(2, 20).view(2, 9)
merge = functools.partial(qlora.merge, verify=False)  # these tests compare by themselves; test_verify.py has the rest


def trained(folder, out, method="dora", bits=4, dtype="fp32", **options):
    """A base with disturbed adapters and the adapter's folder."""
    model = adapted(load_base(str(folder), bits=bits, dtype=dtype), method, **options)
    save_adapter(model, out / "adapter")
    return model, out / "adapter"


def plain(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged_equals_adapted(saved_models, tmp_path, name, method):
    model, adapter = trained(saved_models(name), tmp_path, method)
    merge(adapter, tmp_path / "merged", dtype="fp32")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert relative(plain(tmp_path / "merged")(input_ids=IDS).logits, expected) < TOLERANCE[torch.float32]
        unchanged = load_base(str(saved_models(name)), dtype="fp32")(input_ids=IDS).logits
        assert relative(unchanged, expected) > 0.01  # the adapter does something


@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sixteen_bit_bases(saved_models, tmp_path, name, base):
    model, adapter = trained(saved_models(name), tmp_path, bits=16)
    merge(adapter, tmp_path / "merged", dtype="fp32", base=base)
    with torch.no_grad():
        assert (
            relative(plain(tmp_path / "merged")(input_ids=IDS).logits, model(input_ids=IDS).logits)
            < TOLERANCE[torch.float32]
        )


def test_onto_the_original(saved_models, tmp_path):
    """The update of the adapter on the 16-bit weights: what the same adapter gives on a 16-bit base."""
    _, adapter = trained(saved_models("llama"), tmp_path, "lora")
    merge(adapter, tmp_path / "merged", dtype="fp32", base="original")
    sixteen = adapted(load_base(str(saved_models("llama")), bits=16, dtype="fp32"), "lora")
    with torch.no_grad():
        assert (
            relative(plain(tmp_path / "merged")(input_ids=IDS).logits, sixteen(input_ids=IDS).logits)
            < TOLERANCE[torch.float32]
        )


def test_a_bitsandbytes_base(saved_models, tmp_path):
    quantization = Quantization(blocksize=128, double_quant=False, scales="mse")
    quantize_checkpoint(str(saved_models("llama")), tmp_path / "base", dtype="fp32", quantization=quantization)
    model, adapter = trained(tmp_path / "base", tmp_path)
    with torch.no_grad():
        assert torch.equal(load_adapted(adapter, device="cpu")[0](input_ids=IDS).logits, model(input_ids=IDS).logits)
    merge(adapter, tmp_path / "merged", dtype="fp32")
    with torch.no_grad():
        assert (
            relative(plain(tmp_path / "merged")(input_ids=IDS).logits, model(input_ids=IDS).logits)
            < TOLERANCE[torch.float32]
        )
    with pytest.raises(UserError, match="holds no original weights"):
        merge(adapter, tmp_path / "other", base="original")


def test_fitted_scales_come_back(saved_models, tmp_path):
    """Merging and loading the adapter quantize the base with the scales of the training; older adapters, which name
    none, had absmax.
    """
    name, made = str(saved_models("llama")), {}
    for scales in ("absmax", "mse"):
        (tmp_path / scales).mkdir()
        model = adapted(load_base(name, dtype="fp32", scales=scales), "dora")
        save_adapter(model, tmp_path / scales / "adapter")
        merge(tmp_path / scales / "adapter", tmp_path / scales / "merged", dtype="fp32")
        with torch.no_grad():
            made[scales] = model(input_ids=IDS).logits
            assert (
                relative(plain(tmp_path / scales / "merged")(input_ids=IDS).logits, made[scales])
                < TOLERANCE[torch.float32]
            )
            assert torch.equal(
                load_adapted(tmp_path / scales / "adapter", device="cpu")[0](input_ids=IDS).logits, made[scales]
            )
    assert relative(made["mse"], made["absmax"]) > 0.01
    assert "least squared error" in (tmp_path / "mse/adapter/README.md").read_text()
    recipe = unsealed(tmp_path / "absmax/adapter") / "qlora.json"
    own = json.loads(recipe.read_text())
    del own["base"]["scales"]
    recipe.write_text(json.dumps(own))
    with torch.no_grad():
        assert torch.equal(
            load_adapted(tmp_path / "absmax/adapter", device="cpu")[0](input_ids=IDS).logits, made["absmax"]
        )


def test_layers_without_an_adapter_are_dequantized_too(saved_models, tmp_path):
    model, adapter = trained(saved_models("llama"), tmp_path, targets="q_proj")
    merge(adapter, tmp_path / "merged", dtype="fp32")
    with torch.no_grad():
        assert (
            relative(plain(tmp_path / "merged")(input_ids=IDS).logits, model(input_ids=IDS).logits)
            < TOLERANCE[torch.float32]
        )


def test_loads_without_this_package(saved_models, tmp_path):
    _, adapter = trained(saved_models("llama"), tmp_path)
    merge(adapter, tmp_path / "merged")
    code = (
        "import sys; sys.modules['qlora'] = None; sys.modules['qlora_kernels'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(tmp_path / 'merged')!r}\n"
        "m = AutoModelForCausalLM.from_pretrained(folder); AutoTokenizer.from_pretrained(folder)\n"
        "print(m.dtype)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "torch.bfloat16", done.stderr


def test_shards(saved_models, tmp_path):
    model, adapter = trained(saved_models("mistral"), tmp_path)
    merge(adapter, tmp_path / "merged", dtype="fp32", shard_size=100_000)
    shards = sorted(p.name for p in (tmp_path / "merged").glob("*.safetensors"))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    with torch.no_grad():
        assert (
            relative(plain(tmp_path / "merged")(input_ids=IDS).logits, model(input_ids=IDS).logits)
            < TOLERANCE[torch.float32]
        )


MEASURE = """
import sys, torch, transformers
from qlora.export.formats import merge
from qlora.export.bnb import quantize_checkpoint
from qlora.train.memory import PeakMemory, anonymous_memory
transformers.utils.logging.disable_progress_bar()
small, adapter, model, out = sys.argv[1:]
quantize_checkpoint(small, out + "/small")  # what is imported and started at the first time
works = (
    lambda: merge(adapter, out + "/merged", verify=False),
    lambda: quantize_checkpoint(model, out + "/quantized"),
)
for work in works:
    baseline = anonymous_memory()
    with PeakMemory(torch.device("cpu"), every=0.002) as memory:
        work()
        print(memory.peak() - baseline)
"""


def test_nothing_is_kept(tmp_path, saved_models):
    """Peak RssAnon of writing a model is far below the model, which fits one shard.

    With two threads the same merge takes 79 to 119 MB of 277, by where the allocator lets its pages go.
    scripts/benchmarks/measure_memory.py shows a 1B model.
    """
    _, dense = tiny.eight_layers(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    save_adapter(attach_adapters(load_base(str(tmp_path / "model"), dtype="bf16"), rank=4), tmp_path / "adapter")
    where = [str(path) for path in (saved_models("llama"), tmp_path / "adapter", tmp_path / "model", tmp_path)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *where], capture_output=True, text=True, check=True)
    assert all(int(peak) < 0.5 * dense for peak in done.stdout.split()), (done.stdout, dense)


def test_the_writer(tmp_path):
    """What is written is what safetensors reads, aligned for its readers, in shards of their size; odd sizes and no
    values included.
    """
    sizes, torch_types = (
        (0, 1, 3, 8, 25, 60, 500, 30, 2, 749, 4),
        (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool),
    )
    tensors = {
        f"t{i}.{j}": torch.randn(n, 4).mul(50).to(kind)[:, : 1 + i % 4]
        for i, n in enumerate(sizes)
        for j, kind in enumerate(torch_types)
    }
    tensors["scalar"] = torch.tensor(3.5)
    writer = ShardWriter(tmp_path, 1000)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    found, files = {}, sorted(tmp_path.glob("model-*.safetensors"))
    for path in files:
        shard = load_file(path)
        assert sum(t.nbytes for t in shard.values()) <= 1000 or len(shard) == 1
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(torch.equal(file.get_slice(key)[...], value) for key, value in shard.items())
        header = json.loads(path.read_bytes()[8 : 8 + ShardWriter.HEADER])
        assert all(
            entry["data_offsets"][0] % shard[key].element_size() == 0 for key, entry in header.items() if key in shard
        )
        found |= shard
    assert found.keys() == tensors.keys() and all(torch.equal(value, tensors[key]) for key, value in found.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        and len(set(index["weight_map"].values())) == len(files) > 5
    )


def test_a_full_header_ends_a_shard(tmp_path):
    writer = ShardWriter(tmp_path, 10**9)
    names = [f"{i}." + "x" * 1000 for i in range(1500)]
    for name in names:
        writer.add(name, torch.zeros(1))
    writer.close()
    shards = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert [len(shard) > 900 for shard in shards] == [True, False] and {*shards[0], *shards[1]} == {*names}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("work", ["merge", "quantize"])
def test_a_full_disk_leaves_nothing(saved_models, tmp_path, work):
    """RLIMIT_FSIZE refuses to let a file grow past it, as a full disk does."""
    _, adapter = trained(saved_models("llama"), tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ShardWriter.HEADER + 50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"output=.*out: the disk is full; nothing was left half written"):
            if work == "merge":
                merge(adapter, tmp_path / "out")
            else:
                quantize_checkpoint(str(saved_models("llama")), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_base_is_refused(saved_models, tmp_path):
    """Same shapes, other weights: the fingerprint tells, and nothing is left behind."""
    _, adapter = trained(saved_models("llama"), tmp_path)
    other = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    other.save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="not those the adapter was trained on"):
        merge(adapter, tmp_path / "merged", model=str(tmp_path / "other"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "other"]


def test_a_base_of_another_shape_is_refused(saved_models, tmp_path):
    _, adapter = trained(saved_models("llama"), tmp_path)
    with pytest.raises(UserError, match=r"the adapter|adapter="):
        merge(adapter, tmp_path / "merged", model=str(saved_models("gpt2")))


def test_an_output_in_use_is_refused(saved_models, tmp_path):
    _, adapter = trained(saved_models("llama"), tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(UserError) as error:
        merge(adapter, tmp_path / "merged", base="nearest", dtype="int8")
    assert len(error.value.problems) == 3
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"


def test_an_adapter_without_our_recipe(saved_models, tmp_path):
    """A PEFT adapter does not say how its base was quantized: only the original is a base we know."""
    model, adapter = trained(saved_models("llama"), tmp_path, bits=16)
    (unsealed(adapter) / "qlora.json").unlink()
    assert read_adapter_info(adapter)[0].bits is None
    with pytest.raises(UserError, match="`base=original`"):
        merge(adapter, tmp_path / "merged")
    merge(adapter, tmp_path / "merged", base="original", dtype="fp32", model=str(saved_models("llama")))
    with torch.no_grad():
        assert (
            relative(plain(tmp_path / "merged")(input_ids=IDS).logits, model(input_ids=IDS).logits)
            < TOLERANCE[torch.float32]
        )

"""What we take from transformers beside its public interface, a test each: what to run first on a new version."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import random_model
from torch import nn

from qlora.models.transformers_seam import (
    METHOD,
    attention_implementation,
    forget_quantizer,
    loaded_from,
    stream_config,
    takes_attention,
)

HOUSE = Path(__file__).resolve().parents[2]


def load(folder: Path, on_tensor, wants=lambda name: True, prepare=lambda model: None, dtype=torch.float32):
    """A model loaded through the seam's quantizer, with its marks on it."""
    config = stream_config(prepare, wants, on_tensor)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"}, quantization_config=config
    )


def test_every_wanted_tensor_is_seen_once_under_its_name_in_the_model(saved_models):
    """`param_needs_quantization`, `get_quantize_ops` and `ConversionOps.convert`; the rest is loaded as ever."""
    seen: list[str] = []

    def on_tensor(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(name)
        return {name: tensor + 1}

    model = load(saved_models("llama"), on_tensor, wants=lambda name: name.endswith("_proj.weight"))
    expected = random_model("llama").state_dict()
    assert sorted(seen) == sorted(name for name in expected if name.endswith("_proj.weight"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name] + 1 if name in seen else expected[name]), name


def test_what_is_asked_for_as_stored_is_not_cast(saved_models):
    """`_get_dtype_plan`, which names no dtype for it; the plan goes with the quantizer's other marks."""
    seen: dict[str, torch.dtype] = {}

    def on_tensor(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        seen[name] = tensor.dtype
        return {name: tensor.to(torch.bfloat16)}

    config = stream_config(lambda model: None, lambda name: True, on_tensor, lambda name: "mlp.up" in name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved_models("llama"), dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=config
    )
    assert {dtype for name, dtype in seen.items() if "mlp.up" in name} == {torch.float32}
    assert {dtype for name, dtype in seen.items() if "mlp.up" not in name} == {torch.bfloat16}
    forget_quantizer(model)
    assert "_get_dtype_plan" not in vars(model)


def test_the_empty_model_is_seen_first(saved_models):
    """`_process_model_before_weight_loading`: nothing has values yet, and what is put into places is loaded."""
    places = []

    def prepare(model: nn.Module) -> None:
        places.extend(p.device.type for p in model.parameters())

    load(saved_models("llama"), lambda name, tensor: {name: tensor}, prepare=prepare)
    assert set(places) == {"meta"}


def test_codes_take_the_place_of_a_uint8_buffer(saved_models):
    """The weight arrives in the model's dtype, not cast to integers, and what is returned keeps its own dtype."""
    name = "model.layers.0.mlp.up_proj"

    def prepare(model: nn.Module) -> None:
        layer = nn.Module()
        layer.register_buffer("weight", torch.empty(7, 1, dtype=torch.uint8, device="meta"))
        model.set_submodule(name, layer)

    def on_tensor(parameter: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        assert parameter == f"{name}.weight"
        assert torch.equal(tensor, random_model("llama").get_submodule(name).weight.to(torch.bfloat16))
        return {parameter: torch.arange(7, dtype=torch.uint8).view(7, 1)}

    model = load(
        saved_models("llama"), on_tensor, wants=lambda n: n.startswith(name), prepare=prepare, dtype=torch.bfloat16
    )
    codes = model.get_submodule(name).weight
    assert codes.dtype == torch.uint8 and codes.flatten().tolist() == list(range(7))


def test_memory_is_set_aside_for_codes_of_one_byte(saved_models):
    """`param_element_size`, which transformers asks before it allocates on a GPU."""
    model = load(saved_models("llama"), lambda name, tensor: {name: tensor})
    quantizer = model.hf_quantizer
    quantizer.codes = {"a.weight"}
    assert quantizer.param_element_size(model, "a.weight", torch.empty(2)) == 1
    assert quantizer.param_element_size(model, "b.weight", torch.empty(2)) == 4


def test_no_mark_of_the_quantizer_is_left(saved_models, tmp_path):
    """`hf_quantizer`, `quantization_method`, `is_quantized`, `config._is_quantized`, `config.quantization_config`."""
    model = load(saved_models("llama"), lambda name, tensor: {name: tensor})
    assert model.is_quantized and model.hf_quantizer is not None and model.quantization_method == METHOD
    forget_quantizer(model)
    assert not model.is_quantized and not hasattr(model, "hf_quantizer") and not hasattr(model, "quantization_method")
    assert not model.config._is_quantized and "quantization_config" not in model.config.to_dict()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not getattr(again, "is_quantized", False) and again.dtype == torch.float32
    transformers.Trainer(model, transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[]))


def test_the_attention_that_a_model_runs():
    """`config._attn_implementation` and `_can_set_attn_implementation`."""
    model = random_model("llama")
    assert attention_implementation(model) == "sdpa" and takes_attention(model)
    model.set_attn_implementation("eager")
    assert attention_implementation(model) == "eager"


def test_the_name_that_a_model_was_loaded_by(saved_models):
    """`config._name_or_path`."""
    folder = str(saved_models("llama"))
    assert loaded_from(transformers.AutoModelForCausalLM.from_pretrained(folder)) == folder
    assert loaded_from(random_model("llama")) is None and loaded_from(nn.Linear(1, 1)) is None


@pytest.mark.parametrize("module", ["qlora.models.load", "qlora.models.transformers_seam"])
def test_an_import_changes_nothing(module):
    """Neither transformers' registry nor the environment; the quantizer is registered by the first load."""
    code = (
        "import os\nbefore = dict(os.environ)\n"
        f"import {module}\nfrom qlora.models.transformers_seam import METHOD, stream_config\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "changed = {n for n in os.environ if before.get(n) != os.environ[n]}\n"
        "assert METHOD not in known\n"
        "assert not {n for n in changed if n.startswith(('ONEDNN', 'LRU'))}, changed\n"
        "for _ in range(2): stream_config(None, None, None)\nassert METHOD in known\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOUSE), str(HOUSE / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr

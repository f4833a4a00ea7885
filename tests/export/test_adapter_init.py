"""How A is drawn: the option reaches the adapter and its file, and PEFT draws the same from that file."""

from __future__ import annotations

import json
import math

import peft
import pytest
import tiny
import torch

from qlora import adapter_parameters, attach_adapters, named_adapters, save_adapter
from qlora.config.commands import FinetuneConfig
from qlora.export.peft import read_adapter_info

IDS = torch.arange(2, 20).view(2, 9)


def drawn(init: str, rank: int = 8) -> torch.Tensor:
    """All values of A of a fresh adapter whose layers take 64 inputs."""
    torch.manual_seed(3)
    model = attach_adapters(tiny.llama(), init=init, rank=rank, targets="q_proj,k_proj,v_proj,o_proj")
    return torch.cat([adapter.lora_A.detach().flatten() for _, adapter in named_adapters(model)])


@pytest.mark.parametrize("rank", [4, 8])
def test_a_is_drawn_as_the_option_says(rank):
    """Kaiming-uniform is within 1 / sqrt(in), whatever the rank; Gaussian has the standard deviation 1 / rank."""
    uniform, normal = drawn("kaiming", rank), drawn("gaussian", rank)
    bound = 1 / math.sqrt(64)
    assert uniform.abs().max() <= bound and abs(uniform.std().item() / (bound / math.sqrt(3)) - 1) < 0.03
    assert abs(normal.std().item() * rank - 1) < 0.05 and normal.abs().max() > 3 / rank


def test_the_option_reaches_the_adapter():
    needed = {"model": "m", "data": "d", "output": "o"}
    assert FinetuneConfig(**needed).adapter().init == "kaiming"
    assert FinetuneConfig(**needed, init="gaussian").adapter().init == "gaussian"


@pytest.mark.parametrize("init, written", [("kaiming", True), ("gaussian", "gaussian")])
def test_peft_reads_how_it_was_drawn(tmp_path, init, written):
    model = tiny.adapted(tiny.llama(), init=init).eval()
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == written
    assert read_adapter_info(tmp_path)[1].init == init
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), str(tmp_path)).eval()
    assert theirs.peft_config["default"].init_lora_weights == written
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5)


def test_peft_draws_a_with_the_same_spread(tmp_path):
    """A fresh PEFT adapter by our written configuration."""
    save_adapter(attach_adapters(tiny.llama(), method="lora", init="gaussian", rank=8), tmp_path)
    fresh = peft.get_peft_model(tiny.llama(), peft.LoraConfig.from_pretrained(str(tmp_path)))
    values = torch.cat([p.detach().flatten() for name, p in fresh.named_parameters() if "lora_A" in name])
    assert abs(values.std().item() * 8 - 1) < 0.05


def test_the_default_draws_what_it_always_drew():
    torch.manual_seed(7)
    named = adapter_parameters(attach_adapters(tiny.llama(), init="kaiming"))
    torch.manual_seed(7)
    plain = adapter_parameters(attach_adapters(tiny.llama()))
    assert all(torch.equal(one, two) for one, two in zip(named, plain, strict=True))

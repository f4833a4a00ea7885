"""GGUF files: how positions are scaled, and damaged ones."""

from __future__ import annotations

import random
import struct

import pytest
import tiny
import torch
import transformers
from ggufs import write_gguf
from helpers import relative

from qlora import UserError, load_base, load_tokenizer
from qlora.models.gguf_header import read_header, with_rope
from qlora.models.limits import config_limits
from qlora.models.source import load_config, resolve

IDS = torch.arange(2, 42).view(2, 20)


def llama(scaling: dict | None = None) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        vocab_size=320,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | (scaling or {}),
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def llama3_factors(inv_freq: torch.Tensor, factor: float) -> torch.Tensor:
    """As llama.cpp's converter writes them for Llama 3.1 and 3.2."""
    wavelength = 2 * torch.pi / inv_freq
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(wavelength < 2048, 1.0, torch.where(wavelength > 8192, factor, between))


FACTORS = torch.tensor([1.0] * 16 + [8.0] * 16)


@pytest.mark.parametrize("case", ["none", "ones", "listed", "llama3", "linear", "old linear", "yarn"])
def test_scaled_positions(tmp_path, case):
    """The logits are those of the rotation by the file, by loading and by a config.json written from it."""
    model, keys, factors = llama(), {}, None
    rotary = model.model.rotary_emb
    if case == "ones":
        factors = torch.ones(32)
    elif case in ("listed", "llama3"):
        factors = FACTORS if case == "listed" else llama3_factors(rotary.inv_freq, 32.0)
        rotary.inv_freq /= factors
    elif "linear" in case:
        rotary.inv_freq /= 4.0
        keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
        keys = {"rope.scale_linear": 4.0} if case == "old linear" else keys
    elif case == "yarn":
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        model = llama(scaling)
        keys = {f"rope.scaling.{key}": value for key, value in (("type", "yarn"), ("factor", 4.0))}
        keys |= {"rope.scaling.original_context_length": 16}
    path = write_gguf(tmp_path / "model.gguf", model, keys, factors)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        base = load_base(str(path), bits=16, dtype="fp32")
        assert relative(base(input_ids=IDS).logits, expected) < 1e-5
        config = load_config(resolve(str(path)))
        config.save_pretrained(tmp_path / "config")
        again = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path / "config")
        ).eval()
        again.load_state_dict(base.state_dict())
        assert relative(again(input_ids=IDS).logits, expected) < 1e-5
    kind = {"listed": "longrope", "llama3": "llama3", "yarn": "yarn"}.get(
        case, "linear" if "linear" in case else "default"
    )
    assert config.rope_parameters["rope_type"] == kind


@pytest.mark.parametrize(
    "keys, factors, said",
    [
        ({"rope.scaling.type": "su"}, None, "its positions are scaled (su)"),
        ({"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 0.5}, None, "its positions are scaled (yarn)"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": "four"}, None, "its positions are scaled (linear)"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": -4.0}, None, "its positions are scaled (linear)"),
        ({"rope.scaling.type": 3}, None, "its positions are scaled (3)"),
        ({}, torch.ones(7) * 2, "holds 7 rotary factors for 32 pairs"),
        ({}, torch.tensor([float("nan")] * 32), "must be positive numbers"),
    ],
)
def test_a_scaling_that_is_not_understood(tmp_path, keys, factors, said):
    path = write_gguf(tmp_path / "model.gguf", llama(), keys, factors)
    with pytest.raises(UserError) as caught:
        load_base(str(path))
    assert said in str(caught.value) and len(caught.value.problems) == 1


def test_windows_keep_their_own_rotation():
    """Gemma 3 has two: llama.cpp scales that of full attention alone."""
    config = with_rope(tiny.CONFIGS["gemma3"](), {"rope_type": "linear", "factor": 8.0})
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert config_limits(config).positions == 8 * config.max_position_embeddings


def test_damaged_files_are_one_line(tmp_path):
    """Cut, flipped, lying about a length: nothing loops, nothing grows."""
    whole = write_gguf(tmp_path / "whole.gguf", llama()).read_bytes()
    path, dice = tmp_path / "model.gguf", random.Random(0)
    assert load_tokenizer(str(tmp_path / "whole.gguf"))("1+1").input_ids
    assert read_header(tmp_path / "whole.gguf").get("block_count") == 2
    block = whole.index(b"llama.block_count") + len("llama.block_count") + 4
    cases = [b"", b"GGUF", b"hello", whole[:10], whole[:1000], whole[: len(whole) // 2], whole[:-9]]
    cases += [whole[:block] + struct.pack("<I", many) + whole[block + 4 :] for many in (0, 3_000, 2_600_000_000)]
    lengths = [whole.index(text) - 8 for text in (b"general.architecture", b"token_embd.weight", b"llama.block_count")]
    lengths.append(whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8)
    cases += [whole[:at] + struct.pack("<Q", many) + whole[at + 8 :] for at in lengths for many in (2**40, 2**64 - 1)]
    for number, case in enumerate(cases):
        path.write_bytes(case)
        for read in (load_base, load_tokenizer):
            if read is load_tokenizer and number == 6:  # only the weights are cut
                continue
            with pytest.raises(UserError) as caught:
                read(str(path))
            assert len(caught.value.problems) == 1 and "\n" not in str(caught.value), number
    header = whole.index(b"token_embd.weight")
    for _ in range(300):
        at = dice.randrange(header)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :])
        try:
            read_header(path)
        except UserError as error:
            assert "\n" not in str(error)

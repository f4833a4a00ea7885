"""Llama models of random NF4 weights, made in memory: for speed and memory at sizes whose checkpoints nobody wants to download."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qlora.adapters import linear_names
from qlora.fused import fuse
from qlora.linear import NF4Linear

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "3B": (3072, 8192, 28, 24, 8, 128256, True),
    "7B": (4096, 11008, 32, 32, 32, 32000, False),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
}


def llama_config(shape: str) -> LlamaConfig:
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        vocab_size=vocabulary, tie_word_embeddings=tied, dtype="bfloat16", architectures=["LlamaForCausalLM"], max_position_embeddings=8192,
    )  # fmt: skip


def random_nf4_llama(shape: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A frozen Llama as `qlora.load_base` returns it, its codes and scales drawn on `device`, so nothing dense ever exists.

    The scales are about those of a normal initialization with a standard deviation of 0.02.
    """
    config = llama_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name in linear_names(model):
            layer = model.get_submodule(name)
            model.set_submodule(name, NF4Linear(layer.in_features, layer.out_features))
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its frequencies are computed, not loaded
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(0, 0.02, generator=generator)
        for module in model.modules():
            if isinstance(module, NF4Linear):
                module.weight.random_(0, 256, generator=generator)
                module.absmax.random_(64, 192, generator=generator)
                module.nested_absmax.fill_(0.02)
                module.nested_offset.fill_(0.05)
    if device == "cpu":
        fuse(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()

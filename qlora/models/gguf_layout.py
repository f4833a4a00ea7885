"""What llama.cpp does otherwise than transformers: one rule for reading and for writing.

    stored = (w + shift)[order]        order: rows of llama's q and k, shift: 1 for gemma's norms

llama.cpp rotates neighbouring pairs (0, 1), (2, 3), ..., transformers the pairs (0, d/2), (1, d/2 + 1), ...: llama's
rows of q and k are stored in the order that makes these the same. The other families have a rotation of their own in
llama.cpp. The alternative, a pair of functions for each direction, can disagree.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig


def row_order(architecture: str, name: str, config: PretrainedConfig) -> Tensor | None:
    """Row i of the stored tensor is row `order[i]` of the model's parameter (or module) `name`; None: as they are."""
    parts = name.split(".")
    heads = config.num_attention_heads if "q_proj" in parts else config.num_key_value_heads
    if architecture != "llama" or not {"q_proj", "k_proj"} & set(parts):
        return None
    pairs = head_dim(config) // 2
    indices = torch.arange(
        heads * 2 * pairs, device="cpu"
    )  # where models are made empty, another device is the default
    return indices.view(heads, 2, pairs).transpose(1, 2).reshape(-1)


def shift(architecture: str, name: str) -> float:
    """What is added to the model's parameter `name`."""
    return 1.0 if architecture.startswith("gemma") and "norm" in name else 0.0


def head_dim(config: PretrainedConfig) -> int:
    """The width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def score_scalar(config: PretrainedConfig, architecture: str) -> float:
    """By whose root llama.cpp divides gemma's scores: the width of a head, but in the models of 27 billion weights."""
    largest = {"gemma2": 46, "gemma3": 62}.get(architecture)
    if config.num_hidden_layers == largest:
        return config.hidden_size / config.num_attention_heads
    return head_dim(config)

"""Tiny GGUF files as llama.cpp would write them, of the tiny Llama with the tiny tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor as Values
from torch import nn
from transformers import PreTrainedTokenizerFast

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path, model: nn.Module, keys: Mapping[str, Any] | None = None, factors: Values | None = None
) -> Path:
    """`model` (a Llama in float32) as a GGUF file; `keys` are further ones of its architecture, such as
    rope.scaling.type, and `factors` its rope_freqs.weight.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (keys or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"llama.{key}", value)
    _add_tokenizer(writer, config.vocab_size)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(_name(name), _stored(name, value, config).numpy())
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[part]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def _stored(name: str, value: Values, config: Any) -> Values:
    """llama.cpp rotates neighbouring pairs, transformers halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return value.contiguous()
    return value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape).contiguous()


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    vocabulary = tiny.tokenizer().get_vocab()
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    tokens += ["ab", *(f"<unused{i}>" for i in range(size - len(tokens) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1] + [3] * (size - 259))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(tiny.TEMPLATE)


def bpe_tokenizer(pre: pre_tokenizers.PreTokenizer | None = None, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens that merges, splits text by `pre` (None: as GPT-2 does), and has the tiny
    chat template. `options` are those of the BPE model.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("1", "2"), ("Ġ", "1")]
    vocabulary = {token: i for i, token in enumerate([*letters, *(left + right for left, right in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = tiny.TEMPLATE
    return tokenizer

"""A tiny random model of any type of `AutoModelForCausalLM`: its default config with every size made small.

    default config -> sizes by the names of its fields (SIZES) -> what a type needs beyond that (EXTRA) -> random model

Used by sweep_architectures.py. A config class of its own for each of 189 types, as transformers' tests have them, would
have to be kept up with every release; names of fields are few, because architectures copy each other.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 320
SIZES: list[tuple[str, int]] = [  # the first pattern that fits a field's whole name gives its size
    (r".*vocab_size.*|.*_vocab|unpadded_vocab_size", VOCABULARY),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|kv_n_heads|swa_num_key_value_heads|.*_key_value_heads", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"linear_num_key_heads", 2),
    (r".*num_heads|n_heads?|.*attention_heads|num_attention_heads|.*_num_.*heads|index_n_heads|linear_num_heads", 4),
    (r".*head_dim|.*_d_head|d_head|dim_head|d_kv|kv_channels|qk_rope_head_dim|attention_head_size|rotary_dim", 16),
    (r"(num_|n_)?(hidden_|decoder_|encoder_)?layers?|n_layers?|num_(decoder|encoder)_layers|num_blocks", 2),
    (r"num_layers_per_stack|max_window_layers|depth", 2),
    (r".*(num|n)_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r".*experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|moe_top_k", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|mamba_ngroups|num_(shared|nextn).*", 1),
    (r"(q|kv)_lora_rank|.*_rank|time_step_rank", 16),
    (r"attention_hidden_size|.*hidden_size|d_model|n_embd|dim|emb(ed)?(ding)?_dim(ension)?|.*embed_dim|lru_width", 64),
    (r"word_embed_proj_dim|.*embedding_size|dim_model_base|(projector|vision)_.*_dim", 64),
    (
        r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|dff|d_ff|dim_ff|d_inner|n_inner|feed_forward_size|mlp_dim",
        96,
    ),
    (r"mamba_d_ssm", 128),
    (r".*(d_state|state_size)", 16),
    (r".*window.*|attention_chunk_size|local_attention|sliding_window_size", 24),
    (r".*chunk_size|.*chunksize", 16),
    (r"index_topk", 64),  # all tokens: the scores of a tiny indexer tie at 0, and ties fall as they like
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|.*target_positions", 256),
    (r".*_per_layer_input", 16),
]
# What a type needs beyond its sizes. A function of the fields that were made small.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HEADS: dict[str, Any] = {"head_dim": 16, "num_key_value_heads": 2}
EXTRA: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": {**HEADS, "num_experts": 4, "moe_topk": 2},
    "ministral": HEADS,
    "nemotron": HEADS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "longcat_flash": {"head_dim": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 8,
        "max_position_embeddings": 64,
    },
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4, "n_mamba_heads": 2},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4, "n_mamba_heads": 8},
    "dots3_note_text": {"num_key_value_heads": 4},
}
# Not causal models of text, or not buildable: why they are left out.
LEFT_OUT = {
    "dots3_note": "the composite of dots3_note_text with towers; the text model is a type of its own",
    "gemma4_assistant": "a drafter that needs the hidden states of another model",
    "gemma4_unified_assistant": "a drafter that needs the hidden states of another model",
    "gemma3n": "its vision tower needs timm; the text model is a type of its own",
    "musicgen": "audio codes with several heads, no text model",
    "musicgen_melody": "audio codes with several heads, no text model",
}


def small(name: str, value: Any) -> Any:
    """The small value of a field; unchanged where none of SIZES fits or it is small already."""
    if name.endswith(("token_id", "token_index", "_id")) and type(value) is int and value >= VOCABULARY:
        return value % 300
    if type(value) is float and "drop" in name:
        return 0.0
    if type(value) is int:
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                return min(value, size)
    return value


def tiny_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of a config that change, its sub-configs among them."""
    fields: dict[str, Any] = {}
    given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    layers = next((given[n] for n in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if n in given), None)
    for name, value in given.items():
        if isinstance(value, PretrainedConfig):
            fields[name] = {**tiny_fields(value), **EXTRA.get(value.model_type, {}), "model_type": value.model_type}
        elif isinstance(value, list) and layers and len(value) == layers and layers > 2:
            kinds = list(dict.fromkeys(map(str, value)))
            keep = [next(v for v in value if str(v) == kind) for kind in kinds]
            fields[name] = [small(name, v) for v in (keep * 4)[:4]]
        elif (changed := small(name, value)) != value:
            fields[name] = changed
    if given.get("kv_lora_rank"):  # latent attention has as many keys as queries
        fields["num_key_value_heads"] = 4
    if any(isinstance(value, list) for value in fields.values()):
        for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
            if name in fields:
                fields[name] = 4
    return fields


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """The config of a type, made small."""
    config_class = CONFIG_MAPPING[kind]
    fields = {**tiny_fields(config_class()), **EXTRA.get(kind, {}), **changes}
    return config_class(**fields)


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model with random weights, large enough that a wrong one shows."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Linear, nn.Embedding)) and weight is not None:
                weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 3:
                parameter.normal_(0, 0.15)
            elif parameter.dim() == 1 and "A_log" not in name and "dt" not in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()

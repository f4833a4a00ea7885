"""The config of a GGUF file: as transformers reads it, and what it leaves out.

    width of a head (attention.key_length), llama's biases, gemma's scale of scores, caps and rotation under windows,
    the part of a head that Phi-3 rotates, all of Gemma 1, and how positions are scaled (`gguf_header.rope_parameters`)

Each has a default in transformers that is right for the models that came first, and another model for the rest. The
alternative, a reader for every architecture, would repeat what transformers does right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, GemmaConfig, PretrainedConfig

from qlora.errors import guard
from qlora.models.gguf_header import Header, read_header, rope_parameters, with_rope
from qlora.models.gguf_layout import score_scalar


def read_config(path: Path) -> PretrainedConfig:
    """The transformers config of a GGUF file.

    Raises:
        UserError: a damaged file; a scaling of positions that cannot be said in a config.
    """
    header = read_header(path)
    with guard("model", path, "its config cannot be read", "Get the file again"):
        config = _gemma(header) if header.architecture == "gemma" else _by_transformers(path)
        _complete(config, header)
    return with_rope(config, rope_parameters(header, path, config))


def _by_transformers(path: Path) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    return config


def _gemma(header: Header) -> GemmaConfig:
    """Gemma 1, of which transformers reads the tokenizer alone."""
    tokens = header.values["tokenizer.ggml.tokens"]
    special: dict[str, Any] = {
        f"{name}_token_id": header.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")
    }
    return GemmaConfig(
        vocab_size=tokens if isinstance(tokens, int) else len(tokens),
        hidden_size=header.get("embedding_length"),
        intermediate_size=header.get("feed_forward_length"),
        num_hidden_layers=header.get("block_count"),
        num_attention_heads=header.get("attention.head_count"),
        num_key_value_heads=header.get("attention.head_count_kv"),
        rms_norm_eps=header.get("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=header.get("context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": header.get("rope.freq_base", 10000.0)},
        pad_token_id=header.values.get("tokenizer.ggml.padding_token_id", 0),
        **special,
    )


def _complete(config: Any, header: Header) -> None:
    """What transformers left out, in place."""
    architecture, width = header.architecture, header.get("attention.key_length")
    if width is not None and getattr(config, "head_dim", None) is not None:
        config.head_dim = width
    if architecture == "llama" and config.model_type == "llama":
        config.attention_bias = "blk.0.attn_q.bias" in header.tensors
        config.mlp_bias = "blk.0.ffn_down.bias" in header.tensors
    if not hasattr(config, "rope_parameters"):
        return
    rotated = header.get("rope.dimension_count")
    if architecture == "phi3" and rotated is not None:
        whole = width or config.hidden_size // config.num_attention_heads
        config.rope_parameters = config.rope_parameters | {"partial_rotary_factor": rotated / whole}
    if architecture in ("gemma2", "gemma3"):
        config.query_pre_attn_scalar = score_scalar(config, architecture)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            setattr(config, name, header.get(name, getattr(config, name)))
    if architecture == "gemma3":
        full, local = (config.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
        config.rope_parameters = {
            "full_attention": full | {"rope_theta": header.get("rope.freq_base", 1_000_000.0)},
            "sliding_attention": local | {"rope_theta": header.get("rope.freq_base_swa", 10_000.0)},
        }

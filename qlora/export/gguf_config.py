"""A config in llama.cpp's words: which architecture, its numbers, how positions rotate; what it cannot say is refused.

    architecture_of(config) -> "llama"      config_problems(config) -> lines      add_config(writer, config)
    rope_tensors(config) -> {"rope_freqs.weight": factors by which the frequencies are divided}

llama.cpp has one fixed graph for an architecture, and takes for granted what its files have no key for: an activation,
which layers have a window, the scale of gemma's scores. A model with another value would be read without a word and
compute something else, so each is held against what llama.cpp takes for granted. The alternative, its own converter,
knows more families, and believes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora.errors import UserError, problem
from qlora.models.gguf_layout import head_dim, score_scalar

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
WINDOWED = {"gemma2": 2, "gemma3": 6}  # every so many layers one sees everything, the last of them
_REMEDY = "Export to a folder of transformers, and serve that"
CPU = torch.device("cpu")
_SCALED = ("llama", "phi3")  # they take factors for each frequency


def architecture_of(config: PretrainedConfig) -> str:
    """llama.cpp's name for the architecture.

    Raises:
        UserError: none that we write.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        rule = f"cannot be written as GGUF, only {', '.join(ARCHITECTURES)}"
        raise UserError(problem("model", config.model_type, rule, _REMEDY))
    return found


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """The parameters of the rotation in layers that see everything."""
    held: dict[str, Any] = config.rope_parameters
    return held.get("full_attention", held)


def _window(config: PretrainedConfig) -> int | None:
    """The width of the window that some layers have; None where none has one."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def config_problems(config: PretrainedConfig) -> list[str]:
    """A line for each value that llama.cpp would compute otherwise."""
    architecture = architecture_of(config)
    expected: dict[str, Any] = {"attention_bias": None, "use_bidirectional_attention": None}
    if architecture == "llama":
        del expected["attention_bias"]
    if architecture.startswith("gemma"):
        expected["hidden_activation"] = expected["hidden_act"] = "gelu_pytorch_tanh"
        expected["tie_word_embeddings"] = True
    else:
        expected["hidden_act"] = "silu"
    if architecture == "gemma3":
        expected["attn_logit_softcapping"] = None
    found = [
        problem(name, value, f"llama.cpp's {architecture} takes {meant} for granted", _REMEDY)
        for name, meant in expected.items()
        if (value := getattr(config, name, meant)) != meant and (value or meant)
    ]
    return found + _attention_problems(config, architecture) + _rope_problems(config, architecture)


def _attention_problems(config: PretrainedConfig, architecture: str) -> list[str]:
    """Which layers have a window, and by what scores are divided."""
    found = []
    every = WINDOWED.get(architecture)
    kinds = list(getattr(config, "layer_types", None) or [])
    if every is not None:
        meant = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(len(kinds))]
        if kinds != meant:
            rule = f"llama.cpp's {architecture} has full attention in every layer {every} of {every}, and only there"
            found.append(problem("layer_types", kinds, rule, _REMEDY))
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != score_scalar(config, architecture):
        rule = f"llama.cpp's {architecture} of this size takes {score_scalar(config, architecture)} for granted"
        found.append(problem("query_pre_attn_scalar", scalar, rule, _REMEDY))
    return found


def _rope_problems(config: PretrainedConfig, architecture: str) -> list[str]:
    rope = _rope(config)
    kind, found = rope.get("rope_type", "default"), []
    known = ["default", "linear", "yarn", *(["llama3", "longrope"] if architecture in _SCALED else [])]
    if kind not in known:
        rule = f"llama.cpp's {architecture} has no such scaling of positions, only {', '.join(known)}"
        found.append(problem("rope_type", kind, rule, _REMEDY))
    for name in ("mscale", "mscale_all_dim", "truncate"):
        if rope.get(name, True) is not True:
            found.append(problem(name, rope[name], "GGUF has no key for it", _REMEDY))
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and architecture != "phi3":
        rule = f"llama.cpp's {architecture} rotates whole heads"
        found.append(problem("partial_rotary_factor", rope["partial_rotary_factor"], rule, _REMEDY))
    if architecture == "gemma3":
        local = config.rope_parameters["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            rule = "llama.cpp's gemma3 does not scale positions in layers with a window"
            found.append(problem("rope_type", local["rope_type"], rule, _REMEDY))
    return found


def context_length(config: PretrainedConfig) -> int:
    """Within how many positions llama.cpp computes what transformers does: it knows gemma's windows, and no others."""
    window, longest = _window(config), int(config.max_position_embeddings)
    if window is None or architecture_of(config) in WINDOWED:
        return longest
    return min(longest, window)


def add_config(writer: Any, config: PretrainedConfig) -> None:
    """Write the numbers of a model, of which `config_problems` said nothing."""
    architecture, width = architecture_of(config), head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(config.vocab_size)
    window = _window(config)
    if architecture in WINDOWED and window is not None:
        writer.add_sliding_window(window)
    for name, add in _capped(writer).items():
        if getattr(config, name, None) is not None:
            add(float(getattr(config, name)))
    _add_rope(writer, config)


def _capped(writer: Any) -> dict[str, Callable[[float], None]]:
    return {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
    }


def _add_rope(writer: Any, config: PretrainedConfig) -> None:
    import gguf

    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if "sliding_attention" in config.rope_parameters:
        base = float(config.rope_parameters["sliding_attention"]["rope_theta"])
        writer.add_float32(gguf.Keys.Rope.FREQ_BASE_SWA.format(arch=writer.arch), base)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(_original(config))
        for name, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(float(rope[name]))
        usual = 1.0 + 0.1 * math.log(rope["factor"])  # llama.cpp multiplies by it
        given = rope.get("attention_factor")
        if given is not None and not math.isclose(given, usual, rel_tol=1e-6):
            writer.add_rope_scaling_attn_factors(given / usual)
    if kind == "longrope" and "rope_freqs.weight" not in rope_tensors(config):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(_original(config))
        writer.add_rope_scaling_attn_factors(_long_attention(config))


def _original(config: PretrainedConfig) -> int:
    """How many positions there were before they were scaled."""
    held = _rope(config).get("original_max_position_embeddings")
    return int(held or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)


def _long_attention(config: PretrainedConfig) -> float:
    """By what longrope multiplies cosines and sines (arXiv:2402.13753): sqrt(1 + ln s / ln L)."""
    given = _rope(config).get("attention_factor")
    if given is not None:
        return float(given)
    longer = config.max_position_embeddings / _original(config)
    return math.sqrt(1 + math.log(longer) / math.log(_original(config))) if longer > 1 else 1.0


def rope_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Factors by which the frequencies are divided, float32 [pairs]: of Llama 3 computed, of longrope listed."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        plain = type(config).from_dict(config.to_dict())
        plain.rope_parameters = {**rope, "rope_type": "linear", "factor": 1.0}
        with CPU:  # also where models are made empty
            whole, _ = ROPE_INIT_FUNCTIONS["linear"](plain, CPU)
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
        return {"rope_freqs.weight": (whole / scaled).float()}
    if kind != "longrope":
        return {}
    long, short = (
        torch.tensor(rope[name], dtype=torch.float32, device=CPU) for name in ("long_factor", "short_factor")
    )
    if architecture_of(config) == "llama" and torch.equal(long, short) and _long_attention(config) == 1.0:
        return {"rope_freqs.weight": long}
    return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}

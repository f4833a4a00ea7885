"""Tiny models of every architecture, adapters on them, a tokenizer and data that fit: real transformers objects, fast
steps.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from qlora.data.batch import IGNORE_INDEX, Batch, Example
from qlora.layers.attach import attach_adapters, forget_row_norms, named_adapters

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(
        **SMALL, intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **SMALL, intermediate_size=150, num_key_value_heads=2
    ),  # blocks across rows, biases
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, intermediate_size=160, num_key_value_heads=2, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SMALL, intermediate_size=160, num_key_value_heads=2),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, intermediate_size=160, num_key_value_heads=2, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, intermediate_size=160, num_key_value_heads=2, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, intermediate_size=160, num_key_value_heads=2, head_dim=16),
    "phi": lambda: transformers.PhiConfig(**SMALL, intermediate_size=160),
    "phi3": lambda: transformers.Phi3Config(**SMALL, intermediate_size=160, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320),
}

_GROUPED = {**SMALL, "intermediate_size": 160, "num_key_value_heads": 2}
MORE = {
    "granite": lambda: transformers.GraniteConfig(
        **_GROUPED, logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.2
    ),
    "cohere": lambda: transformers.CohereConfig(
        **_GROUPED, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "bloom": lambda: transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=320),  # ALiBi
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=32, dropout=0.0),
    "windowed": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=4),
    "mixtral": lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=4),
    "lfm2": lambda: transformers.Lfm2Config(
        **_GROUPED, layer_types=["conv", "full_attention"]
    ),  # a convolution over tokens
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_GROUPED, layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**_GROUPED, num_local_experts=4, head_dim=16),  # attention sinks
}
# Their attention or convolutions do not know our borders.
PADDED = {"gemma2", "bloom", "lfm2", "qwen3_next", "gpt_oss"}


def random_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A tiny float32 model of an architecture with random weights, biases and norms included, in evaluation mode."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def build(name: str) -> nn.Module:
    """A tiny model of CONFIGS or MORE, in evaluation mode."""
    if name in CONFIGS:
        return random_model(name)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MORE[name]()).eval()


def disturb(model: nn.Module, seed: int = 1, spread: float = 0.05, magnitudes: float = 0.5) -> nn.Module:
    """Move every adapter away from its start: random B, magnitudes up to half of the row norm away from it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, adapter in named_adapters(model):
            adapter.lora_B.normal_(0, spread, generator=generator)
            if adapter.magnitude is not None:
                adapter.magnitude *= 1 + magnitudes * (2 * torch.rand(adapter.magnitude.shape, generator=generator) - 1)
    forget_row_norms(model)
    return model


def adapted(model: nn.Module, method: str = "dora", seed: int = 2, **spec) -> nn.Module:
    """`model` with adapters (of odd rank and alpha / r not 1, unless `spec` says otherwise) away from their start,
    where they would compute the base and a test that compares anything would pass whatever the code does.
    """
    torch.manual_seed(seed)
    return disturb(attach_adapters(model, method=method, **({"rank": 3, "alpha": 7.0} | spec)), seed)


def llama(seed: int = 1) -> nn.Module:
    return random_model("llama", seed)


def gpt2(seed: int = 1) -> nn.Module:
    """With Conv1D layers and biases."""
    return random_model("gpt2", seed)


def eight_layers(folder: Path) -> tuple[int, int]:
    """Write a random bf16 Llama of eight layers, large enough for memory to be measured; (bytes of its largest tensor,
    of all).
    """
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        vocab_size=2048,
        num_attention_heads=8,
        dtype="bfloat16",
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    sizes = [parameter.numel() * 2 for parameter in model.parameters()]
    return max(sizes), sum(sizes)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, two special tokens, a chat template; pad is eos."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<|im_start|>": 256, "<|im_end|>": 257}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    result.chat_template = TEMPLATE
    return result


@torch.no_grad()
def talkative(name: str = "llama", **changes):
    """A random model of the tiny tokenizer's 258 tokens whose answers vary; with small weights they do not."""
    torch.manual_seed(1)
    config = (CONFIGS | MORE)[name]()
    for option, value in {
        "vocab_size": 258,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        **changes,
    }.items():
        setattr(config, option, value)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.3)
    return model


def write_model(folder: Path, seed: int = 1) -> Path:
    """A model folder in Hugging Face's layout."""
    llama(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_data(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Sums with answers of very different lengths, as JSONL."""
    dice = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            a, b = dice.randint(0, 99), dice.randint(0, 9)
            file.write(json.dumps({"question": f"{a}+{b}?", "answer": f"{a + b} " * dice.randint(1, 6)}) + "\n")
    return path


UNEVEN = ((30, 2), (9, 7), (17, 1), (25, 20))  # very different numbers of targets


def examples(*sizes: tuple[int, int], seed: int = 0) -> list[Example]:
    """Random tokens: (tokens, targets at their end) of each."""
    dice = random.Random(seed)
    return [Example(tuple(dice.randrange(256) for _ in range(n)), (False,) * (n - k) + (True,) * k) for n, k in sizes]


def by_transformers(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The summed loss of the padded batch by the model's own forward; it shifts the labels itself, so they are moved
    back.
    """
    rows = batch.padded()
    labels = nn.functional.pad(rows.labels[:, :-1], (1, 0), value=IGNORE_INDEX)
    out = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=labels, use_cache=False)
    return out.loss * batch.target_tokens


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all adapter parameters by name."""
    return {
        f"{name}.{part}": p.detach().clone()
        for name, adapter in named_adapters(model)
        for part, p in adapter.named_parameters(recurse=False)
    }

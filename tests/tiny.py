"""A tiny model with a tokenizer and data that fit it, for tests that train: real transformers objects, fast steps."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from helpers import disturb, random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora.adapters import attach_adapters, named_adapters

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama(seed: int = 1) -> torch.nn.Module:
    """A Llama of 2 layers in float32."""
    return random_model("llama", seed)


def gpt2(seed: int = 1) -> torch.nn.Module:
    """A GPT-2 of 2 layers in float32: Conv1D layers with biases."""
    return random_model("gpt2", seed)


def adapted(model: torch.nn.Module, seed: int = 2, **spec) -> torch.nn.Module:
    """`model` with adapters (DoRA, rank 4, unless `spec` says otherwise) away from their start, where they would
    compute the base and a test that compares anything would pass whatever the code does."""
    torch.manual_seed(seed)
    return disturb(attach_adapters(model, **({"rank": 4, "alpha": 8.0} | spec)), seed)


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


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all adapter parameters by name."""
    return {
        f"{name}.{part}": p.detach().clone()
        for name, adapter in named_adapters(model)
        for part, p in adapter.named_parameters(recurse=False)
    }

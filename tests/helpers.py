"""Shared by the tests: the tolerance table, tiny models of every architecture, adapters away from their start, instruction sets."""

from __future__ import annotations

import os
import signal
import time

import torch
import transformers
from qlora_kernels.cpu import native
from torch import nn

from qlora.adapters import attach_adapters, named_adapters, refresh_norms

# Largest difference allowed, relative to the largest value, between two ways to compute the same thing in a dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ISAS = {"AVX512": native.ISAS, "AVX2": native.ISAS[:2]}.get(torch.backends.cpu.get_cpu_capability(), native.ISAS[:1])

_SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL, intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_SMALL, intermediate_size=150, num_key_value_heads=2),  # blocks across rows, biases
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL, intermediate_size=160, num_key_value_heads=2, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**_SMALL, intermediate_size=160, num_key_value_heads=2),
    "gemma": lambda: transformers.GemmaConfig(**_SMALL, intermediate_size=160, num_key_value_heads=2, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**_SMALL, intermediate_size=160, num_key_value_heads=2, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SMALL, intermediate_size=160, num_key_value_heads=2, head_dim=16),
    "phi": lambda: transformers.PhiConfig(**_SMALL, intermediate_size=160),
    "phi3": lambda: transformers.Phi3Config(**_SMALL, intermediate_size=160, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320),
}


def random_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A tiny float32 model of an architecture with random weights, biases and norms included, in evaluation mode."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def disturb(model: nn.Module, seed: int = 1, spread: float = 0.05, magnitudes: float = 0.5) -> nn.Module:
    """Move every adapter away from its start: random B, magnitudes up to half of the row norm away from it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, adapter in named_adapters(model):
            adapter.lora_B.normal_(0, spread, generator=generator)
            if adapter.magnitude is not None:
                adapter.magnitude *= 1 + magnitudes * (2 * torch.rand(adapter.magnitude.shape, generator=generator) - 1)
    refresh_norms(model)
    return model


def adapted(model: nn.Module, method: str, **options) -> nn.Module:
    """`model` with disturbed adapters of odd rank and alpha / r not 1."""
    torch.manual_seed(7)
    return disturb(attach_adapters(model, method=method, **{"rank": 3, "alpha": 7.0, **options}))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of `b`."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def without_quantized_gemm(model: nn.Module) -> nn.Module:
    """bitsandbytes repacks its weights at the first forward on a CPU with AVX512-BF16, and computes something else then."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def wait(child: int, seconds: float) -> int:
    """The exit status of a child, which is killed when it takes longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL

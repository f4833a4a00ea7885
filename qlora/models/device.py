"""TODO head of models.device."""

from __future__ import annotations

import os

import torch

from qlora.errors import UserError, problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(problem("device", device, "is no torch device", "Use auto, cpu, cuda or cuda:0")) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            problem("device", device, "torch sees no CUDA device here", "Use --device cpu, and run: qlora doctor")
        )
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """ "auto" is bf16 where the device multiplies bf16 natively, else fp32."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if native_bf16_cpu() else "fp32"


def native_bf16_cpu() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def bound_kernel_caches() -> None:
    """Let oneDNN, which multiplies on a CPU, keep few of the kernels that it compiles, one for each shape. A
    micro-batch of another
    number of tokens has other shapes: 25 MB more of kernels for SmolLM2, and with 1024 kept in each of two caches, the
    default, 900 MB after 40 batches of real data. These numbers are several times what the layers of one micro-batch
    need, and as fast: what is evicted is seldom asked for again. Works before the first product; what the environment
    already says stands.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

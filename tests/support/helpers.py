"""Shared by the tests: the tolerance table, instruction sets, comparing, double quantization, sizes, waiting. Tiny
models and their data are in tiny.py.
"""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kernels import reference
from qlora_kernels.cpu import native

# Largest difference allowed, relative to the largest value, between two ways to compute the same thing in a dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ISAS = {"AVX512": native.ISAS, "AVX2": native.ISAS[:2]}.get(torch.backends.cpu.get_cpu_capability(), native.ISAS[:1])

NESTED = 256  # block size of double quantization


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integers), b.view(integers))


def constants(absmax: torch.Tensor, double_quant: bool) -> tuple:
    """(absmax, nested_absmax, nested_offset) as the operators take them."""
    return reference.quantize_absmax(absmax, NESTED) if double_quant else (absmax, None, None)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of `b`."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def without_quantized_gemm(model: nn.Module) -> nn.Module:
    """bitsandbytes repacks its weights at the first forward on a CPU with AVX512-BF16, and computes something else
    then.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, torch.Tensor) and not out._is_view():
                self.elements = max(self.elements, out.numel())
        return result


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

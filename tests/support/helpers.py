"""Shared by the tests: the tolerance table, instruction sets, quantized weights, covers of cases, comparing, sizes,
waiting. Tiny models and their data are in tiny.py.
"""

from __future__ import annotations

import itertools
import os
import platform
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType, SimpleNamespace

import emulated
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kernels import backends, ops, reference
from qlora_kernels.cpu import native
from qlora_kernels.weight import NESTED_BLOCKSIZE, QuantizedWeight, levels_of

# Largest difference allowed, relative to the largest value, between two ways to compute the same thing in a dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ISAS = {"AVX512": ("portable", "avx2", "avx512"), "AVX2": ("portable", "avx2")}.get(
    torch.backends.cpu.get_cpu_capability(), ("portable",)
)
if torch.cpu.get_capabilities().get("avx_vnni"):
    ISAS = tuple(name for isa in ISAS for name in ((isa, "avx_vnni") if isa == "avx2" else (isa,)))
if emulated.CHOSEN or platform.machine().lower() in ("aarch64", "arm64"):
    ISAS = ("portable", "neon")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # those with kernels
NF4 = levels_of("nf4", torch.device("cpu"))


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integers), b.view(integers))


def scales_of(absmax: Tensor, double_quant: bool) -> tuple[Tensor, ...]:
    """The scales of a `QuantizedWeight`: (absmax,), or (absmax, nested_absmax, nested_offset)."""
    return reference.quantize_absmax(absmax, NESTED_BLOCKSIZE) if double_quant else (absmax,)


def quantized(weight: Tensor, blocksize: int = 64, double_quant: bool = True, levels: Tensor = NF4) -> QuantizedWeight:
    """`weight` [rows, columns] quantized by the reference."""
    packed, absmax = reference.quantize_4bit(weight, levels, blocksize)
    return QuantizedWeight.of(packed, scales_of(absmax, double_quant), tuple(weight.shape), blocksize, levels=levels)


def decoded(weight: QuantizedWeight, dtype: torch.dtype = torch.float32, row_scale: Tensor | None = None) -> Tensor:
    """Dense by the reference."""
    return reference.dequantize_4bit(weight.parts, weight.layout, row_scale, dtype)


def routed(kernels: native.Native | ModuleType, backend: str = "native") -> SimpleNamespace:
    """The operators by these kernels, the reference for what they do not take: as `ops` runs them where this backend is
    chosen, whatever was.
    """
    found = SimpleNamespace()
    for name in ops.OPERATORS:
        has = hasattr(kernels, name)
        function, owner = getattr(kernels if has else reference, name), backend if has else "reference"
        setattr(found, name, backends.routed(name, function, owner))
    return found


def pairwise(*axes: Collection) -> list[tuple]:
    """Rows with a value of each axis, such that any two values of two axes meet in a row: far fewer rows than the
    product has.
    """
    values = [list(axis) for axis in axes]
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(values)), 2)
        for a in range(len(values[i]))
        for b in range(len(values[j]))
    }
    rows: list[tuple] = []

    def pairs(row: dict[int, int]) -> set[tuple[int, int, int, int]]:
        return {(i, row[i], j, row[j]) for i, j in itertools.combinations(sorted(row), 2)}

    while missing:
        i, a, j, b = min(missing)
        row = {i: a, j: b}
        for k in sorted(set(range(len(values))) - set(row)):
            count = len(values[k])
            order = [(len(rows) + c) % count for c in range(count)]  # so that ties are not all broken alike
            row[k] = max(order, key=lambda c, k=k: len(pairs({**row, k: c}) & missing))
        missing -= pairs(row)
        rows.append(tuple(values[k][row[k]] for k in range(len(values))))
    return rows


def same_everywhere(
    kernels: native.Native, threads: Callable[[int], None], results: Callable[[], list[Tensor]]
) -> None:
    """`results()` have the same bits on every instruction set and for two threads."""
    found = []
    for isa, count in [*((isa, 1) for isa in ISAS), (ISAS[-1], 2)]:
        kernels.select(isa)
        threads(count)
        found.append(results())
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


def relative(a: Tensor, b: Tensor) -> float:
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


def unsealed(folder: Path) -> Path:
    """An adapter's folder without its manifest: what a test writes into it is looked at for itself."""
    (folder / "manifest.json").unlink()
    return folder


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

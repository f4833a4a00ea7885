"""The native CPU kernels as functions of tensors: finds the library, checks it, chooses the instruction set.

The library is found by the spec of the module `qlora_kernels.cpu._native`, so an editable checkout, a wheel and a plain
source tree behave alike. What it cannot do (float64, foreign block sizes, mixed dtypes) goes to the reference, whose
results it equals: codes, constants and decoded values bit for bit, sums to float32 rounding.

    QLORA_CPU_ISA=portable|avx2|avx_vnni|avx512|neon   force an instruction set; otherwise the best that there is

Whether it is used at all is decided in `backends`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from pathlib import Path

import torch

from qlora_kernels import BackendError, reference
from qlora_kernels.cpu import build
from qlora_kernels.cpu.binding import INTEGER, POINTER, SIZE
from qlora_kernels.cpu.decoder import DecoderKernels
from qlora_kernels.cpu.nf4 import NF4Kernels
from qlora_kernels.cpu.optim import OptimizerKernels
from qlora_kernels.cpu.step import StepKernels

ISAS = ("portable", "avx2", "avx_vnni", "avx512", "neon")  # by the number that qlora_select has for each


class StaleLibrary(BackendError):
    """The library was built from other sources than those beside it."""


def load() -> tuple[Native | None, str]:
    """The native kernels or None, and in words what runs on the CPU.

    Raises:
        StaleLibrary: the library does not match the sources beside it.
        BackendError: QLORA_CPU_ISA holds what this machine cannot give.
    """
    spec = importlib.util.find_spec("qlora_kernels.cpu._native")
    if spec is None or spec.origin is None:
        return None, f"reference (plain PyTorch), because the native kernels are not built: run {build.COMMAND}"
    library = Path(spec.origin)
    if not build.is_fresh(library):
        raise StaleLibrary(
            f"{library} was built from other sources than those beside it: run {build.COMMAND}, or delete it"
        )
    native = Native(ctypes.CDLL(str(library)))
    return native, native.describe()


class Native(NF4Kernels, DecoderKernels, StepKernels, OptimizerKernels):
    """The operators of `ops`, same arguments and results, on CPU tensors."""

    def __init__(self, library: ctypes.CDLL):
        signatures = {
            "qlora_initialize": [POINTER] * 4,
            "qlora_select": [INTEGER],
            "qlora_select_attention": [INTEGER],
            "qlora_threaded": [],
            "qlora_huge_pages": [POINTER, SIZE],
            "qlora_new_tensor": [INTEGER, INTEGER, *[SIZE] * 4],
            "qlora_release_memory": [],
            "qlora_memory_in_use": [],
        }
        results = {
            "qlora_select": ctypes.c_char_p,
            "qlora_select_attention": INTEGER,
            "qlora_threaded": INTEGER,
            "qlora_new_tensor": POINTER,
            "qlora_memory_in_use": SIZE,
        }
        for subject in type(self).__mro__:
            signatures |= vars(subject).get("SIGNATURES", {})
            results |= vars(subject).get("RESULTS", {})
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, results.get(name)
        self.library = library
        self._thread = threading.local()  # see `workspace`
        self._initialize()
        self.select(os.environ.get("QLORA_CPU_ISA", ""))

    def _initialize(self) -> None:
        """Hand over the tables of the reference, so that none is written down twice; the library copies them."""
        cpu = torch.device("cpu")
        dynamic = reference.dynamic_map(cpu)
        midpoints = reference.midpoints_of(dynamic)
        values, edges = zip(*(reference.block_tables(cpu, signed) for signed in (False, True)), strict=True)
        pair = POINTER * 2
        self.library.qlora_initialize(
            dynamic.data_ptr(),
            midpoints.data_ptr(),
            pair(*(t.data_ptr() for t in values)),
            pair(*(t.data_ptr() for t in edges)),
        )

    def select(self, isa: str = "") -> None:
        """Use the instruction set of that name from `ISAS`, or the best one ("").

        Raises:
            BackendError: no such name, or this processor lacks it.
        """
        if isa and isa not in ISAS:
            raise BackendError(f"QLORA_CPU_ISA={isa}: must be one of {', '.join(ISAS)}, or unset for the best")
        names = (self.library.qlora_select(ISAS.index(name)) for name in ([isa] if isa else reversed(ISAS)))
        name = next((name for name in names if name), None)
        if name is None:
            raise BackendError(f"QLORA_CPU_ISA={isa}: this processor cannot run it. Unset it for the best")
        self.isa, self.layers = name.decode(), self.library.qlora_layers()
        self.layers_in_bf16 = bool(self.library.qlora_layers_in_bf16())
        self.dense_in_float32 = bool(self.library.qlora_dense_in_float32())
        self.attends_in_float32 = bool(self.library.qlora_float_attention())
        # What multiplies bf16: attention has a kernel only where something does. AMX, where nothing is forced, takes an
        # adapter's sums too.
        wanted = {"": 2, "avx512": 1}.get(isa, 0)
        self.bf16_unit = ("", "AVX512-BF16", "AMX")[self.library.qlora_select_attention(wanted)]

    def describe(self) -> str:
        """Such as "native (AVX-512, attention and adapters by AMX, 2 threads)"."""
        threaded = self.library.qlora_threaded()
        threads = torch.get_num_threads() if threaded == 1 else 1
        what = "attention and adapted layers" if self.bf16_unit == "AMX" or self.layers_in_bf16 else "attention"
        attention = f"{what} by {self.bf16_unit}, " if self.bf16_unit else ""
        why = {0: " after a fork", -1: ", built without OpenMP"}.get(threaded, "")
        count = f"{threads} thread{'s' * (threads != 1)}{why}"
        return f"native ({self.isa}, {attention}{count})"

"""A card that torch only claims to have: everything up to the first tensor on it runs, in a process of its own.

    python -c "import fake_card; calls = fake_card.install(); ..."

What torch.cuda answers is set at the level of its C functions, so that torch's own Python, which refuses a device
without a number, runs as it is. As in torch, NEED_START fail until something has started CUDA. A tensor on the card
ends in one of REFUSED.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

TOTAL = 24_000_000_000
NEED_START = ("_cuda_setMemoryFraction", "_cuda_resetPeakMemoryStats", "_cuda_resetAccumulatedMemoryStats")
REFUSED = ("from the 'CUDA' backend", "Torch not compiled with CUDA enabled", "without ATen_cuda library")


def install(capability: tuple[int, int] = (8, 9)) -> list[tuple]:
    """Claim a card of 24 GB; returns the list of what is asked of it from now on."""
    calls: list[tuple] = []
    started: list[bool] = []

    def start() -> None:
        started.append(True)

    def note(name: str, answer: object = None):
        def call(*arguments, **options):
            if name in NEED_START and not started:
                raise RuntimeError("Invalid device argument 0: did you call init?")
            calls.append((name, *arguments))
            return answer

        return call

    # AttributeErrors of a torch without CUDA: these stand where it has none.
    for name, answer in {
        "_cuda_setDevice": None,
        "_cuda_getDevice": 0,
        "_cuda_getDeviceCount": 1,
        "_cuda_setMemoryFraction": None,
        "_cuda_resetPeakMemoryStats": None,
        "_cuda_resetAccumulatedMemoryStats": None,
        "_cuda_memoryStats": {},
        "_cuda_synchronize": None,
        "_cuda_getCurrentRawStream": 0,
        "_cuda_emptyCache": None,
    }.items():
        setattr(torch._C, name, note(name, answer))
    card = SimpleNamespace(
        name="a claimed card", major=capability[0], minor=capability[1], total_memory=TOTAL, multi_processor_count=128
    )
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.get_device_properties = lambda device=None: start() or card
    cuda.get_device_capability = lambda device=None: start() or capability
    cuda.is_bf16_supported = lambda including_emulation=True: capability >= (8, 0)
    cuda.mem_get_info = lambda device=None: (TOTAL // 2, TOTAL)
    cuda.memory_stats = lambda device=None: {"reserved_bytes.all.peak": 0, "allocated_bytes.all.peak": 0}
    for name in ("max_memory_reserved", "max_memory_allocated"):
        setattr(cuda, name, lambda device=None: 0)
    for module in (cuda, cuda.memory):
        module._lazy_init = start
        module.is_initialized = lambda: True
    cuda.synchronize = note("synchronize")
    cuda.empty_cache = note("empty_cache")
    return calls

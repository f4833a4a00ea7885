"""How much memory a run takes, and how it stays within a limit.

    CPU    RssAnon of the process, looked at by a thread: Linux keeps no peak of it. Near the limit the thread gives
           freed memory back to the system, which glibc and the native kernels (csrc/allocator.cpp) would keep.
    CUDA   what torch's allocator has reserved; it keeps the peak itself, and the limit is set where the run begins

Anonymous memory leaves mapped model files out, which the kernel takes back when it needs to. The alternatives,
ru_maxrss and a malloc that keeps nothing, count the files, and pay for fresh pages at every step.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import torch

from qlora import posix
from qlora_kernels import backends


def anonymous_memory() -> int:
    """Bytes of anonymous memory of this process now (RssAnon). Without /proc, the peak of all resident memory."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:  # macOS, where ru_maxrss is in bytes
        return posix.resident_peak()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def return_freed_memory() -> None:
    """Give freed memory back to the system, which the native kernels and glibc keep for the next that asks."""
    backends.release_memory()
    if os.name != "posix":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


NEAR = 0.98  # of a limit: from here on freed memory is given back
GROWTH = 4e9  # bytes that a process may grow by in a second: fresh pages cost time


class PeakMemory:
    """The most memory used since it was entered, in bytes.

    On a GPU what torch's allocator has reserved: with CUDA's own few hundred MB it is what a card must have. On a CPU
    anonymous memory.

    Args:
        every: seconds between two looks of the thread (CPU).
        limit: bytes (CPU); the thread looks more often the nearer memory comes to it, and gives back there what is
            freed but kept.
    """

    def __init__(self, device: torch.device, every: float = 0.05, limit: int | None = None):
        self.device, self.every, self.limit = device, every, limit
        self._peak = 0
        self._end = threading.Event()

    def peak(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        self._look()
        return self._peak

    def allocated(self) -> int:
        """The peak of what tensors took; on a CPU the same as `peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self.peak()

    def _look(self) -> int:
        now = anonymous_memory()
        self._peak = max(self._peak, now)
        return now

    def _watch(self) -> None:
        pause = self.every
        while not self._end.wait(pause):
            now = self._look()
            if self.limit is not None:
                if now > NEAR * self.limit:
                    return_freed_memory()
                    now = self._look()
                pause = min(self.every, max(0.002, (NEAR * self.limit - now) / GROWTH))

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.init()  # a card that is named by its number may be untouched, and its allocator refuses then
            torch.cuda.empty_cache()  # what was freed before is not needed now
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()

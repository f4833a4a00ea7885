"""TODO head of optim.memory_errors."""

from __future__ import annotations

import errno

import torch

ALLOCATION_ERRORS = (
    MemoryError,
    OSError,
    RuntimeError,
)  # among which `out_of_memory` tells; torch.OutOfMemoryError is a RuntimeError


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, in torch's CPU allocator, in Python or in mmap."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("DefaultCPUAllocator", "bad_alloc")
    )

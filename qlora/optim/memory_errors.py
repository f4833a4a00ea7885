"""Which exceptions mean that an allocation failed.

torch's CPU allocator, torch on CUDA, Python and mmap each say it by another type, some of them only by a text. One
predicate knows them all, so that the optimizer and the training step retry for the same reasons. The alternative, to
catch everything, would hide defects.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora.errors import UserError

# The types to catch, among which `out_of_memory` tells. torch.OutOfMemoryError is a RuntimeError.
ALLOCATION_ERRORS = (MemoryError, OSError, RuntimeError)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, in torch's CPU allocator, in Python or in mmap."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("DefaultCPUAllocator", "bad_alloc")
    )


@contextmanager
def memory_told(where: str) -> Iterator[None]:
    """A boundary to a model's own code inside of which memory may run out: that is not the model's fault.

    Raises:
        UserError: it did, in `where`.
    """
    try:
        yield
    except ALLOCATION_ERRORS as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"memory: it ran out in {where}. Free some, or use a smaller model.") from error

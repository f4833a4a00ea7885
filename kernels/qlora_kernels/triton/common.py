"""What the Triton kernels share: dtypes and sizes that they take, how they are launched, and sums over many programs.

Kernels take arguments that belong together as one tuple: the tensors of a quantized weight, the results, the numbers of
a step. Triton takes the tuple apart before it compiles, so the code is that of single arguments; the alternative is
kernels of twenty parameters, listed again at every call.
Triton's interpreter (TRITON_INTERPRET=1) runs all of them on CPU tensors, which is how they are tested without a card.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = frozenset(1 << k for k in range(5, 13))  # 32..4096
# Whether a * b + c may be rounded once. Never left to the default, which Triton is changing.
EXACT, FUSED = {"enable_fp_fusion": False}, {"enable_fp_fusion": True}


# ---------------------------------------------------------------- in kernels


@triton.jit
def last_of(counter, parts):
    """Whether this is the last of `parts` programs to come here. It then sees what all of them have stored, and sets
    the counter back to 0.
    """
    tl.debug_barrier()  # every thread has stored
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_of_shares(sums, column, parts, columns, COLUMNS: tl.constexpr):
    """sums [parts, columns] added up over the parts, for COLUMNS of the columns: in the same order whichever program
    does it.
    """
    total = tl.zeros([16, COLUMNS], tl.float32)
    for start in range(0, parts, 16):
        part = (start + tl.arange(0, 16)).to(tl.int64)[:, None]
        inside = (part < parts) & (column < columns)[None, :]
        # Not from this core's cache, which may hold what was there before.
        total += tl.load(sums + part * columns + column[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


# ---------------------------------------------------------------- around kernels


def cdiv(n: int, size: int) -> int:
    """How many pieces of `size` make n. Triton's own costs a tenth of a launch."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest one from n on."""
    return 1 << (n - 1).bit_length()


def on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device; make that the one of `tensor`."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Zeros int32 [count or more] for `last_of`, which leaves zeros. Each stream has its own: kernels that run at the
    same time must not share them.
    """
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    if key not in _counters or len(_counters[key]) < count:
        _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return _counters[key]

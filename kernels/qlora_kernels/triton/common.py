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

from qlora_kernels import reference

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
CAPTURED = -1  # the stream of all that is recorded in a CUDA graph


def counters(device: torch.device, count: int) -> Tensor:
    """Zeros int32 [count or more] for `last_of`, which leaves zeros. Each stream has its own: kernels that run at the
    same time must not share them.

    Those of graphs come from `prepare`: made inside a capture, they would lie in the graph's own memory and go with it.
    Two graphs may not be replayed at the same time.

    Raises:
        RuntimeError: a graph is being captured, and `prepare` made none or too few.
    """
    stream = _stream(device)
    key = (device, stream)
    if key not in _counters or len(_counters[key]) < count:
        if stream == CAPTURED:
            raise RuntimeError(f"{count} counters for a CUDA graph: run the step once before it is captured")
        for number in (stream, CAPTURED):
            there = _counters.get((device, number))
            if there is None or len(there) < count:
                _counters[device, number] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return _counters[key]


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return CAPTURED if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream


def prepare(device: torch.device) -> None:
    """Make what launches share on a device before any of them: counters and tables."""
    counters(device, 1)
    reference.dynamic_map(device)

"""What the subjects of the reference share: pieces of work, the dtype of sums, and the counter of in-place writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 1e-38  # smaller block maxima are treated as this one, so that 1 / absmax stays finite


def chunk_elements(tensor: Tensor) -> int:
    """Elements that are worked on at a time, a multiple of every block size. On a CPU float32 temporaries of 1 MB stay
    in the cache; elsewhere each piece is a launch, and 64 MB are few of them.
    """
    return 1 << (18 if tensor.device.type in ("cpu", "meta") else 24)


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that: the dtype of sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widened_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 (float64 for float64). cuBLAS writes the float32 sums of halves itself: rounded to a half first,
    the gradient of an adapter over many tokens would lose what small steps add to it.
    """
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return widened(a @ b)


def mark_mutated(out: Tensor | Sequence[Tensor]) -> None:
    """Tell autograd that `out` was written: below its dispatch level torch no longer does so by itself."""
    tensors = (out,) if isinstance(out, Tensor) else out
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])

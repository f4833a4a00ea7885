"""What the subjects of the reference share: pieces of work, the dtype of sums, and the counter of in-place writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # a multiple of every block size; float32 temporaries of 1 MB stay in the cache
TINY = 1e-38  # smaller block maxima are treated as this one, so that 1 / absmax stays finite


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that: the dtype of sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mark_mutated(out: Tensor | Sequence[Tensor]) -> None:
    """Tell autograd that `out` was written: below its dispatch level torch no longer does so by itself."""
    tensors = (out,) if isinstance(out, Tensor) else out
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])

"""TODO head of layers.weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NESTED_BLOCKSIZE = 256


@dataclass(frozen=True)
class NF4Weight:
    """One quantized matrix. Shapes as in the module head; `shape` is (out, in)."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: tuple[int, int]
    blocksize: int = 64
    nested_blocksize: int = NESTED_BLOCKSIZE

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

"""A quantized matrix as one object, from the file to the kernel; and the table of 4-bit formats.

    W [rows, columns], flattened row-major in blocks of `blocksize`:   W[i] = level[code[i]] * scale[block of i]
    parts    packed uint8 [(n+1)//2, 1], absmax, levels float32 [16] (, nested_absmax float32, nested_offset float32 [])
             absmax is float32 [blocks], or with double quantization uint8 codes [blocks] of (scale - nested_offset)
    layout   rows, columns, blocksize, nested_blocksize

Operators take a weight as two arguments, `parts` (Tensor[]) and `layout` (int[]), because a schema of torch knows no
classes; implementations put them together again. The levels travel with the weight, so a further 4-bit format is a row
of FORMATS. The alternative, a tensor subclass, would intercept every torch function.
Sources: QLoRA (arXiv:2305.14314) section 3 and appendix E; the byte layout is the one that bitsandbytes writes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

NESTED_BLOCKSIZE = 256


@dataclass(frozen=True)
class Format:
    """A 4-bit format: 16 ascending levels in [-1, 1], 0 among them, and bitsandbytes' name for it (`quant_type`)."""

    name: str
    levels: tuple[float, ...]
    quant_type: str


# NF4: quantiles of N(0, 1) between 1 - 0.9677083 and 0.9677083, scaled to [-1, 1], with an exact zero. Tests derive
# them.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FORMATS = {format.name: format for format in (Format("nf4", NF4_LEVELS, "nf4"),)}


@functools.cache
def levels_of(name: str, device: torch.device) -> Tensor:
    """The 16 levels of a format, float32 [16], on `device`; one tensor for all weights there."""
    return torch.tensor(FORMATS[name].levels, dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One quantized matrix: see the module head."""

    parts: list[Tensor]
    layout: list[int]

    @classmethod
    def of(
        cls,
        packed: Tensor,
        scales: tuple[Tensor, ...],
        shape: tuple[int, int],
        blocksize: int = 64,
        nested_blocksize: int = NESTED_BLOCKSIZE,
        levels: Tensor | None = None,
    ) -> QuantizedWeight:
        """From codes and `scales`: (absmax,), or (absmax, nested_absmax, nested_offset). Without `levels` it is NF4."""
        levels = levels_of("nf4", packed.device) if levels is None else levels
        return cls([packed, scales[0], levels, *scales[1:]], [*shape, blocksize, nested_blocksize])

    @property
    def packed(self) -> Tensor:
        return self.parts[0]

    @property
    def absmax(self) -> Tensor:
        return self.parts[1]

    @property
    def levels(self) -> Tensor:
        return self.parts[2]

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized themselves (double quantization)."""
        return len(self.parts) == 5

    @property
    def nested_absmax(self) -> Tensor | None:
        return self.parts[3] if len(self.parts) == 5 else None

    @property
    def nested_offset(self) -> Tensor | None:
        return self.parts[4] if len(self.parts) == 5 else None

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """(absmax,), or (absmax, nested_absmax, nested_offset)."""
        return (self.parts[1], *self.parts[3:])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), that is (out, in)."""
        return self.layout[0], self.layout[1]

    @property
    def blocksize(self) -> int:
        return self.layout[2]

    @property
    def nested_blocksize(self) -> int:
        return self.layout[3]

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of its own: the levels, which all weights of a format share, are not counted."""
        return sum(part.numel() * part.element_size() for part in (self.packed, *self.scales))

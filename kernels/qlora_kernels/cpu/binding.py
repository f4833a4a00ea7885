"""What the native operators of every subject share: the library, its arguments, workspace memory.

    C                      ctypes         here
    const T*               POINTER        `tensor.data_ptr()`, or None
    int64_t / int          SIZE / INTEGER
    const Weight*          WEIGHT         `Weight`, made from a QuantizedWeight for the time of a call

A subject is a class with a table SIGNATURES {function: argument types} (RESULTS where it returns something) and one
method an operator, named as the operator; `native.Native` joins them. An operator that has no kernel for its arguments
returns NotImplemented, see `backends`.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

POINTER, INTEGER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCKSIZES = frozenset(1 << k for k in range(5, 13))  # 32..4096
LARGE = 1 << 22  # bytes from which a result is worth huge pages

Signatures = dict[str, list[type]]


class Weight(ctypes.Structure):
    """`Weight` of csrc/kernels.h."""

    _fields_ = [
        *((name, POINTER) for name in ("packed", "absmax", "nested", "offset", "levels", "row_scale")),
        *((name, SIZE) for name in ("rows", "columns")),
        *((name, ctypes.c_int32) for name in ("block_shift", "nested_shift")),
    ]


WEIGHT = ctypes.POINTER(Weight)  # takes a Weight by reference


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def integers(values: list[int]) -> ctypes.Array:
    return (SIZE * len(values))(*values)


def readable(weight: list[Tensor], layout: list[int], device: torch.device) -> bool:
    """Whether the kernels read this weight: the sizes are checked, since C code would read past a tensor that is too
    short.
    """
    rows, columns, blocksize, nested_blocksize = layout
    packed, absmax, levels = weight[0], weight[1], weight[2]
    n = rows * columns
    blocks = -(-n // blocksize)
    if not (
        blocksize in BLOCKSIZES
        and packed.dtype == torch.uint8
        and packed.numel() >= (n + 1) // 2
        and absmax.numel() >= blocks
        and packed.is_contiguous()
        and absmax.is_contiguous()
        and levels.dtype == torch.float32
        and levels.numel() == 16
        and levels.is_contiguous()
        and packed.device == absmax.device == levels.device == device
    ):
        return False
    if len(weight) == 3:
        return absmax.dtype == torch.float32
    nested_absmax, nested_offset = weight[3], weight[4]
    return (
        nested_blocksize in BLOCKSIZES
        and absmax.dtype == torch.uint8
        and nested_absmax.dtype == nested_offset.dtype == torch.float32
        and nested_absmax.numel() >= -(-blocks // nested_blocksize)
        and nested_absmax.is_contiguous()
        and nested_absmax.device == nested_offset.device == device
    )


def as_argument(weight: list[Tensor], layout: list[int], row_scale: Tensor | None = None) -> Weight:
    """A `readable` weight as the C functions take it; the tensors must outlive the call."""
    rows, columns, blocksize, nested_blocksize = layout
    nested, offset = (weight[3].data_ptr(), weight[4].data_ptr()) if len(weight) == 5 else (None, None)
    return Weight(
        weight[0].data_ptr(),
        weight[1].data_ptr(),
        nested,
        offset,
        weight[2].data_ptr(),
        pointer(row_scale),
        rows,
        columns,
        blocksize.bit_length() - 1,
        nested_blocksize.bit_length() - 1,
    )


class Subject:
    """The operators of one subject. `bf16_unit` is what multiplies bf16: "", "AVX512-BF16" or "AMX"."""

    SIGNATURES: Signatures = {}
    RESULTS: dict[str, type] = {}

    library: ctypes.CDLL
    bf16_unit: str
    _thread: threading.local

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """As torch.empty, on huge pages where the result is large."""
        tensor = torch.empty(*shape, dtype=dtype)
        if tensor.nbytes >= LARGE:
            self.library.qlora_huge_pages(tensor.data_ptr(), tensor.nbytes)
        return tensor

    def workspace(self, size: int) -> Tensor:
        """Bytes that a thread's operators use one after the other, aligned to 64: memory that is warm costs half of
        what fresh memory does.
        """
        work = self._thread.__dict__.get("workspace")
        if work is None or work.numel() < size:
            work = self._thread.workspace = torch.empty(size, dtype=torch.uint8)
        return work

    def partial_sums(self, rows: int, columns: int) -> Tensor | None:
        """Memory for the partial sums over rows."""
        count = self.library.qlora_partials(rows)
        return torch.empty(count, columns, dtype=torch.float32) if count > 1 else None

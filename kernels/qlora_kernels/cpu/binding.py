"""What the native operators of every subject share: the library, its arguments, memory for results and for work.

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
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

POINTER, INTEGER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCKSIZES = frozenset(1 << k for k in range(5, 13))  # 32..4096
LARGE = 1 << 18  # bytes from which a result lies in the library's memory
NO_SIZES = (0, 0, 0, 0)  # of the four dimensions that a result may have
HUGE = 1 << 22  # bytes from which one is worth huge pages

Signatures = dict[str, list[type]]


class Weight(ctypes.Structure):
    """`Weight` of csrc/kernels.h."""

    _fields_ = [
        *((name, POINTER) for name in ("packed", "absmax", "nested", "offset", "levels", "row_scale")),
        *((name, SIZE) for name in ("rows", "columns")),
        *((name, ctypes.c_int32) for name in ("block_shift", "nested_shift")),
    ]


WEIGHT = ctypes.POINTER(Weight)  # takes a Weight by reference
CAPSULE = b"dltensor"  # DLPack's name; a capsule keeps the pointer to it
new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, POINTER, ctypes.c_char_p, POINTER)(
    ("PyCapsule_New", ctypes.pythonapi)
)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def integers(values: Sequence[int]) -> ctypes.Array:
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


def addresses(weight: list[Tensor]) -> tuple[int, int, int, int, int]:
    """Of packed, absmax, nested, offset and levels; 0 where a weight has none."""
    nested, offset = (weight[3].data_ptr(), weight[4].data_ptr()) if len(weight) == 5 else (0, 0)
    return weight[0].data_ptr(), weight[1].data_ptr(), nested, offset, weight[2].data_ptr()


def sizes(layout: list[int]) -> tuple[int, int, int, int]:
    """Rows and columns, and the sizes of blocks as shifts."""
    rows, columns, blocksize, nested_blocksize = layout
    return rows, columns, blocksize.bit_length() - 1, nested_blocksize.bit_length() - 1


def as_argument(weight: list[Tensor], layout: list[int], row_scale: Tensor | None = None) -> Weight:
    """A `readable` weight as the C functions take it; the tensors must outlive the call."""
    return Weight(*addresses(weight), pointer(row_scale), *sizes(layout))


class Subject:
    """The operators of one subject. `bf16_unit` is what multiplies bf16: "", "AVX512-BF16" or "AMX"."""

    SIGNATURES: Signatures = {}
    RESULTS: dict[str, type] = {}

    library: ctypes.CDLL
    bf16_unit: str
    _thread: threading.local

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """As torch.empty, for results that come and go: a large one lies in memory that the library keeps for the next
        (csrc/allocator.cpp). Not where torch is to fill what it makes, as with deterministic algorithms.
        """
        if (
            math.prod(shape) * dtype.itemsize >= LARGE
            and len(shape) <= len(NO_SIZES)
            and not torch.are_deterministic_algorithms_enabled()
        ):
            made = self.library.qlora_new_tensor(DTYPES[dtype], len(shape), *shape, *NO_SIZES[len(shape) :])
            if made is not None:
                return from_dlpack(new_capsule(made, CAPSULE, None))
        return torch.empty(shape, dtype=dtype)

    def empty_like(self, x: Tensor) -> Tensor:
        """`empty` of the shape and dtype of x, in the order of its dimensions."""
        return self.empty(*x.shape, dtype=x.dtype)

    def empty_on_huge_pages(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """As torch.empty, for what stays or is decoded once: on huge pages where it is large."""
        tensor = torch.empty(*shape, dtype=dtype)
        if tensor.nbytes >= HUGE:
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

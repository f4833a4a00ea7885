"""The native CPU kernels as functions of tensors: finds the library, checks it, and calls it through ctypes.

The library is found by the spec of the module `qlora_kernels.cpu._native`, so an editable checkout, a wheel and a plain
source
tree behave alike. What it cannot do (float64, foreign block sizes, mixed dtypes) goes to `reference.py`, whose results
it equals:
codes, constants and decoded values bit for bit, sums to float32 rounding.

    QLORA_CPU_ISA=portable|avx2|avx512   force an instruction set; otherwise the best that the processor has

Whether it is used at all is decided in `ops.py`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from qlora_kernels import BackendError, reference
from qlora_kernels.cpu import build, native_optim

ISAS = ("portable", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCKSIZES = frozenset(1 << k for k in range(5, 13))  # 32..4096
LARGE = 1 << 22  # bytes from which a result is worth huge pages


class StaleLibrary(BackendError):
    """The library was built from other sources than those beside it."""


def load() -> tuple[Native | None, str]:
    """The native kernels or None, and in words what runs on the CPU.

    Raises:
        StaleLibrary: the library does not match the sources beside it.
        BackendError: QLORA_CPU_ISA holds what this machine cannot give.
    """
    spec = importlib.util.find_spec("qlora_kernels.cpu._native")
    if spec is None or spec.origin is None:
        return None, f"reference (plain PyTorch), because the native kernels are not built: run {build.COMMAND}"
    library = Path(spec.origin)
    if not build.is_fresh(library):
        raise StaleLibrary(
            f"{library} was built from other sources than those beside it: run {build.COMMAND}, or delete it"
        )
    native = Native(ctypes.CDLL(str(library)))
    return native, native.describe()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _in_sixteens(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, int]:
    """A [rank, in] and B [out, rank] with zeros up to a rank that is a multiple of 16, and that rank."""
    pad = -A.shape[0] % 16
    if pad:
        A, B = torch.nn.functional.pad(A, (0, 0, 0, pad)), torch.nn.functional.pad(B, (0, pad))
    return A.contiguous(), B.contiguous(), A.shape[0]


class Native(native_optim.OptimizerKernels):
    """The operators of `ops.py`, same arguments and results, on CPU tensors."""

    def __init__(self, library: ctypes.CDLL):
        pointer, integer, size = native_optim.POINTER, native_optim.INTEGER, native_optim.SIZE
        weight = [pointer] * 4
        signatures = {
            "qlora_initialize": [pointer] * 5,
            "qlora_select": [integer],
            "qlora_select_attention": [integer],
            "qlora_threaded": [],
            "qlora_huge_pages": [pointer, size],
            "qlora_quantize_nf4": [pointer, integer, size, size, pointer, pointer, integer],
            "qlora_encode_nf4": [pointer, integer, size, size, pointer, pointer, integer],
            "qlora_fit_scales_nf4": [pointer, integer, size, size, pointer, integer],
            "qlora_quantize_absmax": [pointer, pointer, size, size, pointer, pointer, integer],
            "qlora_dequantize_nf4": [*weight, pointer, *[size] * 4, integer, pointer, integer, integer],
            "qlora_partials": [size],
            "qlora_column_dots": [integer, pointer, size, pointer, size, size, size, pointer, pointer, integer],
            "qlora_row_norms_nf4": [*weight, *[size] * 4, *[pointer] * 4, size, ctypes.c_float, pointer, integer],
            "qlora_cross_entropy": [integer, pointer, pointer, size, size, pointer, integer],
            "qlora_rms_norm": [integer, pointer, pointer, size, size, ctypes.c_float, pointer, pointer, integer],
            "qlora_rms_norm_backward": [integer, pointer, pointer, pointer, pointer, size, size, pointer, integer],
            "qlora_swiglu": [integer, pointer, pointer, size, pointer, integer],
            "qlora_swiglu_backward": [integer, *[pointer] * 3, size, pointer, pointer, integer],
            "qlora_swiglu_backward_dots": [integer, *[pointer] * 3, size, size, *[pointer] * 4, integer],
            "qlora_rotate": [
                integer,
                integer,
                *[pointer, size, size] * 2,
                size,
                size,
                pointer,
                pointer,
                size,
                pointer,
                pointer,
                integer,
            ],
            "qlora_fold_factors": [
                integer,
                pointer,
                size,
                pointer,
                size,
                size,
                ctypes.c_float,
                *[pointer] * 6,
                integer,
            ],
            "qlora_narrow_room": [size, size, size],
            "qlora_narrow": [*[pointer] * 4, size, size, size, ctypes.c_float, *[pointer] * 7, integer],
            "qlora_product_bytes": [size, size, size, integer],
            "qlora_product": [
                *weight,
                pointer,
                *[size] * 4,
                integer,
                pointer,
                size,
                *[pointer] * 3,
                size,
                *[pointer] * 2,
                ctypes.c_float,
                *[pointer] * 7,
                integer,
            ],
            "qlora_adapted_backward_bytes": [*[size] * 4, integer],
            "qlora_adapted_backward": [
                *weight,
                pointer,
                *[size] * 4,
                *[pointer] * 6,
                size,
                size,
                ctypes.c_float,
                *[pointer] * 6,
                integer,
            ],
            "qlora_attention_bytes": [integer, size, size],
            "qlora_attention": [integer, *[pointer] * 3, *[size] * 4, ctypes.c_float, pointer, size, integer],
            **native_optim.SIGNATURES,
        }
        results = {
            "qlora_select": ctypes.c_char_p,
            "qlora_select_attention": integer,
            "qlora_threaded": integer,
            "qlora_partials": size,
            "qlora_attention_bytes": size,
            "qlora_narrow_room": size,
            "qlora_product_bytes": size,
            "qlora_product": integer,
            "qlora_adapted_backward_bytes": size,
        }
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, results.get(name)
        self.library = library
        self._work = threading.local()  # see _room
        cpu = torch.device("cpu")
        values, edges = zip(*(reference.block_tables(cpu, signed) for signed in (False, True)), strict=True)
        library.qlora_initialize(
            reference.nf4_levels(cpu).data_ptr(),
            reference.dynamic_map(cpu).data_ptr(),
            reference._midpoints(cpu, nested=True).data_ptr(),
            (pointer * 2)(*(t.data_ptr() for t in values)),
            (pointer * 2)(*(t.data_ptr() for t in edges)),
        )
        self.select(os.environ.get("QLORA_CPU_ISA", ""))

    def select(self, isa: str = "") -> None:
        """Use the instruction set of that name from `ISAS`, or the best one ("").

        Raises:
            BackendError: no such name, or this processor lacks it.
        """
        if isa and isa not in ISAS:
            raise BackendError(f"QLORA_CPU_ISA={isa}: must be one of {', '.join(ISAS)}, or unset for the best")
        names = (self.library.qlora_select(ISAS.index(name)) for name in ([isa] if isa else reversed(ISAS)))
        name = next((name for name in names if name), None)
        if name is None:
            raise BackendError(f"QLORA_CPU_ISA={isa}: this processor cannot run it. Unset it for the best")
        self.isa = name.decode()
        # What multiplies bf16: attention has a kernel only where something does. AMX, where nothing is forced, takes an
        # adapter's sums too.
        self.bf16_unit = ("", "AVX512-BF16", "AMX")[
            self.library.qlora_select_attention({"": 2, "avx512": 1}.get(isa, 0))
        ]

    def describe(self) -> str:
        """Such as "native (AVX-512, attention and adapters by AMX, 2 threads)"."""
        threads = torch.get_num_threads() if self.library.qlora_threaded() else 1
        what = "attention and adapted layers" if self.bf16_unit == "AMX" else "attention"
        attention = f"{what} by {self.bf16_unit}, " if self.bf16_unit else ""
        return f"native ({self.isa}, {attention}{threads} thread{'s' * (threads != 1)}{'' if self.library.qlora_threaded() else ' after a fork'})"

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(*shape, dtype=dtype)
        if tensor.nbytes >= LARGE:
            self.library.qlora_huge_pages(tensor.data_ptr(), tensor.nbytes)
        return tensor

    def quantize_nf4(self, weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        if weight.dtype not in DTYPES or blocksize not in BLOCKSIZES:
            return reference.quantize_nf4(weight, blocksize)
        weight = weight.contiguous()
        n = weight.numel()
        packed = self._empty((n + 1) // 2, 1, dtype=torch.uint8)
        absmax = torch.empty(-(-n // blocksize), dtype=torch.float32)
        self.library.qlora_quantize_nf4(
            weight.data_ptr(),
            DTYPES[weight.dtype],
            n,
            blocksize,
            packed.data_ptr(),
            absmax.data_ptr(),
            torch.get_num_threads(),
        )
        return packed, absmax

    def fit_scales_nf4(self, weight: Tensor, blocksize: int) -> Tensor:
        if weight.dtype not in DTYPES or blocksize not in BLOCKSIZES:
            return reference.fit_scales_nf4(weight, blocksize)
        weight = weight.contiguous()
        scales = torch.empty(-(-weight.numel() // blocksize), dtype=torch.float32)
        self.library.qlora_fit_scales_nf4(
            weight.data_ptr(),
            DTYPES[weight.dtype],
            weight.numel(),
            blocksize,
            scales.data_ptr(),
            torch.get_num_threads(),
        )
        return scales

    def encode_nf4(self, weight: Tensor, scales: Tensor, blocksize: int) -> Tensor:
        n = weight.numel()
        if weight.dtype not in DTYPES or blocksize not in BLOCKSIZES or scales.dtype != torch.float32:
            return reference.encode_nf4(weight, scales, blocksize)
        if scales.numel() != -(-n // blocksize):
            raise ValueError(f"{scales.numel()} scales for {-(-n // blocksize)} blocks")
        weight, scales = weight.contiguous(), scales.contiguous()
        packed = self._empty((n + 1) // 2, 1, dtype=torch.uint8)
        self.library.qlora_encode_nf4(
            weight.data_ptr(),
            DTYPES[weight.dtype],
            n,
            blocksize,
            scales.data_ptr(),
            packed.data_ptr(),
            torch.get_num_threads(),
        )
        return packed

    def quantize_absmax(self, absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
        if absmax.dtype != torch.float32 or absmax.dim() != 1:
            return reference.quantize_absmax(absmax, nested_blocksize)
        absmax = absmax.contiguous()
        if not self.library.qlora_threaded():
            torch.set_num_threads(1)  # after a fork, `mean` would wait for lost threads as our kernels would
        offset = absmax.mean()  # torch's own, since another order of summation gives another float
        codes = torch.empty_like(absmax, dtype=torch.uint8)
        nested = torch.empty(-(-absmax.numel() // nested_blocksize), dtype=torch.float32)
        self.library.qlora_quantize_absmax(
            absmax.data_ptr(),
            offset.data_ptr(),
            absmax.numel(),
            nested_blocksize,
            codes.data_ptr(),
            nested.data_ptr(),
            torch.get_num_threads(),
        )
        return codes, nested, offset

    def dequantize_nf4(
        self,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        row_gain,
        rows: int,
        columns: int,
        blocksize: int,
        nested_blocksize: int,
        dtype: torch.dtype,
    ) -> Tensor:
        out = self._empty(rows, columns, dtype=dtype)
        self.dequantize_nf4_into(
            out, packed, absmax, nested_absmax, nested_offset, row_gain, blocksize, nested_blocksize, fresh=True
        )
        return out

    def dequantize_nf4_into(
        self,
        out,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        row_gain,
        blocksize: int,
        nested_blocksize: int,
        fresh: bool = False,
    ) -> None:
        rows, columns = out.shape
        if (
            out.dtype not in DTYPES
            or not out.is_contiguous()
            or not self._takes(
                packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize, out.device
            )
        ):
            return reference.dequantize_nf4_into(
                out, packed, absmax, nested_absmax, nested_offset, row_gain, blocksize, nested_blocksize
            )
        if row_gain is not None:
            if row_gain.numel() != rows:
                raise ValueError(f"row_gain holds {row_gain.numel()} values for {rows} rows")
            row_gain = row_gain.float().contiguous()
        reference.count_write(out)
        self.library.qlora_dequantize_nf4(
            packed.data_ptr(),
            absmax.data_ptr(),
            _pointer(nested_absmax),
            _pointer(nested_offset),
            _pointer(row_gain),
            rows,
            columns,
            blocksize,
            nested_blocksize,
            DTYPES[out.dtype],
            out.data_ptr(),
            fresh,
            torch.get_num_threads(),
        )

    def row_norms_nf4(
        self,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        A: Tensor,
        B: Tensor,
        scaling: float,
        rows: int,
        columns: int,
        blocksize: int,
        nested_blocksize: int,
    ) -> Tensor:
        weight = (packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize)
        if not A.dtype == B.dtype == torch.float32 or not self._takes(*weight, A.device):
            return reference.row_norms_nf4(
                packed, absmax, nested_absmax, nested_offset, A, B, scaling, rows, columns, blocksize, nested_blocksize
            )
        if A.shape[1:] != (columns,) or B.shape != (rows, A.shape[0]):
            raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a weight of {rows} x {columns}")
        A, B, rank = _in_sixteens(A, B)
        n, threads = torch.empty(rows, dtype=torch.float32), torch.get_num_threads()
        parts = (
            packed.data_ptr(),
            absmax.data_ptr(),
            _pointer(nested_absmax),
            _pointer(nested_offset),
            rows,
            columns,
            blocksize,
            nested_blocksize,
        )
        tiles, gram = (torch.empty(size, dtype=torch.float32) for size in (A.numel(), rank**2))
        self.library.qlora_row_norms_nf4(
            *parts, A.data_ptr(), tiles.data_ptr(), B.data_ptr(), gram.data_ptr(), rank, scaling, n.data_ptr(), threads
        )
        return n

    def _room(self, size: int) -> Tensor:
        """Bytes that a thread's operators use one after the other, aligned to 64: memory that is warm costs half of
        what fresh memory does.
        """
        work = self._work.__dict__.get("bytes")
        if work is None or work.numel() < size:
            work = self._work.bytes = torch.empty(size, dtype=torch.uint8)
        return work

    def column_dots(self, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype not in DTYPES or b.dtype != a.dtype or a.shape != b.shape or a.dim() != 2:
            return reference.column_dots(a, b)
        rows, columns = a.shape
        if columns and a.stride(1) != 1:
            a = a.contiguous()
        if columns and b.stride(1) != 1:
            b = b.contiguous()
        out = torch.empty(columns, dtype=torch.float32)
        partial = self._partials(rows, columns)
        self.library.qlora_column_dots(
            DTYPES[a.dtype],
            a.data_ptr(),
            a.stride(0),
            b.data_ptr(),
            b.stride(0),
            rows,
            columns,
            _pointer(partial),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def _partials(self, rows: int, columns: int) -> Tensor | None:
        """Room for the partial sums over rows."""
        count = self.library.qlora_partials(rows)
        return torch.empty(count, columns, dtype=torch.float32) if count > 1 else None

    def fold_factors(
        self, A: Tensor, B: Tensor, m: Tensor | None, n: Tensor | None, scaling: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        floats = all(part is None or part.dtype == torch.float32 for part in (A, B, m, n))
        if not floats or dtype not in DTYPES or not A.numel() or not B.numel():
            return reference.fold_factors(A, B, m, n, scaling, dtype)
        rows, rank = B.shape
        if m is not None and not m.shape == n.shape == (rows,):
            raise ValueError(f"m {tuple(m.shape)} and n {tuple(n.shape)} for {rows} rows")
        A, B = A.contiguous(), B.contiguous()
        m, n = (None, None) if m is None else (m.contiguous(), n.contiguous())
        down, up = torch.empty(A.shape, dtype=dtype), torch.empty(B.shape, dtype=dtype)
        gain, safe = (torch.empty(0 if m is None else rows, dtype=torch.float32) for _ in range(2))
        self.library.qlora_fold_factors(
            DTYPES[dtype],
            A.data_ptr(),
            A.numel(),
            B.data_ptr(),
            rows,
            rank,
            scaling,
            _pointer(m),
            _pointer(n),
            down.data_ptr(),
            up.data_ptr(),
            gain.data_ptr(),
            safe.data_ptr(),
            torch.get_num_threads(),
        )
        return down, up, gain, safe

    def adapter_gradients(
        self,
        dy: Tensor,
        up: Tensor,
        u: Tensor,
        y: Tensor | None,
        gain: Tensor | None,
        safe: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._narrow(dy, u) or up.dtype != dy.dtype or (y is not None and y.dtype != dy.dtype):
            return reference.adapter_gradients(dy, up, u, y, gain, safe, scaling, self.column_dots)
        (tokens, columns), rank = dy.shape, u.shape[1]
        factors = [part for part in (gain, safe) if part is not None]
        if (
            up.shape != (columns, rank)
            or (y is not None and (y.shape != dy.shape or safe is None))
            or any(f.shape != (columns,) or f.dtype != torch.float32 for f in factors)
        ):
            raise ValueError(
                f"gradient {tuple(dy.shape)} with u {tuple(u.shape)}, up {tuple(up.shape)} and {len(factors)} factors"
            )
        dy, up, u, y, gain, safe = (None if part is None else part.contiguous() for part in (dy, up, u, y, gain, safe))
        v, dB = torch.empty(tokens, rank, dtype=dy.dtype), torch.empty(columns, rank, dtype=torch.float32)
        dm = torch.empty(0 if y is None else columns, dtype=torch.float32)
        work = self._room(4 * self.library.qlora_narrow_room(tokens, columns, rank))
        self.library.qlora_narrow(
            dy.data_ptr(),
            _pointer(y),
            u.data_ptr(),
            up.data_ptr(),
            tokens,
            columns,
            rank,
            scaling,
            _pointer(gain),
            _pointer(safe),
            work.data_ptr(),
            v.data_ptr(),
            dB.data_ptr(),
            dm.data_ptr(),
            None,
            torch.get_num_threads(),
        )
        return v, dB, dm

    def token_product(self, left: Tensor, x: Tensor) -> Tensor:
        if not self._narrow(x, left):
            return reference.token_product(left, x)
        (tokens, columns), rank = x.shape, left.shape[1]
        left, x, out = left.contiguous(), x.contiguous(), torch.empty(rank, columns, dtype=torch.float32)
        work = self._room(4 * self.library.qlora_narrow_room(tokens, columns, rank))
        self.library.qlora_narrow(
            x.data_ptr(),
            None,
            left.data_ptr(),
            None,
            tokens,
            columns,
            rank,
            1.0,
            None,
            None,
            work.data_ptr(),
            None,
            None,
            None,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def _narrow(self, x: Tensor, left: Tensor) -> bool:
        """Whether narrow.cpp has these sums: bf16, and not so many ranks that the products no longer wait for memory."""
        fits = x.dim() == left.dim() == 2 and x.shape[0] == left.shape[0] and x.numel() and 0 < left.shape[1] <= 64
        return self.bf16_unit == "AMX" and bool(fits) and x.dtype == left.dtype == torch.bfloat16

    def nf4_product(
        self,
        x: Tensor,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        row_gain,
        rows: int,
        columns: int,
        blocksize: int,
        nested_blocksize: int,
        transposed: bool,
    ) -> Tensor:
        weight = (packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize)
        if not self.multiplies(x, *weight):
            return reference.nf4_product(
                x,
                packed,
                absmax,
                nested_absmax,
                nested_offset,
                row_gain,
                rows,
                columns,
                blocksize,
                nested_blocksize,
                transposed,
            )
        if (row_gain is not None and row_gain.numel() != rows) or x.shape[1] != (columns if transposed else rows):
            raise ValueError(
                f"x {tuple(x.shape)} and {None if row_gain is None else row_gain.numel()} gains for a weight of {rows} x {columns}"
            )
        return self._product(x, weight, transposed, None if row_gain is None else row_gain.float().contiguous())

    def adapted_product(
        self,
        x: Tensor,
        x_adapter: Tensor,
        A: Tensor,
        B: Tensor,
        m: Tensor | None,
        n: Tensor | None,
        base: Tensor | None,
        scaling: float,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        rows: int,
        columns: int,
        blocksize: int,
        nested_blocksize: int,
    ) -> tuple[Tensor, ...]:
        weight, (tokens, rank) = (
            (packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize),
            (x.shape[0], A.shape[0]),
        )
        floats = A.dtype == B.dtype == torch.float32 and all(
            [part is None or part.dtype == torch.float32 for part in (m, n, base)]
        )
        if not floats or x_adapter.dtype != x.dtype or not self.multiplies(x, *weight):
            return reference.adapted_product(x, x_adapter, A, B, m, n, base, scaling, *weight)
        if (
            x.shape[1] != columns
            or x_adapter.shape != x.shape
            or A.shape != (rank, columns)
            or B.shape != (rows, rank)
            or (m is not None and m.shape != (rows,))
        ):
            raise ValueError(
                f"x {tuple(x.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)} for a weight of {rows} x {columns}"
            )
        x, x_adapter, A, B, threads = (
            x.contiguous(),
            x_adapter.contiguous(),
            A.contiguous(),
            B.contiguous(),
            torch.get_num_threads(),
        )
        # What is kept longest comes first, here and in the backward pass: behind what is soon freed it would cut the
        # heap into holes.
        down, up, u = x.new_empty(rank, columns), x.new_empty(rows, rank), x.new_empty(tokens, rank)
        factors, m_at, base_at, gain = A.new_empty(0 if m is None else 3, rows), None, None, None
        y = x.new_empty(tokens, rows)
        if m is not None:
            m = m.contiguous()
            m_at, gain = m.data_ptr(), factors.data_ptr()
            if n is not None or base is None or base.shape != m.shape:
                factors[2] = self.row_norms_nf4(*weight[:4], A, B, scaling, *weight[4:]) if n is None else n
            else:
                base = base.contiguous()
                base_at = base.data_ptr()
        work = self._room(self.library.qlora_product_bytes(tokens, columns, rank, threads))
        parts = (
            packed.data_ptr(),
            absmax.data_ptr(),
            _pointer(nested_absmax),
            _pointer(nested_offset),
            gain,
            rows,
            columns,
            blocksize,
            nested_blocksize,
            True,
        )
        adapter = (x_adapter.data_ptr(), u.data_ptr(), down.data_ptr(), rank, A.data_ptr(), B.data_ptr(), scaling, m_at)
        made = (
            *((None, None) if gain is None else (gain + 4 * rows, gain + 8 * rows)),
            up.data_ptr(),
            work.data_ptr(),
            y.data_ptr(),
            threads,
        )
        if not self.library.qlora_product(*parts, x.data_ptr(), tokens, *adapter, base_at, *made):  # an n is not exact
            factors[2] = self.row_norms_nf4(*weight[:4], A, B, scaling, *weight[4:])
            self.library.qlora_product(*parts, x.data_ptr(), tokens, *adapter, None, *made)
        return y, u, down, up, factors

    def adapted_product_backward(
        self,
        dy: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        u: Tensor,
        y: Tensor | None,
        factors: Tensor,
        scaling: float,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        rows: int,
        columns: int,
        blocksize: int,
        nested_blocksize: int,
        needs_x: bool,
    ) -> tuple[Tensor, ...]:
        weight = (packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize)
        if not self.multiplies(dy, *weight) or not dy.dtype == x.dtype == down.dtype == up.dtype:
            return reference.adapted_product_backward(dy, x, down, up, u, y, factors, scaling, *weight, needs_x)
        (tokens, rank), folded = u.shape, factors.numel() > 0
        fit = (
            dy.shape == (tokens, rows)
            and x.shape == (tokens, columns)
            and down.shape == (rank, columns)
            and up.shape == (rows, rank)
        )
        if (
            not fit
            or factors.dtype != torch.float32
            or (folded and factors.shape != (3, rows))
            or (y is not None and not (folded and y.shape == dy.shape))
        ):
            raise ValueError(
                f"gradient {tuple(dy.shape)}, x {tuple(x.shape)}, down {tuple(down.shape)}, up {tuple(up.shape)} for a weight of {rows} x {columns}"
            )
        dy, x, down, up, u, factors = (
            dy.contiguous(),
            x.contiguous(),
            down.contiguous(),
            up.contiguous(),
            u.contiguous(),
            factors.contiguous(),
        )
        if not self._narrow(dy, u) or (y is not None and y.dtype != dy.dtype):
            v, dB, dm = self.adapter_gradients(dy, up, u, y, *(factors[:2] if folded else (None, None)), scaling)
            dx = (
                self._product(dy, weight, False, factors[0] if folded else None, v.contiguous(), down)
                if needs_x
                else dy.new_empty(0)
            )
            return dx, self.token_product(v, x), dB, dm
        y = None if y is None else y.contiguous()
        gain, threads = factors.data_ptr() if folded else None, torch.get_num_threads()
        dA, dB, dm = (
            factors.new_empty(down.shape),
            factors.new_empty(up.shape),
            factors.new_empty(0 if y is None else rows),
        )
        dx = dy.new_empty((tokens, columns) if needs_x else 0)
        work = self._room(self.library.qlora_adapted_backward_bytes(tokens, rows, columns, rank, threads))
        self.library.qlora_adapted_backward(
            packed.data_ptr(),
            absmax.data_ptr(),
            _pointer(nested_absmax),
            _pointer(nested_offset),
            gain,
            rows,
            columns,
            blocksize,
            nested_blocksize,
            dy.data_ptr(),
            x.data_ptr(),
            down.data_ptr(),
            up.data_ptr(),
            u.data_ptr(),
            _pointer(y),
            tokens,
            rank,
            scaling,
            gain + 4 * rows if folded else None,
            work.data_ptr(),
            dx.data_ptr() if needs_x else None,
            dA.data_ptr(),
            dB.data_ptr(),
            dm.data_ptr(),
            threads,
        )
        return dx, dA, dB, dm

    def multiplies(
        self,
        x: Tensor,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        rows: int,
        columns: int,
        blocksize: int,
        nested_blocksize: int,
    ) -> bool:
        """Whether product.cpp multiplies these: bf16, whole tiles."""
        fits = (
            x.dtype == torch.bfloat16
            and x.dim() == 2
            and x.shape[0] >= 32
            and rows % 32 == 0 == columns % 64
            and blocksize >= 64
        )
        return (
            self.bf16_unit == "AMX"
            and fits
            and self._takes(
                packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize, x.device
            )
        )

    def _product(
        self,
        x: Tensor,
        weight: tuple,
        transposed: bool,
        gain: Tensor | None,
        u: Tensor | None = None,
        down: Tensor | None = None,
    ) -> Tensor:
        """x W't, or x W' + u down, of contiguous factors."""
        packed, absmax, nested_absmax, nested_offset, rows, columns, blocksize, nested_blocksize = weight
        x, rank, threads = x.contiguous(), 0 if u is None else u.shape[1], torch.get_num_threads()
        inner, outer = (columns, rows) if transposed else (rows, columns)
        y, work = (
            x.new_empty(x.shape[0], outer),
            self._room(self.library.qlora_product_bytes(x.shape[0], inner, rank, threads)),
        )
        self.library.qlora_product(
            packed.data_ptr(),
            absmax.data_ptr(),
            _pointer(nested_absmax),
            _pointer(nested_offset),
            _pointer(gain),
            rows,
            columns,
            blocksize,
            nested_blocksize,
            transposed,
            x.data_ptr(),
            x.shape[0],
            None,
            _pointer(u),
            _pointer(down),
            rank,
            None,
            None,
            1.0,
            None,
            None,
            None,
            None,
            None,
            work.data_ptr(),
            y.data_ptr(),
            threads,
        )
        return y

    def cross_entropy_(self, logits: Tensor, targets: Tensor) -> Tensor:
        rows, columns = logits.shape
        if logits.dtype not in DTYPES or not logits.is_contiguous() or targets.dtype != torch.int64:
            return reference.cross_entropy_(logits, targets)
        if targets.shape != (rows,) or (rows and not (0 <= targets.min() and targets.max() < columns)):
            raise IndexError(
                f"{tuple(targets.shape)} targets from {targets.min()} to {targets.max()} for logits {tuple(logits.shape)}"
            )
        reference.count_write(logits)
        targets, losses = targets.contiguous(), torch.empty(rows, dtype=torch.float32)
        self.library.qlora_cross_entropy(
            DTYPES[logits.dtype],
            logits.data_ptr(),
            targets.data_ptr(),
            rows,
            columns,
            losses.data_ptr(),
            torch.get_num_threads(),
        )
        return losses

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if x.dtype not in DTYPES or weight.dtype != x.dtype or weight.shape != x.shape[1:] or not x.numel():
            return reference.rms_norm(x, weight, eps)
        x, weight = x.contiguous(), weight.contiguous()
        y, inverse = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32)
        self.library.qlora_rms_norm(
            DTYPES[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            *x.shape,
            eps,
            y.data_ptr(),
            inverse.data_ptr(),
            torch.get_num_threads(),
        )
        return y, inverse

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        if (
            x.dtype not in DTYPES
            or not dy.dtype == weight.dtype == x.dtype
            or dy.shape != x.shape
            or weight.shape != x.shape[1:]
            or not x.numel()
        ):
            return reference.rms_norm_backward(dy, x, weight, inverse)
        dy, x, weight, inverse = (part.contiguous() for part in (dy, x, weight, inverse))
        dx = torch.empty_like(x)
        self.library.qlora_rms_norm_backward(
            DTYPES[x.dtype],
            dy.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            inverse.data_ptr(),
            *x.shape,
            dx.data_ptr(),
            torch.get_num_threads(),
        )
        return dx

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        if gate.dtype not in DTYPES or up.dtype != gate.dtype or up.shape != gate.shape:
            return reference.swiglu(gate, up)
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        self.library.qlora_swiglu(
            DTYPES[gate.dtype], gate.data_ptr(), up.data_ptr(), gate.numel(), y.data_ptr(), torch.get_num_threads()
        )
        return y

    def swiglu_backward(self, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if gate.dtype not in DTYPES or not dy.dtype == up.dtype == gate.dtype or not dy.shape == up.shape == gate.shape:
            return reference.swiglu_backward(dy, gate, up)
        dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self.library.qlora_swiglu_backward(
            DTYPES[gate.dtype],
            dy.data_ptr(),
            gate.data_ptr(),
            up.data_ptr(),
            gate.numel(),
            dgate.data_ptr(),
            dup.data_ptr(),
            torch.get_num_threads(),
        )
        return dgate, dup

    def swiglu_backward_dots(self, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if (
            gate.dtype not in DTYPES
            or not dy.dtype == up.dtype == gate.dtype
            or not dy.shape == up.shape == gate.shape
            or gate.dim() != 2
        ):
            return reference.swiglu_backward_dots(dy, gate, up)
        dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
        rows, columns = gate.shape
        dgate, dup, dots = torch.empty_like(gate), torch.empty_like(up), torch.empty(2, columns, dtype=torch.float32)
        partial = self._partials(rows, 2 * columns)
        self.library.qlora_swiglu_backward_dots(
            DTYPES[gate.dtype],
            dy.data_ptr(),
            gate.data_ptr(),
            up.data_ptr(),
            rows,
            columns,
            dgate.data_ptr(),
            dup.data_ptr(),
            _pointer(partial),
            dots.data_ptr(),
            torch.get_num_threads(),
        )
        return dgate, dup, dots

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotate(q, k, cos, sin, 0) or reference.rotate(q, k, cos, sin)

    def rotate_backward(self, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotate(dq, dk, cos, sin, 1) or reference.rotate_backward(dq, dk, cos, sin)

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: int) -> tuple[Tensor, Tensor] | None:
        (tokens, heads, D), groups, positions = q.shape, k.shape[1], cos.shape[0]
        if (
            q.dtype not in DTYPES
            or not k.dtype == cos.dtype == sin.dtype == q.dtype
            or D % 2
            or not q.numel()
            or not k.numel()
        ):
            return None
        if (
            k.shape != (tokens, groups, D)
            or not cos.shape == sin.shape == (positions, D)
            or not positions
            or tokens % positions
        ):
            raise ValueError(
                f"queries {tuple(q.shape)} and keys {tuple(k.shape)} turned by {tuple(cos.shape)} and {tuple(sin.shape)}"
            )
        q, k = (x if x.stride()[1:] == (D, 1) else x.contiguous() for x in (q, k))
        cos, sin = cos.contiguous(), sin.contiguous()
        turned = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=q.dtype)
        self.library.qlora_rotate(
            DTYPES[q.dtype],
            back,
            q.data_ptr(),
            q.stride(0),
            heads,
            k.data_ptr(),
            k.stride(0),
            groups,
            D,
            tokens,
            cos.data_ptr(),
            sin.data_ptr(),
            positions,
            turned[0].data_ptr(),
            turned[1].data_ptr(),
            torch.get_num_threads(),
        )
        return turned

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
        if not self.attends(q, k, v):
            return reference.attention(q, k, v, bounds, scale)
        out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
        self._attention((q, k, v, out), lse, bounds, scale)
        return out, lse

    def attention_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        bounds: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.attends(q, k, v):
            return reference.attention_backward(dout, q, k, v, out, lse, bounds, scale)
        if (
            not dout.shape == out.shape == q.shape
            or not dout.dtype == out.dtype == q.dtype
            or (lse.shape, lse.dtype) != ((q.shape[1], q.shape[0]), torch.float32)
        ):
            raise ValueError(
                f"gradient {tuple(dout.shape)}, result {tuple(out.shape)} and lse {tuple(lse.shape)} for queries {tuple(q.shape)}"
            )
        gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        self._attention((dout, q, k, v, out, *gradients), lse.contiguous(), bounds, scale)
        return gradients

    def attends(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether `attention` has a kernel for these: one type of head, in bf16."""
        return bool(self.bf16_unit) and q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.shape[-1] == v.shape[-1]

    def _attention(self, views: tuple[Tensor, ...], lse: Tensor, bounds: Sequence[int], scale: float) -> None:
        backward = len(views) > 4
        q, k, v = views[backward : backward + 3]
        (tokens, heads, D), groups = q.shape, k.shape[1]
        lengths, threads = [stop - start for start, stop in pairwise(bounds)], torch.get_num_threads()
        if k.shape != v.shape or k.shape != (tokens, groups, D) or heads % groups:
            raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}")
        if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
            raise ValueError(f"examples at {list(bounds)} of {tokens} tokens")
        if not tokens:
            return
        views = [x if x.stride(2) == 1 else x.contiguous() for x in views]  # kept here while the kernel reads them
        parts = [number for x in views for number in (x.data_ptr(), x.stride(0), x.stride(1))]
        size = ctypes.c_int64
        room = self.library.qlora_attention_bytes(backward, max(lengths), D)
        work = torch.empty(min(threads, groups * len(lengths)) * room, dtype=torch.uint8)  # torch aligns to 64 bytes
        self.library.qlora_attention(
            backward,
            (size * len(parts))(*parts),
            lse.data_ptr(),
            (size * len(bounds))(*bounds),
            len(lengths),
            heads,
            groups,
            D,
            scale,
            work.data_ptr(),
            room,
            threads,
        )

    @staticmethod
    def _takes(
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        rows: int,
        columns: int,
        blocksize: int,
        nested_blocksize: int,
        device: torch.device,
    ) -> bool:
        """Whether the kernels read these parts: the sizes are checked, since C code would read past a tensor that is
        too short.
        """
        n = rows * columns
        blocks = -(-n // blocksize)
        if not (
            blocksize in BLOCKSIZES
            and packed.dtype == torch.uint8
            and packed.numel() >= (n + 1) // 2
            and absmax.numel() >= blocks
            and packed.is_contiguous()
            and absmax.is_contiguous()
            and packed.device == absmax.device == device
        ):
            return False
        if nested_absmax is None:
            return absmax.dtype == torch.float32
        return (
            nested_blocksize in BLOCKSIZES
            and absmax.dtype == torch.uint8
            and nested_absmax.dtype == nested_offset.dtype == torch.float32
            and nested_absmax.numel() >= -(-blocks // nested_blocksize)
            and nested_absmax.is_contiguous()
            and nested_absmax.device == nested_offset.device == device
        )

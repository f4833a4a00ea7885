"""LoRA and DoRA on a CPU: the native operators of subject `adapter` but the whole layer, which is in `layer`: norms,
factors, and the sums of a backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.cpu.binding import (
    DTYPES,
    FLOAT,
    INTEGER,
    POINTER,
    SIZE,
    WEIGHT,
    Subject,
    as_argument,
    pointer,
    readable,
)


def _in_sixteens(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, int]:
    """A [rank, in] and B [out, rank] with zeros up to a rank that is a multiple of 16, and that rank."""
    pad = -A.shape[0] % 16
    if pad:
        A, B = torch.nn.functional.pad(A, (0, 0, 0, pad)), torch.nn.functional.pad(B, (0, pad))
    return A.contiguous(), B.contiguous(), A.shape[0]


class AdapterKernels(Subject):
    SIGNATURES = {
        "qlora_partials": [SIZE],
        "qlora_column_dots": [INTEGER, POINTER, SIZE, POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, INTEGER],
        "qlora_row_norms_4bit": [WEIGHT, *[POINTER] * 4, SIZE, FLOAT, POINTER, INTEGER],
        "qlora_fold_factors": [INTEGER, POINTER, SIZE, POINTER, SIZE, SIZE, FLOAT, *[POINTER] * 6, INTEGER],
        "qlora_narrow_room": [SIZE, SIZE, SIZE],
        "qlora_narrow": [*[POINTER] * 4, SIZE, SIZE, SIZE, FLOAT, *[POINTER] * 7, INTEGER],
    }
    RESULTS = {"qlora_partials": SIZE, "qlora_narrow_room": SIZE}

    def row_norms_4bit(self, weight: list[Tensor], layout: list[int], A: Tensor, B: Tensor, scaling: float) -> Tensor:
        if not A.dtype == B.dtype == torch.float32 or not readable(weight, layout, A.device):
            return NotImplemented
        rows, columns = layout[:2]
        if A.shape[1:] != (columns,) or B.shape != (rows, A.shape[0]):
            raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a weight of {rows} x {columns}")
        A, B, rank = _in_sixteens(A, B)
        n, threads = torch.empty(rows, dtype=torch.float32), torch.get_num_threads()
        tiles, gram = (torch.empty(size, dtype=torch.float32) for size in (A.numel(), rank**2))
        self.library.qlora_row_norms_4bit(
            as_argument(weight, layout),
            A.data_ptr(),
            tiles.data_ptr(),
            B.data_ptr(),
            gram.data_ptr(),
            rank,
            scaling,
            n.data_ptr(),
            threads,
        )
        return n

    def row_norms_4bit_all(
        self, weights: list[Tensor], layouts: list[int], A: list[Tensor], B: list[Tensor], scaling: list[float]
    ) -> list[Tensor]:
        return reference.row_norms_4bit_all(weights, layouts, A, B, scaling, self._row_norms)

    def _row_norms(self, *arguments) -> Tensor:
        found = self.row_norms_4bit(*arguments)
        return reference.row_norms_4bit(*arguments) if found is NotImplemented else found

    def columnwise_dot(self, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype not in DTYPES or b.dtype != a.dtype or a.shape != b.shape or a.dim() != 2:
            return NotImplemented
        rows, columns = a.shape
        if columns and a.stride(1) != 1:
            a = a.contiguous()
        if columns and b.stride(1) != 1:
            b = b.contiguous()
        out = torch.empty(columns, dtype=torch.float32)
        partial = self.partial_sums(rows, columns)
        self.library.qlora_column_dots(
            DTYPES[a.dtype],
            a.data_ptr(),
            a.stride(0),
            b.data_ptr(),
            b.stride(0),
            rows,
            columns,
            pointer(partial),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def prepare_lora_factors(
        self, A: Tensor, B: Tensor, m: Tensor | None, n: Tensor | None, scaling: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        floats = all(part is None or part.dtype == torch.float32 for part in (A, B, m, n))
        if not floats or dtype not in DTYPES or not A.numel() or not B.numel():
            return NotImplemented
        rows = B.shape[0]
        if m is not None and (n is None or not m.shape == n.shape == (rows,)):
            raise ValueError(f"m {tuple(m.shape)} and n {n if n is None else tuple(n.shape)} for {rows} rows")
        m, n = (None, None) if m is None or n is None else (m.contiguous(), n.contiguous())
        row_scale, m_clamped = (torch.empty(0 if m is None else rows, dtype=torch.float32) for _ in range(2))
        A, B = A.contiguous(), B.contiguous()
        A_cast, B_scaled = torch.empty(A.shape, dtype=dtype), torch.empty(B.shape, dtype=dtype)
        self.library.qlora_fold_factors(
            DTYPES[dtype],
            A.data_ptr(),
            A.numel(),
            B.data_ptr(),
            *B.shape,
            scaling,
            pointer(m),
            pointer(n),
            A_cast.data_ptr(),
            B_scaled.data_ptr(),
            None if m is None else row_scale.data_ptr(),
            None if m is None else m_clamped.data_ptr(),
            torch.get_num_threads(),
        )
        return A_cast, B_scaled, row_scale, m_clamped

    def _sums_on_the_unit(self, x: Tensor, narrow: Tensor) -> bool:
        """Whether skinny_gemm_amx.cpp has these sums: bf16, and not so many ranks that the products no longer wait for
        memory.
        """
        fits = (
            x.dim() == narrow.dim() == 2 and x.shape[0] == narrow.shape[0] and x.numel() and 0 < narrow.shape[1] <= 64
        )
        return self.bf16_unit == "AMX" and bool(fits) and x.dtype == narrow.dtype == torch.bfloat16

    def adapter_gradients(
        self,
        dy: Tensor,
        B_scaled: Tensor,
        xA: Tensor,
        y: Tensor | None,
        row_scale: Tensor | None,
        m_clamped: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        alike = B_scaled.dtype == dy.dtype and (y is None or y.dtype == dy.dtype)
        if not self._sums_on_the_unit(dy, xA) or not alike:
            return reference.adapter_gradients(dy, B_scaled, xA, y, row_scale, m_clamped, scaling, self._dot)
        (tokens, columns), rank = dy.shape, xA.shape[1]
        factors = [part for part in (row_scale, m_clamped) if part is not None]
        if (
            B_scaled.shape != (columns, rank)
            or (y is not None and (y.shape != dy.shape or m_clamped is None))
            or any(f.shape != (columns,) or f.dtype != torch.float32 for f in factors)
        ):
            shapes = f"xA {tuple(xA.shape)}, B {tuple(B_scaled.shape)} and {len(factors)} factors"
            raise ValueError(f"gradient {tuple(dy.shape)} with {shapes}")
        dy, B_scaled, xA = dy.contiguous(), B_scaled.contiguous(), xA.contiguous()
        y, row_scale, m_clamped = (None if part is None else part.contiguous() for part in (y, row_scale, m_clamped))
        v, dB = torch.empty(tokens, rank, dtype=dy.dtype), torch.empty(columns, rank, dtype=torch.float32)
        dm = torch.empty(0 if y is None else columns, dtype=torch.float32)
        work = self.workspace(4 * self.library.qlora_narrow_room(tokens, columns, rank))
        self.library.qlora_narrow(
            dy.data_ptr(),
            pointer(y),
            xA.data_ptr(),
            B_scaled.data_ptr(),
            tokens,
            columns,
            rank,
            scaling,
            pointer(row_scale),
            pointer(m_clamped),
            work.data_ptr(),
            v.data_ptr(),
            dB.data_ptr(),
            dm.data_ptr(),
            None,
            torch.get_num_threads(),
        )
        return v, dB, dm

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        found = self.columnwise_dot(a, b)
        return reference.columnwise_dot(a, b) if found is NotImplemented else found

    def matmul_tn(self, left: Tensor, x: Tensor) -> Tensor:
        if not self._sums_on_the_unit(x, left):
            return NotImplemented
        (tokens, columns), rank = x.shape, left.shape[1]
        left, x, out = left.contiguous(), x.contiguous(), torch.empty(rank, columns, dtype=torch.float32)
        work = self.workspace(4 * self.library.qlora_narrow_room(tokens, columns, rank))
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

"""A whole adapted layer on a CPU as one operator each way: the weight is decoded as it is multiplied, the adapter's
product is in the same sums, and in the backward pass all of the adapter's gradients come of one call.

    bf16      on AMX (csrc/nf4_gemm_amx.cpp), where DoRA's n is made on the way too; by the dot products of AVX512-BF16
              where they are as fast as an FMA (csrc/nf4_gemm_bf16.h)
    float32   on AVX2, AVX-512 and NEON (csrc/nf4_gemm.h); bf16 too where neither is: it is read and written as it lies,
              and all between is float32

For such bf16, and where torch's own switch allows less than float32's precision
(`torch.set_float32_matmul_precision("high")`, which allows TF32 on a card), and the processor has AVX-512 VNNI, or AVX2
and no AVX-512, the large product is one of 16-bit integers (csrc/nf4_gemm_integers.h): 1.5 to 1.7 times the speed, and
about TF32's precision. The alternative, a switch of our own, would be a second word for one thing.

Those of a frozen head, which is dense, are in float32 or by integers likewise (csrc/dense_gemm.h); of bf16 on a CPU
that multiplies it, they are torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.cpu.adapter import AdapterKernels
from qlora_kernels.cpu.binding import FLOAT, INTEGER, POINTER, SIZE, WEIGHT, as_argument, pointer, readable


class LayerKernels(AdapterKernels):
    SIGNATURES = {
        "qlora_product_bytes": [SIZE, SIZE, SIZE, INTEGER],
        "qlora_product": [
            WEIGHT,
            POINTER,
            INTEGER,
            POINTER,
            SIZE,
            *[POINTER] * 3,
            SIZE,
            *[POINTER] * 2,
            FLOAT,
            *[POINTER] * 7,
            INTEGER,
        ],
        "qlora_adapted_backward_bytes": [*[SIZE] * 4, INTEGER],
        "qlora_adapted_backward": [WEIGHT, *[POINTER] * 7, SIZE, SIZE, FLOAT, *[POINTER] * 6, INTEGER],
        "qlora_layers": [],
        "qlora_layers_in_bf16": [],
        "qlora_dense_in_float32": [],
        "qlora_layer_bytes": [INTEGER, INTEGER, *[SIZE] * 4, INTEGER],
        "qlora_dense_bytes": [INTEGER, INTEGER],
        "qlora_dense": [INTEGER, POINTER, INTEGER, SIZE, SIZE, INTEGER, POINTER, SIZE, POINTER, POINTER, INTEGER],
        "qlora_layer_forward": [
            WEIGHT,
            POINTER,
            INTEGER,
            INTEGER,
            POINTER,
            SIZE,
            *[POINTER] * 4,
            INTEGER,
            SIZE,
            FLOAT,
            *[POINTER] * 5,
            INTEGER,
        ],
        "qlora_layer_backward": [
            WEIGHT,
            POINTER,
            INTEGER,
            INTEGER,
            *[POINTER] * 6,
            *[SIZE] * 2,
            FLOAT,
            *[POINTER] * 6,
            INTEGER,
        ],
    }
    RESULTS = {
        "qlora_product_bytes": SIZE,
        "qlora_product": INTEGER,
        "qlora_adapted_backward_bytes": SIZE,
        "qlora_layers": INTEGER,
        "qlora_layers_in_bf16": INTEGER,
        "qlora_dense_in_float32": INTEGER,
        "qlora_layer_bytes": SIZE,
        "qlora_dense_bytes": SIZE,
    }

    layers: int  # what multiplies float32: 0: torch, 1: float32, 2: 16-bit integers too
    layers_in_bf16: bool  # bf16 has dot products of its own
    dense_in_float32: bool  # a dense weight has a product of its own

    def supports_fused_gemm(self, x: Tensor, weight: list[Tensor], layout: list[int]) -> bool:
        """Whether a kernel multiplies these: bf16 on AMX, float32 and bf16 on AVX2, AVX-512 and NEON; whole tiles of
        the weight, and on AMX of the tokens.
        """
        on_amx = self._on_amx(x)
        return (
            (on_amx or (self.layers > 0 and x.dtype in (torch.float32, torch.bfloat16)))
            and x.dim() == 2
            and x.shape[0] >= (32 if on_amx else 1)
            and layout[0] % 32 == 0 == layout[1] % 64
            and layout[2] >= 64
            and readable(weight, layout, x.device)
        )

    def _on_amx(self, x: Tensor) -> bool:
        return self.bf16_unit == "AMX" and x.dtype == torch.bfloat16

    def matmul_4bit(
        self, x: Tensor, weight: list[Tensor], layout: list[int], row_scale: Tensor | None, transposed: bool
    ) -> Tensor:
        if not self.supports_fused_gemm(x, weight, layout):
            return NotImplemented
        rows, columns = layout[:2]
        if (row_scale is not None and row_scale.numel() != rows) or x.shape[1] != (columns if transposed else rows):
            scales = None if row_scale is None else row_scale.numel()
            raise ValueError(f"x {tuple(x.shape)} and {scales} row scales for a weight of {rows} x {columns}")
        row_scale = None if row_scale is None else row_scale.float().contiguous()
        by = self._matmul if self._on_amx(x) else self._vector_matmul
        return by(x, weight, layout, row_scale, transposed)

    def _matmul(
        self,
        x: Tensor,
        weight: list[Tensor],
        layout: list[int],
        row_scale: Tensor | None,
        transposed: bool,
        v: Tensor | None = None,
        A_cast: Tensor | None = None,
    ) -> Tensor:
        """x W't, or x W' + v A, of contiguous factors."""
        x, rank, threads = x.contiguous(), 0 if v is None else v.shape[1], torch.get_num_threads()
        inner, outer = (layout[1], layout[0]) if transposed else (layout[0], layout[1])
        y = self.empty(x.shape[0], outer, dtype=x.dtype)
        work = self.workspace(self.library.qlora_product_bytes(x.shape[0], inner, rank, threads))
        nothing = [None] * 5
        self.library.qlora_product(
            as_argument(weight, layout),
            pointer(row_scale),
            transposed,
            x.data_ptr(),
            x.shape[0],
            None,
            pointer(v),
            pointer(A_cast),
            rank,
            None,
            None,
            1.0,
            *nothing,
            work.data_ptr(),
            y.data_ptr(),
            threads,
        )
        return y

    def adapted_linear(
        self,
        x: Tensor,
        x_adapter: Tensor,
        A: Tensor,
        B: Tensor,
        m: Tensor | None,
        n: Tensor | None,
        base_row_norms: Tensor | None,
        scaling: float,
        weight: list[Tensor],
        layout: list[int],
    ) -> tuple[Tensor, ...]:
        (rows, columns), (tokens, rank) = layout[:2], (x.shape[0], A.shape[0])
        floats = all(part is None or part.dtype == torch.float32 for part in (A, B, m, n, base_row_norms))
        if not floats or x_adapter.dtype != x.dtype or not self.supports_fused_gemm(x, weight, layout):
            return NotImplemented
        if (
            x.shape[1] != columns
            or x_adapter.shape != x.shape
            or A.shape != (rank, columns)
            or B.shape != (rows, rank)
            or (m is not None and m.shape != (rows,))
        ):
            shapes = f"x {tuple(x.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise ValueError(f"{shapes} for a weight of {rows} x {columns}")
        x, x_adapter, A, B = x.contiguous(), x_adapter.contiguous(), A.contiguous(), B.contiguous()
        if not self._on_amx(x):
            return self._vector_layer(x, x_adapter, A, B, m, n, scaling, weight, layout)
        threads = torch.get_num_threads()
        # What is kept longest comes first, here and in the backward pass: behind what is soon freed it would cut the
        # heap into holes.
        A_cast, B_scaled, xA = x.new_empty(rank, columns), x.new_empty(rows, rank), x.new_empty(tokens, rank)
        factors, m_at, base_at, row_scale = A.new_empty(0 if m is None else 3, rows), None, None, None
        y = self.empty(tokens, rows, dtype=x.dtype)
        if m is not None:
            m = m.contiguous()
            m_at, row_scale = m.data_ptr(), factors.data_ptr()
            if n is not None or base_row_norms is None or base_row_norms.shape != m.shape:
                factors[2] = self.row_norms_4bit(weight, layout, A, B, scaling) if n is None else n
            else:
                base_row_norms = base_row_norms.contiguous()
                base_at = base_row_norms.data_ptr()
        work = self.workspace(self.library.qlora_product_bytes(tokens, columns, rank, threads))
        begin = (as_argument(weight, layout), row_scale, True, x.data_ptr(), tokens, x_adapter.data_ptr())
        adapter = (xA.data_ptr(), A_cast.data_ptr(), rank, A.data_ptr(), B.data_ptr(), scaling, m_at)
        made = (
            *((None, None) if row_scale is None else (row_scale + 4 * rows, row_scale + 8 * rows)),
            B_scaled.data_ptr(),
            work.data_ptr(),
            y.data_ptr(),
            threads,
        )
        if not self.library.qlora_product(*begin, *adapter, base_at, *made):  # an n is not exact
            factors[2] = self.row_norms_4bit(weight, layout, A, B, scaling)
            self.library.qlora_product(*begin, *adapter, None, *made)
        return y, xA, A_cast, B_scaled, factors

    def adapted_linear_backward(
        self,
        dy: Tensor,
        saved: list[Tensor],
        y: Tensor | None,
        scaling: float,
        weight: list[Tensor],
        layout: list[int],
        needs_x: bool,
    ) -> tuple[Tensor, ...]:
        x, xA, A_cast, B_scaled, factors = saved
        if (
            not self.supports_fused_gemm(dy, weight, layout)
            or not dy.dtype == x.dtype == A_cast.dtype == B_scaled.dtype
        ):
            return NotImplemented
        (rows, columns), (tokens, rank), scaled = layout[:2], xA.shape, factors.numel() > 0
        fit = (
            dy.shape == (tokens, rows)
            and x.shape == (tokens, columns)
            and A_cast.shape == (rank, columns)
            and B_scaled.shape == (rows, rank)
        )
        if (
            not fit
            or factors.dtype != torch.float32
            or (scaled and factors.shape != (3, rows))
            or (y is not None and not (scaled and y.shape == dy.shape))
        ):
            shapes = (
                f"gradient {tuple(dy.shape)}, x {tuple(x.shape)}, A {tuple(A_cast.shape)}, B {tuple(B_scaled.shape)}"
            )
            raise ValueError(f"{shapes} for a weight of {rows} x {columns}")
        dy, x, A_cast, B_scaled = dy.contiguous(), x.contiguous(), A_cast.contiguous(), B_scaled.contiguous()
        xA, factors = xA.contiguous(), factors.contiguous()
        if not self._on_amx(dy):
            if y is not None and y.dtype != dy.dtype:
                return NotImplemented
            y = None if y is None else y.contiguous()
            return self._vector_backward(dy, [x, xA, A_cast, B_scaled, factors], y, scaling, weight, layout, needs_x)
        if not self._sums_on_the_unit(dy, xA) or (y is not None and y.dtype != dy.dtype):
            row_scale, m_clamped = (factors[0], factors[1]) if scaled else (None, None)
            v, dB, dm = self.adapter_gradients(dy, B_scaled, xA, y, row_scale, m_clamped, scaling)
            dx = dy.new_empty(0)
            if needs_x:
                dx = self._matmul(dy, weight, layout, row_scale, False, v.contiguous(), A_cast)
            dA = self.matmul_tn(v, x)
            return dx, reference.matmul_tn(v, x) if dA is NotImplemented else dA, dB, dm
        y = None if y is None else y.contiguous()
        row_scale_at, threads = factors.data_ptr() if scaled else None, torch.get_num_threads()
        dA, dB = factors.new_empty(A_cast.shape), factors.new_empty(B_scaled.shape)
        dm = factors.new_empty(0 if y is None else rows)
        dx = self.empty(tokens, columns, dtype=dy.dtype) if needs_x else dy.new_empty(0)
        work = self.workspace(self.library.qlora_adapted_backward_bytes(tokens, rows, columns, rank, threads))
        self.library.qlora_adapted_backward(
            as_argument(weight, layout),
            row_scale_at,
            dy.data_ptr(),
            x.data_ptr(),
            A_cast.data_ptr(),
            B_scaled.data_ptr(),
            xA.data_ptr(),
            pointer(y),
            tokens,
            rank,
            scaling,
            row_scale_at + 4 * rows if row_scale_at is not None else None,
            work.data_ptr(),
            dx.data_ptr() if needs_x else None,
            dA.data_ptr(),
            dB.data_ptr(),
            dm.data_ptr(),
            threads,
        )
        return dx, dA, dB, dm

    # ---------------------------------------------------------------- without a matrix unit

    def _by_integers(self, x: Tensor) -> bool:
        """They lose less than bf16 does, so bf16 needs no leave."""
        return self.layers > 1 and (x.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest")

    def _vector_work(self, x: Tensor, layout: list[int], rank: int) -> Tensor:
        kind = (self._by_integers(x), x.dtype == torch.bfloat16)
        threads = torch.get_num_threads()
        return self.workspace(self.library.qlora_layer_bytes(*kind, x.shape[0], *layout[:2], rank, threads))

    def _vector_matmul(
        self, x: Tensor, weight: list[Tensor], layout: list[int], row_scale: Tensor | None, transposed: bool
    ) -> Tensor:
        """x W't, or x W'."""
        x, tokens, threads = x.contiguous(), x.shape[0], torch.get_num_threads()
        y = self.empty(tokens, layout[0] if transposed else layout[1], dtype=x.dtype)
        kind = (self._by_integers(x), x.dtype == torch.bfloat16)
        begin = (as_argument(weight, layout), pointer(row_scale), *kind, x.data_ptr())
        work = self._vector_work(x, layout, 0).data_ptr()
        if transposed:
            nothing = [None] * 3
            self.library.qlora_layer_forward(
                *begin, tokens, *[None] * 4, False, 0, 1.0, work, *nothing, y.data_ptr(), threads
            )
        else:
            nothing = [None] * 5
            self.library.qlora_layer_backward(
                *begin, *nothing, tokens, 0, 1.0, None, work, y.data_ptr(), *[None] * 3, threads
            )
        return y

    def _vector_layer(
        self,
        x: Tensor,
        x_adapter: Tensor,
        A: Tensor,
        B: Tensor,
        m: Tensor | None,
        n: Tensor | None,
        scaling: float,
        weight: list[Tensor],
        layout: list[int],
    ) -> tuple[Tensor, ...]:
        """`adapted_linear` of contiguous operands that fit."""
        tokens, (rank, rows) = x.shape[0], (A.shape[0], B.shape[0])
        factors, m = A.new_empty(0 if m is None else 3, rows), None if m is None else m.contiguous()
        if m is not None and n is not None:
            factors[2] = n
        A_cast, B_scaled = torch.empty_like(A, dtype=x.dtype), torch.empty_like(B, dtype=x.dtype)
        y, xA = self.empty(tokens, rows, dtype=x.dtype), A.new_empty(tokens, rank)
        self.library.qlora_layer_forward(
            as_argument(weight, layout),
            None if m is None else factors.data_ptr(),
            self._by_integers(x),
            x.dtype == torch.bfloat16,
            x.data_ptr(),
            tokens,
            x_adapter.data_ptr(),
            A.data_ptr(),
            B.data_ptr(),
            pointer(m),
            m is not None and n is None,
            rank,
            scaling,
            self._vector_work(x, layout, rank).data_ptr(),
            A_cast.data_ptr(),
            B_scaled.data_ptr(),
            xA.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y, xA.to(x.dtype), A_cast, B_scaled, factors

    def _vector_backward(
        self,
        dy: Tensor,
        saved: list[Tensor],
        y: Tensor | None,
        scaling: float,
        weight: list[Tensor],
        layout: list[int],
        needs_x: bool,
    ) -> tuple[Tensor, ...]:
        """`adapted_linear_backward` of contiguous operands that fit."""
        x, *narrow, factors = saved
        xA, down, up = (part.float() for part in narrow)
        tokens, rank = xA.shape
        gain = factors.data_ptr() if factors.numel() else None
        dA, dB, dm = torch.empty_like(down), torch.empty_like(up), factors.new_empty(0 if y is None else layout[0])
        dx = self.empty(tokens, layout[1], dtype=dy.dtype) if needs_x else dy.new_empty(0)
        self.library.qlora_layer_backward(
            as_argument(weight, layout),
            gain,
            self._by_integers(dy),
            dy.dtype == torch.bfloat16,
            dy.data_ptr(),
            x.data_ptr(),
            down.data_ptr(),
            up.data_ptr(),
            xA.data_ptr(),
            pointer(y),
            tokens,
            rank,
            scaling,
            None if gain is None else gain + 4 * layout[0],
            self._vector_work(dy, layout, rank).data_ptr(),
            dx.data_ptr() if needs_x else None,
            dA.data_ptr(),
            dB.data_ptr(),
            dm.data_ptr(),
            torch.get_num_threads(),
        )
        return dx, dA, dB, dm

    # ---------------------------------------------------------------- a dense weight

    def supports_matmul_dense(self, x: Tensor, weight: Tensor) -> bool:
        """Whether these are multiplied faster than by torch: float32, by a weight in float32 or bf16."""
        return (
            (self._by_integers(x) or self.dense_in_float32)
            and x.dtype == torch.float32
            and weight.dtype in (torch.float32, torch.bfloat16)
            and x.shape[0] > 0
            and weight.shape[1] % 64 == 0
            and weight.is_contiguous()
        )

    def matmul_dense_into(self, out: Tensor, x: Tensor, weight: Tensor, transposed: bool) -> None:
        if not self.supports_matmul_dense(x, weight) or not out.is_contiguous() or out.dtype != x.dtype:
            return NotImplemented
        (rows, columns), tokens, threads = weight.shape, x.shape[0], torch.get_num_threads()
        inner, outer = (columns, rows) if transposed else (rows, columns)
        if x.shape != (tokens, inner) or out.shape != (tokens, outer):
            raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} for a weight of {rows} x {columns}")
        reference.mark_mutated(out)
        x = x.contiguous()
        by_integers = self._by_integers(x)
        work = self.workspace(self.library.qlora_dense_bytes(by_integers, threads))
        self.library.qlora_dense(
            by_integers,
            weight.data_ptr(),
            weight.dtype == torch.bfloat16,
            rows,
            columns,
            transposed,
            x.data_ptr(),
            tokens,
            work.data_ptr(),
            out.data_ptr(),
            threads,
        )
        return None

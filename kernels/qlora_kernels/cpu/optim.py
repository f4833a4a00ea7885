"""The native operators of subject `optim`: AdamW over pieces where they lie, the norm of all gradients, 8-bit codes
of moments.

AdamW is two passes around torch's own square root. That is MKL's, whose last bit depends on the processor (of 0.6 % of
all floats it is not that of the nearest one with AVX-512, of none with AVX2). The bits of all else in torch's AdamW are
known: a product and a sum are rounded together where torch has AVX2 or AVX-512, in its vectors and behind them. A run
of pieces stays in the cache from one pass to the next, so what lies in memory is read and written once, as one pass
would.
"""

from __future__ import annotations

import ctypes
import operator
from itertools import accumulate

import torch
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.cpu.binding import INTEGER, POINTER, SIZE, Subject, integers

FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # elsewhere torch does not, or it is not known


class OptimizerKernels(Subject):
    SIGNATURES = {
        "qlora_encode_blocks": [POINTER, SIZE, SIZE, INTEGER, POINTER, POINTER, INTEGER],
        "qlora_decode_blocks": [POINTER, POINTER, SIZE, SIZE, INTEGER, POINTER, INTEGER],
        "qlora_adamw": [*[POINTER] * 4, SIZE, SIZE, *[POINTER] * 3, INTEGER],
        "qlora_total_norm": [*[POINTER] * 3, *[SIZE] * 3, POINTER, POINTER, INTEGER],
    }

    def adamw_(
        self,
        p: list[Tensor],
        g: list[Tensor],
        at: list[int],
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        work: Tensor,
        numbers: list[float],
    ) -> None:
        n, sizes = exp_avg.numel(), [x.numel() for x in p]
        floats = all(x.dtype == torch.float32 and x.is_contiguous() for x in (*p, *g, exp_avg, exp_avg_sq, work))
        if not (floats and FUSES):
            return NotImplemented
        ends = [first + size for first, size in zip(at, sizes, strict=True)]
        if not (
            sizes == [x.numel() for x in g]
            and exp_avg_sq.numel() == n <= work.shape[1]
            and all(map(operator.le, (0, *ends), (*at, n)))
        ):
            raise ValueError(f"{len(p)} parameters of {sum(sizes)} elements at {list(at)[:9]}... of {n} moments")
        reference.mark_mutated(p)
        beta1, beta2, eps, decay, step_size, correction, scale = numbers
        step = (ctypes.c_float * 8)(1 - beta1, beta2, 1 - beta2, eps, decay, step_size, correction, scale)
        shared = (integers(at), integers(sizes), len(sizes), n, exp_avg.data_ptr(), exp_avg_sq.data_ptr())
        self.library.qlora_adamw(step, integers([x.data_ptr() for x in g]), *shared, None, torch.get_num_threads())
        root = torch.sqrt(exp_avg_sq, out=work[0, :n])
        self.library.qlora_adamw(
            step, integers([x.data_ptr() for x in p]), *shared, root.data_ptr(), torch.get_num_threads()
        )

    def total_norm(self, tensors: list[Tensor]) -> Tensor:
        if not all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors):
            return NotImplemented
        sizes = [x.numel() for x in tensors]
        *at, n = accumulate(sizes, initial=0)
        partial, out = torch.empty(n // 8192 + 1, dtype=torch.float64), torch.empty((), dtype=torch.float32)
        self.library.qlora_total_norm(
            integers([x.data_ptr() for x in tensors]),
            integers(at),
            integers(sizes),
            len(sizes),
            n,
            len(partial),
            partial.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def encode_blocks_into(
        self, codes: Tensor, absmax: Tensor, values: Tensor, work: Tensor, blocksize: int, signed: bool
    ) -> None:
        self._check_blocks(codes, absmax, values, blocksize)
        for out in (codes, absmax):
            reference.mark_mutated(out)
        self.library.qlora_encode_blocks(
            values.data_ptr(),
            values.numel(),
            blocksize,
            signed,
            codes.data_ptr(),
            absmax.data_ptr(),
            torch.get_num_threads(),
        )

    def decode_blocks_into(
        self, values: Tensor, codes: Tensor, absmax: Tensor, work: Tensor, blocksize: int, signed: bool
    ) -> None:
        self._check_blocks(codes, absmax, values, blocksize)
        reference.mark_mutated(values)
        self.library.qlora_decode_blocks(
            codes.data_ptr(),
            absmax.data_ptr(),
            values.numel(),
            blocksize,
            signed,
            values.data_ptr(),
            torch.get_num_threads(),
        )

    @staticmethod
    def _check_blocks(codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int) -> None:
        n = values.numel()
        fits = (
            codes.numel() == n == absmax.numel() * blocksize
            and codes.dtype == torch.uint8
            and values.dtype == absmax.dtype == torch.float32
        )
        if not (fits and all(t.is_contiguous() for t in (codes, absmax, values))):
            raise ValueError(
                f"{codes.numel()} codes and {absmax.numel()} maxima of blocks of {blocksize} for {n} values"
            )

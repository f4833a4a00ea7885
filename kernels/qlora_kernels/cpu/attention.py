"""Attention over the examples of a packed row: the native operators of subject `attention`, in bf16 on a CPU that
multiplies it, in float32 with AVX2 and AVX-512. Without a unit for bf16 it is computed in float32 and rounded.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise

import torch
from torch import Tensor

from qlora_kernels.cpu.binding import FLOAT, INTEGER, POINTER, SIZE, Subject, integers

WIDEST = 512  # elements of a head in float32: a row of them fits the rows that the kernels multiply


def longest_first(cu_seqlens: list[int]) -> tuple[ctypes.Array, ctypes.Array]:
    """Where the examples begin and how many tokens they have."""
    lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return integers([cu_seqlens[i] for i in order]), integers([lengths[i] for i in order])


class AttentionKernels(Subject):
    SIGNATURES = {
        "qlora_float_attention": [],
        "qlora_attention_bytes": [INTEGER, INTEGER, POINTER, *[SIZE] * 5, INTEGER],
        "qlora_attention": [INTEGER, INTEGER, *[POINTER] * 4, *[SIZE] * 5, FLOAT, POINTER, INTEGER],
    }
    RESULTS = {"qlora_attention_bytes": SIZE, "qlora_float_attention": INTEGER}

    attends_in_float32: bool

    def supports_attention(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether `attention` has a kernel for these: heads of one type and size."""
        if q.dtype == torch.bfloat16 and self.bf16_unit:
            kernel = True
        else:
            kernel = self.attends_in_float32 and q.shape[-1] <= WIDEST and q.dtype in (torch.float32, torch.bfloat16)
        return kernel and q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]

    def _is_widened(self, x: Tensor) -> bool:
        """Whether x is bf16 that no unit multiplies: kernels in float32 do."""
        return x.dtype == torch.bfloat16 and not self.bf16_unit

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], scale: float) -> tuple[Tensor, Tensor]:
        if not self.supports_attention(q, k, v):
            return NotImplemented
        if self._is_widened(q):
            out, lse = self.attention(q.float(), k.float(), v.float(), cu_seqlens, scale)
            return out.to(q.dtype), lse
        out, lse = self.empty_like(q), torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
        self._attention([q, k, v, out], lse, cu_seqlens, scale)
        return out, lse

    def attention_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: list[int],
        scale: float,
    ) -> tuple[Tensor, ...]:
        if not self.supports_attention(q, k, v):
            return NotImplemented
        alike = dout.shape == out.shape == q.shape and dout.dtype == out.dtype == q.dtype
        if not alike or (lse.shape, lse.dtype) != ((q.shape[1], q.shape[0]), torch.float32):
            shapes = f"gradient {tuple(dout.shape)}, result {tuple(out.shape)} and lse {tuple(lse.shape)}"
            raise ValueError(f"{shapes} for queries {tuple(q.shape)}")
        if self._is_widened(q):
            inputs = (q.float(), k.float(), v.float(), out.float())
            wide = self.attention_backward(dout.float(), *inputs, lse, cu_seqlens, scale)
            return tuple(gradient.to(q.dtype) for gradient in wide)
        gradients = tuple(map(self.empty_like, (q, k, v)))
        self._attention([dout, q, k, v, out, *gradients], lse.contiguous(), cu_seqlens, scale)
        return gradients

    def _attention(self, views: list[Tensor], lse: Tensor, cu_seqlens: list[int], scale: float) -> None:
        backward, floats = len(views) > 4, views[0].dtype == torch.float32
        q, k, v = views[backward : backward + 3]
        (tokens, heads, D), groups = q.shape, k.shape[1]
        threads = torch.get_num_threads()
        if k.shape != v.shape or k.shape != (tokens, groups, D) or heads % groups:
            raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}")
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or sorted(cu_seqlens) != list(cu_seqlens):
            raise ValueError(f"examples at {list(cu_seqlens)} of {tokens} tokens")
        if not tokens:
            return
        views = [x if x.stride(2) == 1 else x.contiguous() for x in views]  # kept here while the kernel reads them
        parts = [number for x in views for number in (x.data_ptr(), x.stride(0), x.stride(1))]
        starts, lengths = longest_first(cu_seqlens)
        shape = (len(lengths), tokens, heads, groups, D)
        work = self.workspace(self.library.qlora_attention_bytes(backward, floats, lengths, *shape, threads))
        self.library.qlora_attention(
            backward, floats, integers(parts), lse.data_ptr(), starts, lengths, *shape, scale, work.data_ptr(), threads
        )

"""Quantized weights on a CPU: the native operators of subject `nf4`."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.cpu.binding import BLOCKSIZES, DTYPES, INTEGER, POINTER, SIZE, WEIGHT, Subject, as_argument, readable


class NF4Kernels(Subject):
    SIGNATURES = {
        "qlora_supports_levels": [POINTER],
        "qlora_quantize_4bit": [POINTER, INTEGER, SIZE, SIZE, POINTER, POINTER, POINTER, INTEGER],
        "qlora_encode_4bit": [POINTER, INTEGER, SIZE, SIZE, POINTER, POINTER, POINTER, INTEGER],
        "qlora_fit_scales_4bit": [POINTER, INTEGER, SIZE, SIZE, POINTER, POINTER, INTEGER],
        "qlora_quantize_absmax": [POINTER, POINTER, SIZE, SIZE, POINTER, POINTER, INTEGER],
        "qlora_dequantize_4bit": [WEIGHT, INTEGER, POINTER, INTEGER, INTEGER],
    }
    RESULTS = {"qlora_supports_levels": INTEGER}

    def _quantizes(self, weight: Tensor, levels: Tensor, blocksize: int) -> bool:
        """Whether there is a kernel for this weight and format."""
        return (
            weight.dtype in DTYPES
            and blocksize in BLOCKSIZES
            and levels.dtype == torch.float32
            and levels.is_contiguous()
            and levels.numel() == 16
            and bool(self.library.qlora_supports_levels(levels.data_ptr()))
        )

    def quantize_4bit(self, weight: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        if not self._quantizes(weight, levels, blocksize):
            return NotImplemented
        weight = weight.contiguous()
        n = weight.numel()
        packed = self.empty_on_huge_pages((n + 1) // 2, 1, dtype=torch.uint8)
        absmax = torch.empty(-(-n // blocksize), dtype=torch.float32)
        self.library.qlora_quantize_4bit(
            weight.data_ptr(),
            DTYPES[weight.dtype],
            n,
            blocksize,
            levels.data_ptr(),
            packed.data_ptr(),
            absmax.data_ptr(),
            torch.get_num_threads(),
        )
        return packed, absmax

    def fit_scales_4bit(self, weight: Tensor, levels: Tensor, blocksize: int) -> Tensor:
        if not self._quantizes(weight, levels, blocksize):
            return NotImplemented
        weight = weight.contiguous()
        scales = torch.empty(-(-weight.numel() // blocksize), dtype=torch.float32)
        self.library.qlora_fit_scales_4bit(
            weight.data_ptr(),
            DTYPES[weight.dtype],
            weight.numel(),
            blocksize,
            levels.data_ptr(),
            scales.data_ptr(),
            torch.get_num_threads(),
        )
        return scales

    def encode_4bit(self, weight: Tensor, levels: Tensor, scales: Tensor, blocksize: int) -> Tensor:
        n = weight.numel()
        if not self._quantizes(weight, levels, blocksize) or scales.dtype != torch.float32:
            return NotImplemented
        if scales.numel() != -(-n // blocksize):
            raise ValueError(f"{scales.numel()} scales for {-(-n // blocksize)} blocks")
        weight, scales = weight.contiguous(), scales.contiguous()
        packed = self.empty_on_huge_pages((n + 1) // 2, 1, dtype=torch.uint8)
        self.library.qlora_encode_4bit(
            weight.data_ptr(),
            DTYPES[weight.dtype],
            n,
            blocksize,
            levels.data_ptr(),
            scales.data_ptr(),
            packed.data_ptr(),
            torch.get_num_threads(),
        )
        return packed

    def quantize_absmax(self, absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
        if absmax.dtype != torch.float32 or absmax.dim() != 1:
            return NotImplemented
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

    def dequantize_4bit(
        self, weight: list[Tensor], layout: list[int], row_scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if dtype not in DTYPES:
            return NotImplemented
        out = self.empty_on_huge_pages(layout[0], layout[1], dtype=dtype)
        return out if self._decode(out, weight, layout, row_scale, fresh=True) else NotImplemented

    def dequantize_4bit_into(
        self, out: Tensor, weight: list[Tensor], layout: list[int], row_scale: Tensor | None
    ) -> None:
        if not self._decode(out, weight, layout, row_scale):
            return NotImplemented
        return None

    def _decode(
        self, out: Tensor, weight: list[Tensor], layout: list[int], row_scale: Tensor | None, fresh: bool = False
    ) -> bool:
        """Decode to `out`, whose memory has just been allocated if `fresh`; whether there is a kernel for it."""
        if out.dtype not in DTYPES or not out.is_contiguous() or not readable(weight, layout, out.device):
            return False
        if list(out.shape) != layout[:2]:
            raise ValueError(f"out {tuple(out.shape)} for a weight of {layout[0]} x {layout[1]}")
        if row_scale is not None:
            if row_scale.numel() != layout[0]:
                raise ValueError(f"row_scale holds {row_scale.numel()} values for {layout[0]} rows")
            row_scale = row_scale.float().contiguous()
        reference.mark_mutated(out)
        self.library.qlora_dequantize_4bit(
            as_argument(weight, layout, row_scale), DTYPES[out.dtype], out.data_ptr(), fresh, torch.get_num_threads()
        )
        return True

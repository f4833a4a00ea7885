"""The one view that the mathematics of layers has of a frozen weight: its shape, its products, its values for a moment.

    dense      a matrix [out, in] in 16 or 32 bits
    quantized  a `qlora_kernels.weight.QuantizedWeight`: decoded for the time of one product, or in the product itself

A gain per row costs nothing on a quantized weight, whose rows are scaled anyway as they are decoded (the row fold of
`adapters`). The alternative, a tensor subclass, hides the decoding inside every torch function and makes `.to()`,
`state_dict` and compile each a special case.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlora.layers import nf4
from qlora_kernels import backends, ops
from qlora_kernels.weight import QuantizedWeight

# On a CPU one decoded weight at a time, grown to the largest layer. A thread has its own, so that concurrent forwards
# do not meet.
_scratch = threading.local()

WIDENED = 4096  # rows of a weight in 16 bits that are made float32 at a time


def _buffers() -> dict[tuple[torch.device, torch.dtype], Tensor]:
    """This thread's scratch memory."""
    buffers: dict[tuple[torch.device, torch.dtype], Tensor] = _scratch.__dict__.setdefault("buffers", {})
    return buffers


def forget_scratch(device: str) -> None:
    """Give this thread's scratch memory on a type of device back."""
    buffers = _buffers()
    for key in [key for key in buffers if key[0].type == device]:
        del buffers[key]


class FrozenWeight:
    """The values [out, in] of a base layer. A layer makes its view once, see `linear.frozen_weight`.

    Attributes:
        quantized: the quantized weight, or None.
        shape: (out, in).
        joined: what `layers.joined` keeps of this weight and those beside it.
    """

    __slots__ = ("_dense", "_whole_blocks", "joined", "quantized", "shape")

    def __init__(self, weight: QuantizedWeight | Tensor):
        self.quantized: QuantizedWeight | None = weight if isinstance(weight, QuantizedWeight) else None
        self._dense = weight.detach() if isinstance(weight, Tensor) else None
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.joined: Any = None
        self._whole_blocks = isinstance(weight, QuantizedWeight) and self.shape[1] % weight.blocksize == 0  # in a row

    @property
    def device(self) -> torch.device:
        return self.dense_weight.device if self.quantized is None else self.quantized.device

    @property
    def dense_weight(self) -> Tensor:
        """The matrix [out, in] of a weight that is not quantized: a detached view that shares its memory."""
        assert self._dense is not None, "quantized"
        return self._dense

    @property
    def operands(self) -> tuple[list[Tensor], list[int]]:
        """A quantized weight as the operators take it: parts and layout."""
        assert self.quantized is not None, "not quantized"
        return self.quantized.parts, self.quantized.layout

    def dense(self, dtype: torch.dtype, row_scale: Tensor | None = None) -> Tensor:
        """W in `dtype`; of a quantized weight also diag(row_scale) W."""
        if self.quantized is not None:
            return nf4.dequantize(self.quantized, dtype, row_scale)
        assert row_scale is None
        return self.dense_weight.to(dtype)

    def scratch(self, dtype: torch.dtype, row_scale: Tensor | None = None) -> Tensor:
        """As `dense`, but in memory that all layers of a thread share: use it up before the next call, never keep it.

        On a GPU torch's allocator does that by itself: what is freed is given out again in the order of the stream, to
        whichever thread (backward passes run in one of their own, which would have a second buffer), so there it is
        `dense`.
        """
        if self.quantized is None or backends.kind_of(self.device) == "cuda":
            return self.dense(dtype, row_scale)
        n, key = self.shape[0] * self.shape[1], (self.device, dtype)
        buffers = _buffers()
        if key not in buffers or buffers[key].numel() < n:
            buffers.pop(key, None)  # before there is another
            dense = self.dense(dtype, row_scale)  # allocated by the kernel, which asks for huge pages
            buffers[key] = dense.view(-1)
            return dense
        return nf4.dequantize_into(buffers[key][:n].view(self.shape), self.quantized, row_scale)

    def uses_gemv(self, x: Tensor) -> bool:
        """Whether `gemv` is the way to multiply with x: a single token, nothing to learn, and a kernel that decodes on
        the fly.
        """
        if torch.is_grad_enabled() or self.quantized is None:
            return False
        return x.numel() == self.shape[1] and backends.has_gemv(x.device)

    def gemv(self, x: Tensor) -> Tensor:
        """W x [out] in float32, for x [in]: the quantized weight is read once, four bits a value, and never written
        out.
        """
        return ops.gemv_4bit(x, *self.operands)

    def supports_fused_gemm(self, x: Tensor) -> bool:
        """Whether a kernel decodes this weight as it multiplies with `x`; elsewhere it is made dense for the usual
        product.
        """
        w = self.quantized
        return w is not None and backends.supports_fused_gemm(x, w.parts, w.layout)

    def has_operands(self, x: Tensor) -> bool:
        """Whether `ops.adapted_operands` makes all that the product of an adapted layer with x takes: in one operator,
        where the host's time counts.
        """
        return self._whole_blocks and backends.has_operands(x.device)

    def matmul(self, x: Tensor, transposed: bool, row_scale: Tensor | None = None) -> Tensor:
        """x W't, or x W' if not `transposed`, of a matrix x, W' = diag(row_scale) W."""
        if self.supports_fused_gemm(x):
            return ops.matmul_4bit(x, *self.operands, row_scale, transposed)
        if backends.is_widened(x):
            return self.matmul(x.float(), transposed, row_scale).to(x.dtype)
        dense = self.scratch(x.dtype, row_scale)
        return matmul(x, dense.t() if transposed else dense)

    def chunks(self, dtype: torch.dtype = torch.float32, elements: int = 1 << 22) -> Iterator[tuple[slice, Tensor]]:
        """(rows, W[rows] in `dtype`) in chunks of about `elements` values: a whole weight is never held in float32."""
        out, columns = self.shape
        quantized = self.quantized
        step = max(1, elements // columns) if quantized is None else nf4.row_chunk(quantized, elements)
        for start in range(0, out, step):
            part = slice(start, min(start + step, out))
            if quantized is None:
                yield part, self.dense_weight[part].to(dtype)
            else:
                yield part, nf4.dequantize(nf4.rows(quantized, part.start, part.stop), dtype)


def matmul(x: Tensor, w: Tensor, onto: Tensor | None = None) -> Tensor:
    """x w of matrices [rows, k] and [k, columns], or `onto` += x w.

    oneDNN on a CPU gives bf16 products of somewhat more rows than columns to a single thread (rows in [columns,
    2 columns), columns from 448 to 1024; docs/log.md). Half of the rows at a time, both threads work.
    """
    rows, columns = x.shape[0], w.shape[1]
    one_thread = x.dtype == torch.bfloat16 and 448 <= columns <= 1024 and columns <= rows < 2 * columns
    if not one_thread or x.device.type != "cpu":
        return torch.mm(x, w) if onto is None else onto.addmm_(x, w)
    out = onto if onto is not None else x.new_empty(rows, columns)
    half = -(-rows // 2)
    for part in (slice(0, half), slice(half, rows)):
        if onto is None:
            torch.mm(x[part], w, out=out[part])
        else:
            out[part].addmm_(x[part], w)
    return out


def multiply_frozen(out: Tensor, x: Tensor, weight: Tensor, transposed: bool) -> None:
    """x W^T, or x W, to `out`, of a frozen dense W, such as a head's. Where no kernel of ours takes them and a W in 16
    bits meets float32 (`backends.is_widened`), a few rows at a time are made float32.
    """
    if backends.supports_matmul_dense(x, weight):
        ops.matmul_dense_into(out, x, weight, transposed)
    elif x.dtype == weight.dtype:
        torch.mm(x, weight.t() if transposed else weight, out=out)
    else:
        for start in range(0, weight.shape[0], WIDENED):
            rows = slice(start, start + WIDENED)
            W = weight[rows].to(x.dtype)
            if transposed:
                out[:, rows] = x @ W.t()
            elif start == 0:
                torch.mm(x[:, rows], W, out=out)
            else:
                out.addmm_(x[:, rows], W)

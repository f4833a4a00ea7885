"""What lies between the products of a layer, on a CPU: the native operators of subject `step`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.cpu.binding import DTYPES, FLOAT, INTEGER, POINTER, SIZE, Subject, pointer


class StepKernels(Subject):
    SIGNATURES = {
        "qlora_cross_entropy": [INTEGER, POINTER, POINTER, SIZE, SIZE, POINTER, INTEGER],
        "qlora_rms_norm": [INTEGER, *[POINTER] * 3, SIZE, SIZE, FLOAT, *[POINTER] * 3, INTEGER],
        "qlora_rms_norm_backward": [INTEGER, *[POINTER] * 4, SIZE, SIZE, POINTER, POINTER, INTEGER],
        "qlora_add": [INTEGER, POINTER, POINTER, SIZE, POINTER, INTEGER],
        "qlora_swiglu": [INTEGER, POINTER, POINTER, SIZE, POINTER, INTEGER],
        "qlora_swiglu_backward": [INTEGER, *[POINTER] * 3, SIZE, POINTER, POINTER, INTEGER],
        "qlora_swiglu_backward_dots": [INTEGER, *[POINTER] * 3, SIZE, SIZE, *[POINTER] * 4, INTEGER],
        "qlora_geglu": [INTEGER, POINTER, POINTER, SIZE, POINTER, INTEGER],
        "qlora_geglu_backward": [INTEGER, *[POINTER] * 3, SIZE, POINTER, POINTER, INTEGER],
        "qlora_rotate": [
            INTEGER,
            INTEGER,
            *[POINTER, SIZE, SIZE] * 2,
            SIZE,
            SIZE,
            POINTER,
            POINTER,
            SIZE,
            POINTER,
            POINTER,
            INTEGER,
        ],
    }

    def cross_entropy_(self, logits: Tensor, targets: Tensor) -> Tensor:
        rows, columns = logits.shape
        if logits.dtype not in DTYPES or not logits.is_contiguous() or targets.dtype != torch.int64:
            return NotImplemented
        if targets.shape != (rows,) or (rows and not (0 <= targets.min() and targets.max() < columns)):
            found = f"{tuple(targets.shape)} targets from {targets.min()} to {targets.max()}"
            raise IndexError(f"{found} for logits {tuple(logits.shape)}")
        reference.mark_mutated(logits)
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
            return NotImplemented
        return self._normalized(x.contiguous(), None, None, weight, eps)

    def add_rms_norm(self, x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        alike = weight.dtype == more.dtype == x.dtype and more.shape == x.shape and weight.shape == x.shape[1:]
        if x.dtype not in DTYPES or not alike or not x.numel():
            return NotImplemented
        sums = self.empty_like(x)
        return sums, *self._normalized(x.contiguous(), more.contiguous(), sums, weight, eps)

    def _normalized(
        self, x: Tensor, more: Tensor | None, sums: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        weight = weight.contiguous()
        y, inverse = self.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32)
        self.library.qlora_rms_norm(
            DTYPES[x.dtype],
            x.data_ptr(),
            pointer(more),
            weight.data_ptr(),
            *x.shape,
            eps,
            pointer(sums),
            y.data_ptr(),
            inverse.data_ptr(),
            torch.get_num_threads(),
        )
        return y, inverse

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        return self._normalized_backward(dy, x, weight, inverse, None)

    def rms_norm_backward_add(self, dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, onto: Tensor) -> Tensor:
        if onto.dtype != x.dtype or onto.shape != x.shape:
            return NotImplemented
        return self._normalized_backward(dy, x, weight, inverse, onto.contiguous())

    def _normalized_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, onto: Tensor | None
    ) -> Tensor:
        alike = dy.dtype == weight.dtype == x.dtype and dy.shape == x.shape and weight.shape == x.shape[1:]
        if x.dtype not in DTYPES or not alike or not x.numel():
            return NotImplemented
        dy, x, weight, inverse = (part.contiguous() for part in (dy, x, weight, inverse))
        dx = self.empty_like(x)
        self.library.qlora_rms_norm_backward(
            DTYPES[x.dtype],
            dy.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            inverse.data_ptr(),
            *x.shape,
            pointer(onto),
            dx.data_ptr(),
            torch.get_num_threads(),
        )
        return dx

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._gated(self.library.qlora_swiglu, gate, up)

    def geglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._gated(self.library.qlora_geglu, gate, up)

    def _gated(self, kernel: Callable, gate: Tensor, up: Tensor) -> Tensor:
        if gate.dtype not in DTYPES or up.dtype != gate.dtype or up.shape != gate.shape:
            return NotImplemented
        gate, up = gate.contiguous(), up.contiguous()
        y = self.empty_like(gate)
        kernel(DTYPES[gate.dtype], gate.data_ptr(), up.data_ptr(), gate.numel(), y.data_ptr(), torch.get_num_threads())
        return y

    def swiglu_backward(self, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return self._gated_backward(self.library.qlora_swiglu_backward, dy, gate, up)

    def geglu_backward(self, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return self._gated_backward(self.library.qlora_geglu_backward, dy, gate, up)

    def _gated_backward(self, kernel: Callable, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if gate.dtype not in DTYPES or not dy.dtype == up.dtype == gate.dtype or not dy.shape == up.shape == gate.shape:
            return NotImplemented
        dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
        dgate, dup = self.empty_like(gate), self.empty_like(up)
        kernel(
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
        alike = dy.dtype == up.dtype == gate.dtype and dy.shape == up.shape == gate.shape
        if gate.dtype not in DTYPES or not alike or gate.dim() != 2:
            return NotImplemented
        dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
        rows, columns = gate.shape
        dgate, dup, dots = self.empty_like(gate), self.empty_like(up), torch.empty(2, columns, dtype=torch.float32)
        partial = self.partial_sums(rows, 2 * columns)
        self.library.qlora_swiglu_backward_dots(
            DTYPES[gate.dtype],
            dy.data_ptr(),
            gate.data_ptr(),
            up.data_ptr(),
            rows,
            columns,
            dgate.data_ptr(),
            dup.data_ptr(),
            pointer(partial),
            dots.data_ptr(),
            torch.get_num_threads(),
        )
        return dgate, dup, dots

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotate(q, k, cos, sin, 0)

    def rotate_backward(self, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotate(dq, dk, cos, sin, 1)

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: int) -> tuple[Tensor, Tensor]:
        (tokens, heads, D), groups, positions = q.shape, k.shape[1], cos.shape[0]
        alike = k.dtype == cos.dtype == sin.dtype == q.dtype
        if q.dtype not in DTYPES or not alike or D % 2 or not q.numel() or not k.numel():
            return NotImplemented
        tables = cos.shape == sin.shape == (positions, D) and positions and tokens % positions == 0
        if k.shape != (tokens, groups, D) or not tables:
            raise ValueError(
                f"queries {tuple(q.shape)} and keys {tuple(k.shape)} turned by {tuple(cos.shape)}, {tuple(sin.shape)}"
            )
        q, k = (x if x.stride()[1:] == (D, 1) else x.contiguous() for x in (q, k))
        cos, sin = cos.contiguous(), sin.contiguous()
        turned = self.empty_like(q), self.empty_like(k)
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

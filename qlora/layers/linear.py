"""Linear layers over a frozen weight that may be NF4.

    y = x Wt + bias        dx = dy W        (W is frozen: nothing flows into it)

`FrozenWeight` is the one view that the mathematics of `adapters.py` has of a base layer: its shape, and its dense
values for the time of one product. `NF4Linear` keeps the packed codes as buffers; its autograd Function remembers the
codes, never a dense weight, and decodes again in the backward pass. The alternative, a tensor subclass, hides the
decoding inside every torch function and made `.to()`, `state_dict` and compile each a special case; plain buffers need
one: `_apply` must not cast the float32 constants when a model is cast to bfloat16.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from qlora.layers import nf4
from qlora.layers.weight import NF4Weight
from qlora_kernels import ops


class NF4Linear(nn.Module):
    """`nn.Linear` with a frozen NF4 weight. Input [..., in], output [..., out] in the input's dtype."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, blocksize: int = 64, double_quant: bool = True
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.blocksize = blocksize
        elements = in_features * out_features
        blocks = -(-elements // blocksize)
        self.register_buffer("weight", torch.empty((elements + 1) // 2, 1, dtype=torch.uint8))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32))
        nested = -(-blocks // nf4.NESTED_BLOCKSIZE)
        self.register_buffer("nested_absmax", torch.empty(nested) if double_quant else None)
        self.register_buffer("nested_offset", torch.empty(()) if double_quant else None)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @property
    def nf4(self) -> NF4Weight:
        """The weight; shares the buffers' memory."""
        parts = self._buffers  # every layer asks twice a step, so it goes past `Module.__getattr__`
        shape = (self.out_features, self.in_features)
        return NF4Weight(
            parts["weight"], parts["absmax"], parts["nested_absmax"], parts["nested_offset"], shape, self.blocksize
        )

    @nf4.setter
    def nf4(self, weight: NF4Weight) -> None:
        self.weight, self.absmax = weight.packed, weight.absmax
        self.nested_absmax, self.nested_offset = weight.nested_absmax, weight.nested_offset
        self.blocksize = weight.blocksize

    def _apply(self, fn, recurse: bool = True):
        # `model.to(bfloat16)` casts floating buffers. The constants must stay float32, so they pass through as bytes.
        constants = {name: b for name, b in self._buffers.items() if b is not None and b.dtype == torch.float32}
        for name, buffer in constants.items():
            self._buffers[name] = buffer.reshape(-1).view(torch.uint8)
        super()._apply(fn, recurse)
        for name, buffer in constants.items():
            self._buffers[name] = self._buffers[name].view(torch.float32).view(buffer.shape)
        return self

    def forward(self, x: Tensor) -> Tensor:
        x, weight = autocast(x), FrozenWeight(self)
        if weight.takes_one_token(x):
            y = weight.times(x.reshape(-1))
            y = y if self.bias is None else y + self.bias
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        return _FrozenProduct.apply(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, blocksize={self.blocksize}"


# On a CPU one decoded weight at a time, grown to the largest layer. A thread has its own, so that concurrent forwards
# do not meet.
_scratch = threading.local()


def forget_scratch(device: str) -> None:
    """Give this thread's scratch memory on a device back."""
    for key in [key for key in _scratch.__dict__ if key[0].type == device]:
        del _scratch.__dict__[key]


class FrozenWeight:
    """The dense values [out, in] of a base layer: `nn.Linear`, `NF4Linear`, or GPT-2's `Conv1D`, which stores them
    transposed.

    Also of a weight without a layer: an `NF4Weight`, or a matrix [out, in].
    """

    def __init__(self, layer: nn.Module | NF4Weight | Tensor):
        self.nf4 = layer.nf4 if isinstance(layer, NF4Linear) else layer if isinstance(layer, NF4Weight) else None
        if self.nf4 is not None:
            self.shape = self.nf4.shape
        else:
            weight = layer if isinstance(layer, Tensor) else layer.weight.detach()
            self.weight = weight.t() if isinstance(layer, Conv1D) else weight
            self.shape = (self.weight.shape[0], self.weight.shape[1])

    @property
    def device(self) -> torch.device:
        return self.weight.device if self.nf4 is None else self.nf4.packed.device

    @property
    def folds(self) -> bool:
        """Whether a gain per row costs nothing: NF4, where decoding multiplies by a scale anyway."""
        return self.nf4 is not None

    def dense(self, dtype: torch.dtype, row_gain: Tensor | None = None) -> Tensor:
        """W, or diag(row_gain) W where `folds`, in `dtype`."""
        if self.nf4 is not None:
            return nf4.dequantize(self.nf4, dtype, row_gain)
        assert row_gain is None
        return self.weight.to(dtype)

    def scratch(self, dtype: torch.dtype, row_gain: Tensor | None = None) -> Tensor:
        """As `dense`, but in memory that all layers of a thread share: use it up before the next call, never keep it.

        On a GPU torch's allocator does that by itself: what is freed is given out again in the order of the stream, to
        whichever thread (backward passes run in one of their own, which would have a second buffer), so there it is
        `dense`.
        """
        if self.nf4 is None or self.device.type == "cuda":
            return self.dense(dtype, row_gain)
        n, key = self.shape[0] * self.shape[1], (self.device, dtype)
        buffers = _scratch.__dict__
        if key not in buffers or buffers[key].numel() < n:
            buffers.pop(key, None)  # before there is another
            dense = self.dense(dtype, row_gain)  # allocated by the kernel, which asks for huge pages
            buffers[key] = dense.view(-1)
            return dense
        return nf4.dequantize_into(buffers[key][:n].view(self.shape), self.nf4, row_gain)

    def takes_one_token(self, x: Tensor) -> bool:
        """Whether `times` is the way to multiply with x: a single token, nothing to learn, and a kernel that decodes on
        the fly.
        """
        return (
            self.nf4 is not None
            and x.numel() == self.shape[1]
            and not torch.is_grad_enabled()
            and ops.multiplies_a_vector(x.device)
        )

    def times(self, x: Tensor) -> Tensor:
        """W x [out] in float32, for x [in]: an NF4 weight is read once, four bits a value, and never written out."""
        return ops.nf4_gemv(x, *self.parts())

    def multiplies(self, x: Tensor) -> bool:
        """Whether a kernel decodes this weight as it multiplies with `x`; elsewhere it is made dense for the usual
        product.
        """
        return self.nf4 is not None and ops.multiplies(x, *self.parts())

    def parts(self) -> tuple:
        """An NF4 weight as the operators take it."""
        w = self.nf4
        return (w.packed, w.absmax, w.nested_absmax, w.nested_offset, *w.shape, w.blocksize, w.nested_blocksize)

    def product(self, x: Tensor, transposed: bool, row_gain: Tensor | None = None) -> Tensor:
        """x W't, or x W' if not `transposed`, of a matrix x, W' = diag(row_gain) W."""
        if self.multiplies(x):
            *constants, rows, columns, blocksize, nested_blocksize = self.parts()
            return ops.nf4_product(x, *constants, row_gain, rows, columns, blocksize, nested_blocksize, transposed)
        dense = self.scratch(x.dtype, row_gain)
        return product(x, dense.t() if transposed else dense)

    def chunks(self, dtype: torch.dtype = torch.float32, elements: int = 1 << 22) -> Iterator[tuple[slice, Tensor]]:
        """(rows, W[rows] in `dtype`) in chunks of about `elements` values: a whole weight is never held in float32."""
        out, columns = self.shape
        step = nf4.row_chunk(self.nf4, elements) if self.nf4 is not None else max(1, elements // columns)
        for start in range(0, out, step):
            part = slice(start, min(start + step, out))
            if self.nf4 is not None:
                yield part, nf4.dequantize(nf4.rows(self.nf4, part.start, part.stop), dtype)
            else:
                yield part, self.weight[part].to(dtype)


def product(x: Tensor, w: Tensor, onto: Tensor | None = None) -> Tensor:
    """x w of matrices [rows, k] and [k, columns], or `onto` += x w.

    oneDNN on a CPU gives bf16 products of somewhat more rows than columns to a single thread (seen on two cores with
    AMX: rows in [columns, 2 columns), columns from 448 to 1024; half the speed). Half of the rows at a time, both
    threads work.
    """
    rows, columns = x.shape[0], w.shape[1]
    out = onto if onto is not None else x.new_empty(rows, columns)
    halves = (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and 448 <= columns <= 1024
        and columns <= rows < 2 * columns
    )
    for part in (slice(0, -(-rows // 2)), slice(-(-rows // 2), rows)) if halves else (slice(None),):
        if onto is None:
            torch.mm(x[part], w, out=out[part])
        else:
            out[part].addmm_(x[part], w)
    return out


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = weight.product(x.reshape(-1, x.shape[-1]), transposed=True)
        y = y if bias is None else y.add_(bias.to(x.dtype))
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.weight.product(dy.reshape(-1, dy.shape[-1]), transposed=False).view(*dy.shape[:-1], -1)
        return dx, None, None


def autocast(x: Tensor) -> Tensor:
    """`x` in the autocast dtype where autocast is on (custom Functions are not on its list), else unchanged."""
    kind = x.device.type
    if kind == "meta":  # knows no autocast; `plan` runs the layers there
        return x
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

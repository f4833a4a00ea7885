"""A decoder layer of adapted projections on a CPU, in one call each way (csrc/api_decoder.cpp).

    h = x + o(attention(turned q(n), turned k(n), v(n)))    n = norm(x)
    y = h + down(silu(gate(n')) up(n'))                     n' = norm'(h)

It is no operator of its own, but those of its parts in turn, as one call: of each the bits are the same. Values are in
float32 or bf16; not where AMX multiplies bf16, whose layers have calls of another kind.

What the backward pass needs lies in one piece of memory, and what passes in a second. The alternative, a tensor for
each, is 40 objects of Python a layer and step, which the kernels meanwhile drive out of the caches.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from qlora_kernels.cpu.attention import AttentionKernels, longest_first
from qlora_kernels.cpu.binding import POINTER, SIZE, addresses, sizes
from qlora_kernels.cpu.layer import LayerKernels

# `Decoder` of api_decoder.cpp: sizes and constants, where things lie, and seven projections.
PACKED = struct.Struct("=" + "11q5d6q" + "7q" + 7 * "15qd4q")
QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN = range(7)  # projections, in their order


@dataclass(slots=True)
class Projection:
    """An adapted layer as it is now.

    Attributes:
        weight, layout: of `QuantizedWeight`, [out, in].
        A, B, m: [rank, in], [out, rank], and [out] or None, in float32.
        n: [out] where it is known; else it is made of A, B and the weight.
        bias: [out] or None; q, k and v may have one.
    """

    weight: list[Tensor]
    layout: list[int]
    A: Tensor
    B: Tensor
    m: Tensor | None
    n: Tensor | None
    bias: Tensor | None
    scaling: float


@dataclass(slots=True)
class Norm:
    """A frozen RMSNorm: its weight [width] and epsilon."""

    weight: Tensor
    eps: float


@dataclass(slots=True)
class Layer:
    """A decoder layer and its place in the batch.

    Attributes:
        norms: before the attention, before the MLP, of the heads of q and of those of k; these may be None.
        projections: q, k, v, o, gate, up, down.
        head: elements of a head.
        cos, sin: [tokens, head].
        cu_seqlens, scale: as of `ops.attention`.
    """

    norms: tuple[Norm, Norm, Norm | None, Norm | None]
    projections: list[Projection]
    head: int
    cos: Tensor
    sin: Tensor
    cu_seqlens: list[int]
    scale: float


@dataclass(slots=True)
class Places:
    """Addresses of what a pass reads and writes; 0 where it has none."""

    x: int = 0
    y: int = 0
    dy: int = 0
    dx: int = 0
    kept: int = 0
    passing: int = 0
    work: int = 0
    factors: int = 0
    gradients: Sequence[int] = (0,) * 21  # dA, dB and dm of each projection


@dataclass(slots=True)
class Call:
    """What both passes of a layer tell the library, but for where things lie."""

    layer: Layer
    numbers: tuple[int, ...]
    examples: tuple[ctypes.Array, ctypes.Array]  # starts and lengths; `numbers` has their addresses
    room: ctypes.Array  # bytes of what is kept, of what passes forward and backward, and of work

    def packed(self, at: Places) -> bytes:
        """`Decoder` of api_decoder.cpp; what its addresses lead to must outlive the call."""
        layer, norms = self.layer, self.layer.norms
        constants = *(None if norm is None else norm.weight for norm in norms), layer.cos, layer.sin
        fields: list[float] = [*self.numbers, layer.scale, *(0.0 if norm is None else norm.eps for norm in norms)]
        fields += [_address(one) for one in constants]
        fields += (at.x, at.y, at.dy, at.dx, at.kept, at.passing, at.work)
        for i, (part, start) in enumerate(zip(layer.projections, _starts(layer), strict=True)):
            factors = 0 if part.m is None else at.factors + 4 * start
            fields += (*_constants(part), factors, *at.gradients[3 * i : 3 * i + 3])
        return PACKED.pack(*fields)


class DecoderKernels(LayerKernels, AttentionKernels):
    SIGNATURES = {
        "qlora_decoder_bytes": [ctypes.c_char_p, POINTER],
        "qlora_decoder_forward": [ctypes.c_char_p],
        "qlora_decoder_backward": [ctypes.c_char_p],
    }

    def has_decoder_layer(self, x: Tensor) -> bool:
        """Whether any layer of x [..., width] is one call by this instruction set."""
        by_us = self.layers > 0 and x.dtype in (torch.float32, torch.bfloat16) and not self._on_amx(x)
        return by_us and (self.attends_in_float32 or (x.dtype == torch.bfloat16 and self.bf16_unit != ""))

    def supports_decoder_layer(self, x: Tensor, layer: Layer) -> bool:
        """Whether the library computes `layer` of x [tokens, width] in one call."""
        (tokens, width), parts = x.shape, layer.projections
        queries, keys, inner = (parts[i].layout[0] for i in (QUERY, KEY, GATE))
        shapes = [
            (queries, width),
            (keys, width),
            (keys, width),
            (width, queries),
            *[(inner, width)] * 2,
            (width, inner),
        ]
        before, behind, *of_heads = layer.norms
        normed = any(norm is not None for norm in of_heads)
        edges, heads = layer.cu_seqlens, (tokens, queries // layer.head, layer.head)
        return (
            self.has_decoder_layer(x)
            and tokens > 0
            and x.is_contiguous()
            and all(_is(norm.weight, x.dtype, (width,)) for norm in (before, behind))
            and all(norm is not None and _is(norm.weight, x.dtype, (layer.head,)) for norm in of_heads if normed)
            and all(_is(part, x.dtype, (tokens, layer.head)) for part in (layer.cos, layer.sin))
            and all(part.bias is None for part in (parts if normed else parts[OUTPUT:]))
            and queries % layer.head == keys % layer.head == layer.head % 2 == 0 < keys
            and queries % keys == 0
            and edges[0] == 0
            and edges[-1] == tokens
            and all(start <= stop for start, stop in pairwise(edges))
            and self._attends(x, heads)
            and all(self._fits(x, part, shape) for part, shape in zip(parts, shapes, strict=True))
            and len({part.m is None for part in parts[GATE:DOWN]}) == 1
        )

    def _attends(self, x: Tensor, heads: tuple[int, int, int]) -> bool:
        q = x[:, : heads[2]].unsqueeze(1)
        return self.supports_attention(q, q, q)

    def _fits(self, x: Tensor, part: Projection, shape: tuple[int, int]) -> bool:
        (rows, columns), rank = shape, part.A.shape[0]
        return (
            part.layout[0] == rows
            and part.layout[1] == columns
            and rank > 0
            and _is(part.A, torch.float32, (rank, columns))
            and _is(part.B, torch.float32, (rows, rank))
            and (part.m is None or _is(part.m, torch.float32, (rows,)))
            and (part.n is None or _is(part.n, torch.float32, (rows,)))
            and (part.bias is None or _is(part.bias, x.dtype, (rows,)))
            and self.supports_fused_gemm(x, part.weight, part.layout)
        )

    def decoder_layer(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor | None, Call]:
        """y [tokens, width] of x; what the backward pass needs; and the factors of DoRA: g, the m that is safe to
        divide by, and n of each projection that has an m, one after the other.
        """
        call = self._call(x, layer)
        rows = sum(part.layout[0] for part in layer.projections if part.m is not None)
        factors = torch.empty(3 * rows, dtype=torch.float32) if rows else None
        for part, n in zip(layer.projections, norms_of(layer, factors), strict=True):
            if n is not None and part.n is not None:
                n.copy_(part.n)
        y = self.empty_like(x)  # of all these it lives longest: first, it leaves no hole where the others were
        kept = self._floats(call.room[0])
        passing, work = self._floats(call.room[1]), self.workspace(call.room[3])
        at = Places(
            x=x.data_ptr(),
            y=y.data_ptr(),
            kept=kept.data_ptr(),
            passing=passing.data_ptr(),
            work=work.data_ptr(),
            factors=_address(factors),
        )
        self.library.qlora_decoder_forward(call.packed(at))
        return y, kept, factors, call

    def decoder_layer_backward(
        self, dy: Tensor, x: Tensor | None, kept: Tensor, factors: Tensor | None, call: Call
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dx [tokens, width], where the layer's x is given, and dA, dB and dm of each projection."""
        gradients: list[Tensor | None] = []
        for part in call.layer.projections:
            dm = None if part.m is None else torch.empty_like(part.m)
            gradients += [torch.empty_like(part.A), torch.empty_like(part.B), dm]
        dx = None if x is None else self.empty_like(dy)
        passing, work = self._floats(call.room[2]), self.workspace(call.room[3])
        at = Places(
            x=_address(x),
            dy=dy.data_ptr(),
            dx=_address(dx),
            kept=kept.data_ptr(),
            passing=passing.data_ptr(),
            work=work.data_ptr(),
            factors=_address(factors),
            gradients=[_address(one) for one in gradients],
        )
        self.library.qlora_decoder_backward(call.packed(at))
        return dx, gradients

    def _floats(self, size: int) -> Tensor:
        """So many bytes, which are a multiple of 64."""
        return self.empty(size // 4, dtype=torch.float32)

    def _call(self, x: Tensor, layer: Layer) -> Call:
        parts, examples = layer.projections, longest_first(layer.cu_seqlens)
        numbers = (
            x.dtype == torch.bfloat16,
            self._by_integers(x),
            self._is_widened(x),
            torch.get_num_threads(),
            x.shape[0],
            parts[QUERY].layout[0] // layer.head,
            parts[KEY].layout[0] // layer.head,
            layer.head,
            len(examples[0]),
            *map(ctypes.addressof, examples),
        )
        call = Call(layer, numbers, examples, (SIZE * 4)())
        self.library.qlora_decoder_bytes(call.packed(Places()), ctypes.addressof(call.room))
        return call


def norms_of(layer: Layer, factors: Tensor | None) -> list[Tensor | None]:
    """n [out] of each projection that has an m, in `factors`."""
    found: list[Tensor | None] = []
    for part, at in zip(layer.projections, _starts(layer), strict=True):
        rows = part.layout[0]
        found.append(None if part.m is None or factors is None else factors[at + 2 * rows : at + 3 * rows])
    return found


def _starts(layer: Layer) -> list[int]:
    """Where the factors of each projection begin."""
    sizes = [0 if part.m is None else 3 * part.layout[0] for part in layer.projections]
    return list(accumulate(sizes, initial=0))[:-1]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _is(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return x.dtype == dtype and x.shape == shape and x.is_contiguous()


def _constants(part: Projection) -> tuple[float, ...]:
    learned = part.A.data_ptr(), part.B.data_ptr(), _address(part.m), _address(part.bias)
    makes_n, rank = part.m is not None and part.n is None, part.A.shape[0]
    return *addresses(part.weight), *sizes(part.layout), *learned, makes_n, rank, part.scaling

"""Each operator of the backend in use against what it means, at odd shapes and real ones, its outputs poisoned.

    error = max |found - exact| / max |exact|        exact: the reference in float64
    exact operators (codes, scales, decoded weights) have the reference's own bits

Arguments are drawn here, and what comes back is compared whole: results, and what an operator writes in place. The
alternative, to compare a model's loss alone, passes over a wrong last column.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_kernels import backends, ops, reference
from qlora_kernels.weight import NESTED_BLOCKSIZE, QuantizedWeight, levels_of

BLOCKSIZE = 64
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BY_INTEGERS = ("matmul_4bit", "adapted_linear", "adapted_linear_backward", "matmul_dense_into")  # where float32 may be
INTEGERS = 2e-3  # the largest error of such products
EXACT = {
    *("quantize_4bit", "fit_scales_4bit", "encode_4bit", "quantize_absmax"),
    *("dequantize_4bit", "dequantize_4bit_into", "dequantize_4bit_joined", "encode_blocks_into", "decode_blocks_into"),
}
IN_FLOAT32 = {"adamw_", "total_norm", "row_norms_4bit", "row_norms_4bit_all"}  # whatever the activations are in
USED_UP = {"work", "values"}  # written in place, but no result: see `encode_blocks_into`


@dataclass
class Draw:
    """Random arguments of one shape: a weight [rows, columns], `tokens` tokens, activations in `dtype`."""

    device: torch.device
    rows: int
    columns: int
    tokens: int
    dtype: torch.dtype
    rank: int = 16
    integers: bool = False  # float32 products may be made of integers
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.rows + self.columns)

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')}{' by integers' * self.integers}"
        return f"{self.rows}x{self.columns}, {self.tokens} tokens, {kind}"

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, dtype)

    def low(self, *shape: int) -> Tensor:
        """Normal, in the dtype of activations."""
        return self.normal(*shape, dtype=self.dtype)

    def scales(self, count: int) -> Tensor:
        """Positive numbers about 1."""
        return self.normal(count).abs() + 0.5

    def weight(self) -> QuantizedWeight:
        dense = 0.02 * self.normal(self.rows, self.columns)
        packed, absmax = reference.quantize_4bit(dense, self.levels, BLOCKSIZE)
        scales = reference.quantize_absmax(absmax, NESTED_BLOCKSIZE)
        return QuantizedWeight.of(packed, scales, (self.rows, self.columns), BLOCKSIZE)

    @property
    def levels(self) -> Tensor:
        return levels_of("nf4", self.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return 0.1 * self.normal(self.rank, self.columns), 0.1 * self.normal(self.rows, self.rank)

    def forward(self) -> tuple:
        """The arguments of `adapted_linear`, of DoRA with its norms."""
        w, (A, B), x = self.weight(), self.factors(), self.low(self.tokens, self.columns)
        return (x, x, A, B, self.scales(self.rows), self.scales(self.rows), None, 2.0, w.parts, w.layout)

    def backward(self) -> tuple:
        """Those of `adapted_linear_backward`, behind that forward pass."""
        x, _, *given = self.forward()
        y, *saved = reference.adapted_linear(x, x, *given)
        return (self.low(self.tokens, self.rows), [x, *saved], y, 2.0, *given[-2:], True)

    def heads(self, count: int) -> Tensor:
        return self.low(self.tokens, count, 64)

    def borders(self) -> list[int]:
        return [0, self.tokens // 3, self.tokens]

    def attended(self) -> tuple:
        """The arguments of `attention_backward`."""
        q, k, v = self.heads(4), self.heads(2), self.heads(2)
        out, lse = reference.attention(q, k, v, self.borders(), 0.125)
        return (self.heads(4), q, k, v, out, lse, self.borders(), 0.125)

    def blocks(self, signed: bool) -> tuple:
        count = self.rows * NESTED_BLOCKSIZE
        codes, absmax = torch.empty(count, dtype=torch.uint8), torch.empty(self.rows)
        values, work = self.normal(count), torch.empty(count, dtype=torch.int32)
        codes, absmax, work = (t.to(self.device) for t in (codes, absmax, work))
        return (codes, absmax, values if signed else values.square(), work, NESTED_BLOCKSIZE, signed)

    def decoding(self) -> tuple:
        codes, absmax, values, work, *rest = self.blocks(True)
        reference.encode_blocks_into(codes, absmax, values, work, *rest)
        return (torch.empty_like(values), codes, absmax, work, *rest)

    def adamw(self) -> tuple:
        n = self.rows * self.columns
        cut = [n // 3, n - n // 3]
        p, g, m, v = (self.normal(n) for _ in range(4))
        numbers = [0.9, 0.999, 1e-8, 0.99, 1e-2, 0.3, 0.7]
        work = torch.empty(3, n, device=self.device)
        return (list(p.split(cut)), list(g.split(cut)), [0, cut[0]], m, v.square(), work, numbers)


def _gemv(d: Draw) -> tuple:
    w = d.weight()
    return (d.low(d.columns), w.parts, w.layout)


def _matmul(d: Draw) -> tuple:
    w = d.weight()
    return (d.low(d.tokens, d.columns), w.parts, w.layout, d.scales(d.rows), True)


def _decode(d: Draw) -> tuple:
    w = d.weight()
    return (w.parts, w.layout, d.scales(d.rows), d.dtype)


def _decode_into(d: Draw) -> tuple:
    w = d.weight()
    return (torch.empty(d.rows, d.columns, dtype=d.dtype, device=d.device), w.parts, w.layout, None)


def _norms(d: Draw, count: int = 0) -> tuple:
    w, (A, B) = d.weight(), d.factors()
    one = (w.parts, w.layout, A, B, 2.0)
    return one if not count else (w.parts * count, w.layout * count, [A] * count, [B] * count, [2.0] * count)


def _prepare(d: Draw) -> tuple:
    return (*d.factors(), d.scales(d.rows), d.scales(d.rows), 0.7, d.dtype)


def _gradients(d: Draw) -> tuple:
    dy, y = d.low(d.tokens, d.rows), d.low(d.tokens, d.rows)
    up, u = d.low(d.rows, d.rank), d.low(d.tokens, d.rank)
    return (dy, up, u, y, d.scales(d.rows), d.scales(d.rows), 0.7)


def _joined(d: Draw) -> tuple:
    """A layer beside another of fewer rows, as q beside k."""
    (A, B), m, few = d.factors(), d.scales(d.rows), max(1, d.rows // 2)
    norms, small = [d.scales(d.rows), d.scales(few)], Draw(d.device, few, d.columns, d.tokens, d.dtype)
    w, other = d.weight(), small.weight()
    weights = [*w.parts, *other.parts], [*w.layout, *other.layout]
    return ([A, 2 * A], [B, B[:few]], [m, m[:few]], norms, 0.7, *weights, d.dtype)


def _joined_gradients(d: Draw) -> tuple:
    outs = [d.rows, max(1, d.rows // 2)]
    rows, ranks = sum(outs), 2 * d.rank
    dy, y, B, xA = (d.low(*shape) for shape in ((d.tokens, rows), (d.tokens, rows), (rows, ranks), (d.tokens, ranks)))
    return (dy, B, xA, y, None, torch.stack((d.scales(rows), d.scales(rows))), outs, 0.7)


def _elementwise(d: Draw, count: int) -> tuple:
    return tuple(d.low(d.tokens, d.columns) for _ in range(count))


def _rms_backward(d: Draw) -> tuple:
    dy, x, weight = d.low(d.tokens, d.columns), d.low(d.tokens, d.columns), d.low(d.columns)
    return (dy, x, weight, reference.rms_norm(x, weight, 1e-6)[1])


def _rotation(d: Draw) -> tuple:
    angles = d.normal(d.tokens, 32).repeat(1, 2)
    return (d.heads(4), d.heads(2), angles.cos().to(d.dtype), angles.sin().to(d.dtype))


def _dense(d: Draw) -> tuple:
    return (d.low(d.tokens, d.rows), d.low(d.tokens, d.columns), d.low(d.rows, d.columns), True)


CASES: dict[str, Callable[[Draw], tuple]] = {
    "quantize_4bit": lambda d: (d.low(d.rows, d.columns), d.levels, BLOCKSIZE),
    "fit_scales_4bit": lambda d: (d.low(min(d.rows, 64), d.columns), d.levels, BLOCKSIZE),  # the reference is slow
    "encode_4bit": lambda d: (
        d.low(d.rows, d.columns),
        d.levels,
        2 * d.scales(-(-d.rows * d.columns // BLOCKSIZE)),
        BLOCKSIZE,
    ),
    "quantize_absmax": lambda d: (d.scales(d.rows * 3), NESTED_BLOCKSIZE),
    "dequantize_4bit": _decode,
    "dequantize_4bit_into": _decode_into,
    "dequantize_4bit_joined": lambda d: (*_norms(d, 3)[:2], d.scales(3 * d.rows), d.dtype),
    "gemv_4bit": _gemv,
    "matmul_4bit": _matmul,
    "row_norms_4bit": _norms,
    "row_norms_4bit_all": lambda d: _norms(d, 3),
    "adapted_linear": Draw.forward,
    "adapted_linear_backward": Draw.backward,
    "prepare_lora_factors": _prepare,
    "adapted_operands": _joined,
    "joined_gradients": _joined_gradients,
    "columnwise_dot": lambda d: _elementwise(d, 2),
    "matmul_tn": lambda d: (d.low(d.tokens, d.rank), d.low(d.tokens, d.columns)),
    "matmul_dense_into": _dense,
    "adapter_gradients": _gradients,
    "cross_entropy_": lambda d: (d.low(d.tokens, d.columns), (torch.arange(d.tokens) % d.columns).to(d.device)),
    "rms_norm": lambda d: (d.low(d.tokens, d.columns), d.low(d.columns), 1e-6),
    "add_rms_norm": lambda d: (*_elementwise(d, 2), d.low(d.columns), 1e-6),
    "rms_norm_backward": _rms_backward,
    "rms_norm_backward_add": lambda d: (*_rms_backward(d), d.low(d.tokens, d.columns)),
    "swiglu": lambda d: _elementwise(d, 2),
    "swiglu_backward": lambda d: _elementwise(d, 3),
    "swiglu_backward_dots": lambda d: _elementwise(d, 3),
    "swiglu_joined": lambda d: (d.low(d.tokens, 2 * d.columns),),
    "swiglu_joined_backward": lambda d: (d.low(d.tokens, d.columns), d.low(d.tokens, 2 * d.columns), True),
    "geglu": lambda d: _elementwise(d, 2),
    "geglu_backward": lambda d: _elementwise(d, 3),
    "rotate": _rotation,
    "rotate_backward": _rotation,
    "attention": lambda d: (d.heads(4), d.heads(2), d.heads(2), d.borders(), 0.125),
    "attention_backward": Draw.attended,
    "adamw_": Draw.adamw,
    "total_norm": lambda d: ([d.normal(d.rows, d.columns), d.normal(7)],),
    "encode_blocks_into": lambda d: d.blocks(True),
    "decode_blocks_into": Draw.decoding,
}


def half(device: torch.device) -> torch.dtype:
    """The 16-bit type to try a device with: bf16, but fp16 on a card that cannot compute in it."""
    lacking = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if lacking else torch.bfloat16


def shapes(device: torch.device, name: str) -> list[Draw]:
    """Of the arguments of an operator: odd ones, which end in the middle of every block and vector, one of a real
    layer, and one whose weight is made of whole tiles, as the kernels of whole layers want it, but not its tokens.
    """
    real, tiles = (4096, 4096, 512) if device.type == "cuda" else (1024, 2048, 64), (96, 192, 45)
    odd = [(5, 77, 3), (33, 192, 17), (130, 576, 40)]
    dtypes = (half(device), torch.float32)
    draws = [Draw(device, *shape, dtype) for shape in (*odd, real) for dtype in dtypes]
    draws += [Draw(device, *tiles, dtype, rank=5) for dtype in dtypes]
    if device.type == "cpu" and name in BY_INTEGERS and backends.multiplies_by_integers():
        draws += [Draw(device, *real, torch.float32, integers=True)]
        draws += [Draw(device, *tiles, torch.float32, rank=5, integers=True)]
    return draws


def errors(name: str, draw: Draw) -> tuple[float, float]:
    """(the largest error of operator `name` on such arguments, the largest that may be)."""
    arguments, exact = CASES[name](draw), name in EXACT
    expected = _results(getattr(reference, name), name, _copied(arguments, None if exact else torch.float64))
    before = torch.get_float32_matmul_precision()
    try:
        if draw.integers:
            torch.set_float32_matmul_precision("high")
        found = _results(getattr(ops, name), name, _copied(arguments, None))
    finally:
        torch.set_float32_matmul_precision(before)
    error = max(_error(a, b, exact) for a, b in zip(found, expected, strict=True))
    limit = INTEGERS if draw.integers else LIMITS[torch.float32 if name in IN_FLOAT32 else draw.dtype]
    return error, 0.0 if exact else limit


def _error(found: Tensor, expected: Tensor, exact: bool) -> float:
    if found.shape != expected.shape or (exact and found.dtype != expected.dtype):
        return math.inf
    if exact or not expected.numel():
        return 0.0 if torch.equal(found, expected) else math.inf
    error = ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return error if error == error else math.inf  # NaN: an element that nobody wrote


def _results(function: Callable, name: str, arguments: tuple) -> list[Tensor]:
    """What a call returns and what it writes in place, flat."""
    returned = function(*arguments)
    schema = getattr(ops, name)._schema.arguments
    written = [
        value
        for value, about in zip(arguments, schema, strict=False)
        if about.alias_info is not None and about.alias_info.is_write and about.name not in USED_UP - _wanted(name)
    ]
    return list(_flat([returned, *written]))


def _wanted(name: str) -> set[str]:
    return {"values"} if name == "decode_blocks_into" else set()


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _flat(part)] if isinstance(value, (list, tuple)) else []


def _copied(value: Any, dtype: torch.dtype | None) -> Any:
    """Arguments of their own, so that nothing is written into another's; floating ones in `dtype` where it is given.

    Of a quantized weight the parts stay what they are: they are read as codes and scales.
    """
    if isinstance(value, tuple):
        return tuple(_copied(part, dtype) for part in value)
    if isinstance(value, list):
        weight = any(isinstance(part, Tensor) and part.dtype == torch.uint8 for part in value)
        return [_copied(part, None if weight else dtype) for part in value]
    if isinstance(value, torch.dtype):
        return dtype if dtype is not None else value
    if not isinstance(value, Tensor):
        return value
    return value.clone() if dtype is None or not value.is_floating_point() else value.to(dtype, copy=True)

"""Attention in float32 with AVX2 and AVX-512. The oracle is the reference in float64; the kernels of bf16 are
in tests/layers/test_attention.py.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from helpers import routed, same_bits
from torch import Tensor

from qlora_kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned", "threads")

# lengths, heads, groups, size of a head: tiles, panels and macros that are not whole, several depths of keys, wide
# heads
CASES = [
    ((1, 2, 17, 255, 257), 4, 2, 64),
    ((1,), 3, 3, 80),
    ((33, 300), 6, 2, 96),
    ((40, 0, 520), 2, 1, 128),
    ((31, 32), 2, 1, 5),
    ((1600,), 1, 1, 16),
    ((20, 270), 1, 1, 512),
    ((290,), 10, 2, 32),  # two threads cut a group into a part of two heads and one of three, five into each head
]


def drawn(lengths, heads, groups, D) -> tuple[list[int], list[Tensor]]:
    """(borders, [q, k, v, gradient of the result])."""
    tokens = sum(lengths)
    return [0, *accumulate(lengths)], [1.5 * torch.randn(tokens, n, D) for n in (heads, groups, groups, heads)]


def both(kernels, bounds: list[int], tensors: list[Tensor], scale: float) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v, dout = tensors
    out, lse = kernels.attention(q, k, v, bounds, scale)
    return [out, lse, *kernels.attention_backward(dout, q, k, v, out, lse, bounds, scale)]


def exact(bounds: list[int], tensors: list[Tensor], scale: float) -> list[Tensor]:
    return both(reference, bounds, [x.double() for x in tensors], scale)


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest, relative to the largest value, or to 1, which values are about."""
    return (got.double() - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_in_float32(isa, threads, case):
    """The same bits for any number of threads."""
    bounds, tensors = drawn(*case)
    assert isa.supports_attention(*tensors[:3]) == isa.attends_in_float32 == (isa.isa in ("AVX2", "AVX-512"))
    results = []
    for count in (1, 2, 5) if isa.attends_in_float32 else (1,):
        threads(count)
        results.append(both(routed(isa), bounds, tensors, case[3] ** -0.5))
    for got, wanted in zip(results[0], exact(bounds, tensors, case[3] ** -0.5), strict=True):
        assert got.dtype == torch.float32 and error(got, wanted) < 1e-5
    assert all(same_bits(a, b) for found in results[1:] for a, b in zip(results[0], found, strict=True))


def test_an_example_has_the_same_bits_beside_others(isa):
    bounds, tensors = drawn((100, 3, 290), 6, 3, 64)
    if isa.attends_in_float32:
        together, alone = (
            both(isa, *given, 0.125) for given in ((bounds, tensors), ([0, 290], [x[103:] for x in tensors]))
        )
        for place, (got, wanted) in enumerate(zip(together, alone, strict=True)):
            assert same_bits((got[:, 103:] if place == 1 else got[103:]).contiguous(), wanted)


@pytest.mark.parametrize("factor", [30.0, -30.0])
def test_large_scores(isa, factor):
    """e^score overflows, and all but one probability of most queries is zero; a negative scale, by its queries."""
    bounds, tensors = drawn((70, 40), 2, 2, 64)
    tensors[0] *= factor
    for got, wanted in zip(both(routed(isa), bounds, tensors, 0.125), exact(bounds, tensors, 0.125), strict=True):
        assert error(got, wanted) < 1e-3


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_any_scale(isa, scale):
    bounds, tensors = drawn((70, 40), 2, 2, 64)
    for got, wanted in zip(both(routed(isa), bounds, tensors, scale), exact(bounds, tensors, scale), strict=True):
        assert error(got, wanted) < 1e-5


def test_views(isa):
    """Queries, keys and values as slices of one product, and tensors whose last dimension is not contiguous."""
    bounds, tensors = drawn((20, 45), 4, 2, 64)
    whole = torch.cat(tensors[:3], dim=1)
    parts = [*whole.split((4, 2, 2), dim=1), tensors[3].transpose(0, 2).contiguous().transpose(0, 2)]
    if isa.attends_in_float32:
        for got, same in zip(both(isa, bounds, parts, 0.125), both(isa, bounds, tensors, 0.125), strict=True):
            assert same_bits(got, same)


def test_no_later_key_is_seen(isa):
    """Whatever it holds, short of NaN: queries before it have the same result, and it the same gradient from them."""
    bounds, (q, k, v, dout) = drawn((90,), 2, 1, 64)
    if isa.attends_in_float32:
        out, _ = isa.attention(q, k, v, bounds, 0.125)
        later = k.clone(), v.clone()
        later[0][50:] *= 1e3
        later[1][50:] *= -1e3
        assert same_bits(isa.attention(q, *later, bounds, 0.125)[0][:50].contiguous(), out[:50].contiguous())
        dout[50:] = 0
        _, _, _, dk, dv = both(isa, bounds, [q, *later, dout], 0.125)
        assert not dk[50:].any() and not dv[50:].any() and dk[:50].any()


def test_what_is_not_finite_stays_so(isa):
    """In the queries that see it."""
    bounds, (q, k, v, _) = drawn((60, 40), 2, 1, 64)
    k[30, 0, 3] = float("nan")
    if isa.attends_in_float32:
        finite = isa.attention(q, k, v, bounds, 0.125)[0].isfinite().all(2).all(1)
        assert not finite[30:60].any() and finite[60:].all() and finite[:28].all()


def test_what_float32_kernels_do_not_take(isa):
    q, k = torch.randn(8, 2, 516), torch.randn(8, 2, 516)
    assert not isa.supports_attention(q, k, k)
    assert not isa.supports_attention(q[..., :64], k[..., :64], k[..., :32])
    assert not isa.supports_attention(q[..., :64], k[..., :64], k[..., :64].bfloat16())

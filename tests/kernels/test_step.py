"""What lies between the products of a layer, by the native CPU kernels: loss, RMSNorm, SwiGLU, rotary embedding,
against the reference and float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, ISAS, routed, same_bits, same_everywhere

from qlora_kernels import reference
from qlora_kernels.cpu.binding import DTYPES as CODES

pytestmark = pytest.mark.usefixtures("poisoned", "threads")

# ---------------------------------------------------------------- all elementwise kernels

STEP_SHAPES = [(1, 1), (3, 15), (5, 16), (2, 4097), (7, 576), (300, 130)]


def step_results(kernels, dtype: torch.dtype, shape: tuple[int, int]) -> list[torch.Tensor]:
    """Every elementwise kernel of a step on the same random values."""
    generator = torch.Generator().manual_seed(shape[1])
    a, b, c = ((4 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3))
    targets, logits = torch.randint(0, shape[1], shape[:1], generator=generator), 5 * a
    y, inverse = kernels.rms_norm(a, b[0], 1e-5)
    return [
        kernels.cross_entropy_(logits, targets),
        logits,
        y,
        inverse,
        *kernels.add_rms_norm(a, c, b[0], 1e-5),
        kernels.rms_norm_backward(c, a, b[0], inverse),
        kernels.rms_norm_backward_add(c, a, b[0], inverse, b),
        kernels.swiglu(a, b),
        *kernels.swiglu_backward(c, a, b),
        *kernels.swiglu_backward_dots(c, a, b),
    ]


@pytest.mark.parametrize("shape", STEP_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elementwise_kernels_equal_the_reference(isa, dtype, shape):
    """To the rounding of float32 inside; then each rounds to its dtype where the reference does."""
    for found, expected in zip(step_results(isa, dtype, shape), step_results(reference, dtype, shape), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(
            found, expected, rtol=2 * eps + 1e-5, atol=(eps + 4e-6) * max(1.0, expected.abs().max().item())
        )


@pytest.mark.parametrize("shape", STEP_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elementwise_kernels_give_the_same_bits_everywhere(kernels, dtype, shape, threads):
    same_everywhere(kernels, threads, lambda: step_results(kernels, dtype, shape))


@pytest.mark.parametrize("shape", STEP_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_equal_the_reference(isa, dtype, shape):
    """To torch's bits, also over one of the terms; a decoder layer in one call has no other test on some sets."""
    a, b = (4 * torch.randn(2, *shape)).to(dtype)
    expected = a + b
    for to in (torch.empty_like(a), a):
        isa.library.qlora_add(CODES[dtype], a.data_ptr(), b.data_ptr(), a.numel(), to.data_ptr(), 1)
        assert same_bits(to, expected)


def test_elementwise_operators_in_float64_go_to_the_reference(kernels):
    shape = STEP_SHAPES[1]
    found, expected = (step_results(code, torch.float64, shape) for code in (routed(kernels), reference))
    assert all(map(same_bits, found, expected))


# ---------------------------------------------------------------- RMSNorm, SwiGLU


def test_a_product_and_a_sum_are_rounded_once(isa):
    """1 + 2^-23 + 2^-24 (1 - 2^-46), which a sum in double turns into the middle between two floats, and that into the
    upper one.
    """
    last = 2.0**-23
    dy, x = torch.zeros(2, 1, 64)
    dy[0, 0], dy[0, 32] = 1 + last, 2.0**-12 * (1 + last)
    x[0, :2], x[0, 32] = 1, 2.0**-12 * (1 - last)
    dx = isa.rms_norm_backward(dy, x, torch.ones(64), torch.ones(1))
    assert dx[0, 1].item() == -(1 + last) / 64


def test_every_bf16_gate(kernels):
    """All 65536, infinities and NaN among them: the nearest bf16 to float64's result, up to float32's error, and one
    result everywhere.
    """
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    one, x = torch.ones_like(gate), gate.double()
    s = x.sigmoid()
    exact, results = (x * s, s * (1 + x * (1 - s)), x * s), []
    for isa in ISAS:
        kernels.select(isa)
        results.append((kernels.swiglu(gate, one), *kernels.swiglu_backward(one, gate, one)))
        for found, expected in zip(results[-1], exact, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=2**-8 + 2**-20, atol=2e-7, equal_nan=True)
        for found, first in zip(results[-1], results[0], strict=True):
            assert torch.equal(found.nan_to_num(7.0), first.nan_to_num(7.0)), isa


def test_any_floats_give_the_same_bits_everywhere(kernels):
    """Subnormal, huge and infinite ones too."""
    bits = torch.randint(-(1 << 31), 1 << 31, (3, 1 << 16)).to(torch.int32)
    gate, up, dy = bits.view(torch.float32)
    gate, up, dy = torch.cat((gate, 180 * torch.rand(1 << 16) - 90)), up.repeat(2), dy.repeat(2)
    results = []
    for isa in ISAS:
        kernels.select(isa)
        parts = kernels.swiglu(gate, up), *kernels.swiglu_backward(dy, gate, up)
        results.append([part.masked_fill(part.isnan(), 7.0) for part in parts])
        assert all(map(same_bits, results[-1], results[0])), isa


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (129, 33), (300, 4100)], ids=str)
def test_the_sums_of_a_gated_product_are_columnwise_dots(isa, threads, count, shape):
    """To the bit, and beside gradients that are those without the sums."""
    threads(count)
    dy, gate, up = ((2 * torch.randn(shape)).bfloat16() for _ in range(3))
    dgate, dup, dots = isa.swiglu_backward_dots(dy, gate, up)
    assert all(map(torch.equal, (dgate, dup), isa.swiglu_backward(dy, gate, up)))
    assert torch.equal(dots, torch.stack((isa.columnwise_dot(dgate, gate), isa.columnwise_dot(dup, up))))


# ---------------------------------------------------------------- rotary embedding

ROTATIONS = [
    (1, 1, 2, 1, 1),
    (3, 1, 30, 7, 7),
    (2, 2, 64, 5, 5),
    (1, 3, 80, 33, 11),
    (9, 3, 64, 300, 150),
]  # heads, groups, D, tokens, positions


def rotation(heads: int, groups: int, D: int, tokens: int, positions: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q and k as they lie beside each other in the result of one product, and cos and sin of a rotation that also
    stretches.
    """
    generator = torch.Generator().manual_seed(D)
    product = (3 * torch.randn(tokens, heads + 2 * groups, D, generator=generator)).to(dtype)
    q, k, _ = product.split([heads, groups, groups], 1)
    angles = 9 * torch.rand(positions, D, generator=generator)
    return [q, k, *((1.2 * x).to(dtype) for x in (angles.cos(), angles.sin()))]


def rotation_results(kernels, *shape) -> list[torch.Tensor]:
    q, k, cos, sin = rotation(*shape)
    return [*kernels.rotate(q, k, cos, sin), *kernels.rotate_backward(q, k, cos, sin)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROTATIONS, ids=str)
def test_a_rotation_is_rounded_once(isa, dtype, shape):
    wide = [x.double() for x in rotation(*shape, dtype)]
    q, _, cos, sin = wide
    rows = torch.arange(len(q)) % len(cos)
    turned = torch.cat((-q[..., shape[2] // 2 :], q[..., : shape[2] // 2]), -1)
    torch.testing.assert_close(reference.rotate(*wide)[0], q * cos[rows, None] + turned * sin[rows, None])
    exact = [*reference.rotate(*wide), *reference.rotate_backward(*wide)]
    for found, expected in zip(rotation_results(isa, *shape, dtype), exact, strict=True):
        assert found.dtype == dtype and found.is_contiguous()
        rounding = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(
            found.double(), expected, rtol=rounding * (1 + 1e-4), atol=1e-5 if dtype != torch.float32 else 1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROTATIONS, ids=str)
def test_rotations_give_the_same_bits_everywhere(kernels, dtype, shape, threads):
    same_everywhere(kernels, threads, lambda: rotation_results(kernels, *shape, dtype))


def test_a_rotation_that_does_not_fit_is_refused(kernels):
    q, k, cos, sin = rotation(*ROTATIONS[3], torch.float32)
    for wrong in ((q, k[1:], cos, sin), (q, k, cos[1:], sin), (q, k, cos[1:], sin[1:]), (q, k[..., 1:], cos, sin)):
        with pytest.raises(ValueError, match="turned by"):
            kernels.rotate(*wrong)


def test_a_rotation_in_float64_goes_to_the_reference(kernels):
    wide = rotation(*ROTATIONS[3], torch.float64)
    assert all(map(torch.equal, routed(kernels).rotate(*wide), reference.rotate(*wide)))
    assert all(map(torch.equal, routed(kernels).rotate_backward(*wide), reference.rotate_backward(*wide)))


# ---------------------------------------------------------------- loss


def test_cross_entropy_at_the_edges(isa):
    """Sure predictions keep their digits, impossible ones stay finite, and what is no number is not hidden."""
    logits = torch.tensor([[0.0, 30.0, -5.0], [-1e4, 0.0, 1e4], [math.inf, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    losses = isa.cross_entropy_(logits, torch.tensor([1, 0, 1, 1]))
    assert losses[0].item() == pytest.approx(math.exp(-30), rel=1e-3)
    assert logits[0, 1].item() == pytest.approx(-math.exp(-30), rel=1e-3)
    assert losses[1].item() == pytest.approx(2e4) and logits[1].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-30)
    assert losses[2:].isnan().all()


@pytest.mark.parametrize("target", [-100, 3])
def test_cross_entropy_refuses_targets_outside_the_vocabulary(isa, target):
    with pytest.raises(IndexError, match="targets"):
        isa.cross_entropy_(torch.zeros(1, 3), torch.tensor([target]))

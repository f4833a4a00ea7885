"""geglu(gate, up) = gelu(gate) * up and its gradients: the reference against float64, native kernels against both."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, ISAS, routed, same_bits
from torch import Tensor
from torch.nn.functional import gelu

from qlora_kernels import backends, ops, reference

pytestmark = pytest.mark.usefixtures("poisoned", "threads")

SHAPES = [(1, 1), (3, 15), (5, 16), (2, 4097), (7, 576), (300, 130)]


class GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return ops.geglu(gate, up)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return ops.geglu_backward(dy, *ctx.saved_tensors)


def slope(x: Tensor) -> Tensor:
    """gelu'(x) of float64, with limits at the ends."""
    inside = x.clamp(-20, 20)
    double = 2 * math.sqrt(2 / math.pi) * (inside + 0.044715 * inside**3)
    s = double.sigmoid()
    return s + inside * s * (-double).sigmoid() * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * inside**2)


def value(x: Tensor) -> Tensor:
    """gelu(x) of float64 without the cancellation of 1 + tanh."""
    return x * (2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).sigmoid()


def inputs(dtype: torch.dtype, shape: tuple[int, ...]) -> list[Tensor]:
    """dy, gate, up."""
    generator = torch.Generator().manual_seed(shape[-1])
    return [(4 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3)]


def results(code, dtype: torch.dtype, shape: tuple[int, ...]) -> list[Tensor]:
    dy, gate, up = inputs(dtype, shape)
    return [code.geglu(gate, up), *code.geglu_backward(dy, gate, up)]


def test_the_reference_is_the_formula():
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    one = torch.ones_like(x)
    dgate, dup = reference.geglu_backward(one, x, one)
    torch.testing.assert_close(reference.geglu(x, 2 * one), 2 * value(x), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(dgate, slope(x), rtol=1e-13, atol=1e-14)
    assert torch.equal(dup, gelu(x, approximate="tanh"))


def test_gradients_are_those_of_the_product():
    dy, gate, up = inputs(torch.float64, (5, 7))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(GeGLU.apply, (gate, up))
    expected = torch.autograd.grad(gelu(gate, approximate="tanh") * up, (gate, up), dy)
    torch.testing.assert_close(torch.autograd.grad(GeGLU.apply(gate, up), (gate, up), dy), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_equal_the_reference(isa, dtype, shape):
    """To the rounding of float32 inside; then each rounds to its dtype where the reference does."""
    for found, expected in zip(results(isa, dtype, shape), results(reference, dtype, shape), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            found, expected, rtol=2 * eps + 1e-5, atol=(eps + 4e-6) * max(1.0, expected.abs().max().item())
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_everywhere(kernels, dtype, threads):
    """On each instruction set and for two threads; more values than one piece of work has, among them."""
    found = []
    for isa, count in [*((isa, 1) for isa in ISAS), (ISAS[-1], 2)]:
        kernels.select(isa)
        threads(count)
        found.append([part for shape in [*SHAPES, (1, 70_001)] for part in results(kernels, dtype, shape)])
    for others in found[1:]:
        assert all(map(same_bits, others, found[0]))


def test_any_floats_give_the_same_bits_everywhere(kernels):
    """Subnormal, huge and infinite ones too; no NaN comes of finite gates."""
    bits = torch.randint(-(1 << 31), 1 << 31, (3, 1 << 16)).to(torch.int32)
    gate, up, dy = bits.view(torch.float32)
    gate, up, dy = torch.cat((gate, 24 * torch.rand(1 << 16) - 12)), up.repeat(2), dy.repeat(2)
    first, one = None, torch.ones_like(gate)
    for isa in ISAS:
        kernels.select(isa)
        parts = [kernels.geglu(gate, up), *kernels.geglu_backward(dy, gate, up)]
        parts = [part.masked_fill(part.isnan(), 7.0) for part in parts]
        first = first or parts
        assert all(map(same_bits, parts, first))
        for part in (kernels.geglu(gate, one), *kernels.geglu_backward(one, gate, one)):
            assert part[gate.isfinite()].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_gate_of_16_bits(isa, dtype):
    """All 65536: the nearest to float64's result, up to float32's error, subnormals and signed zeros among them."""
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    one, x, eps = torch.ones_like(gate), gate.double(), torch.finfo(dtype).eps
    found = isa.geglu(gate, one), *isa.geglu_backward(one, gate, one)
    tiny = max(torch.finfo(dtype).smallest_normal * eps, 5e-38)  # float32's s is 0 below 2^-127
    for part, exact, least in zip(found, (value(x), slope(x), value(x)), (tiny, 2e-7, tiny), strict=True):
        torch.testing.assert_close(part.double(), exact, rtol=eps / 2 * (1 + 2**-8), atol=least, equal_nan=True)
    small = x.abs() < torch.finfo(dtype).smallest_normal / 2
    assert torch.equal(found[0][small].signbit(), gate[small].signbit())


def test_the_ends(isa):
    """Saturation, infinities and NaN: torch's values, and the limits of the slope, where torch has no number."""
    gate = torch.tensor([-math.inf, -3e38, -1e20, -14.0, -0.0, 0.0, 1e-45, 14.0, 1e20, 3e38, math.inf, math.nan] * 3)
    one = torch.ones_like(gate)
    y, (dgate, dup) = isa.geglu(gate, one), isa.geglu_backward(one, gate, one)
    expected = gelu(gate, approximate="tanh")
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-45, equal_nan=True)
    assert torch.equal(y.nan_to_num(7.0), dup.nan_to_num(7.0)) and torch.equal(
        y.signbit()[4:6], torch.tensor([True, False])
    )
    slopes = torch.tensor([0.0] * 4 + [0.5] * 3 + [1.0] * 4 + [math.nan])
    torch.testing.assert_close(dgate[:12], slopes, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch(isa, dtype):
    """Against float64, the largest and the mean error, of values and of gradients."""
    gate = torch.linspace(-13, 13, 200_001).to(dtype)
    one = torch.ones_like(gate)
    theirs = [gelu(gate, approximate="tanh"), torch.ops.aten.gelu_backward(one, gate, approximate="tanh")]
    ours = [isa.geglu(gate, one), isa.geglu_backward(one, gate, one)[0]]
    for found, other, exact in zip(ours, theirs, (value(gate.double()), slope(gate.double())), strict=True):
        error, allowed = ((part.double() - exact).abs() for part in (found, other))
        assert error.max() <= allowed.max() and error.mean() <= allowed.mean()
        relative, bound = (part / exact.abs().clamp_min(1e-30) for part in (error, allowed))
        assert relative.median() <= bound.median()


def test_what_a_kernel_does_not_take(kernels):
    """float64 and mixed dtypes are the reference's; no values are no error; strides do not matter."""
    code, before = routed(kernels), backends.ROUTES.copy()
    dy, gate, up = inputs(torch.float64, (3, 5))
    assert torch.equal(code.geglu(gate, up), reference.geglu(gate, up))
    assert torch.equal(code.geglu(gate.float(), up), reference.geglu(gate.float(), up))
    assert all(map(torch.equal, code.geglu_backward(dy, gate, up), reference.geglu_backward(dy, gate, up)))
    empty = torch.empty(0, 5)
    assert code.geglu(empty, empty).shape == (0, 5)
    across = [x.float().t() for x in (dy, gate, up)]
    assert torch.equal(code.geglu(*across[1:]), code.geglu(*(x.contiguous() for x in across[1:])))
    counted = backends.ROUTES - before
    assert counted == {("geglu", "reference"): 2, ("geglu_backward", "reference"): 1, ("geglu", "native"): 3}


def test_opcheck():
    for dtype in (*DTYPES, torch.float64):
        dy, gate, up = inputs(dtype, (3, 5))
        torch.library.opcheck(ops.geglu, (gate, up))
        torch.library.opcheck(ops.geglu_backward, (dy, gate, up))

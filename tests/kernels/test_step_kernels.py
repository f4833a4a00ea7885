"""The native kernels of a step beside the products: RMSNorm, the gated product, the rotation, the loss, against
`reference.py` and float64; AdamW against torch's own.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import ISAS, same_bits

from qlora_kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned", "threads")


def same_everywhere(kernels, threads, results) -> None:
    """`results()` have the same bits on every instruction set and for two threads."""
    found = []
    for isa, count in [*((isa, 1) for isa in ISAS), (ISAS[-1], 2)]:
        kernels.select(isa)
        threads(count)
        found.append(results())
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


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
        kernels.rms_norm_backward(c, a, b[0], inverse),
        kernels.swiglu(a, b),
        *kernels.swiglu_backward(c, a, b),
        *kernels.swiglu_backward_dots(c, a, b),
    ]


@pytest.mark.parametrize("shape", STEP_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_kernels_equal_the_reference(isa, dtype, shape):
    """To the rounding of float32 inside; then each rounds to its dtype where the reference does."""
    for found, expected in zip(step_results(isa, dtype, shape), step_results(reference, dtype, shape), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(
            found, expected, rtol=2 * eps + 1e-5, atol=(eps + 4e-6) * max(1.0, expected.abs().max().item())
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_kernels_give_the_same_bits_everywhere(kernels, dtype, threads):
    same_everywhere(
        kernels, threads, lambda: [part for shape in STEP_SHAPES for part in step_results(kernels, dtype, shape)]
    )


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
        assert all(
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(results[-1], results[0], strict=True)
        )


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
        assert all(map(same_bits, results[-1], results[0]))


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


def test_the_sums_of_a_gated_product_are_column_dots(isa, threads):
    """To the bit, and beside gradients that are those without the sums."""
    for count, shape in itertools.product((1, 2), ((1, 1), (5, 16), (129, 33), (300, 4100))):
        threads(count)
        dy, gate, up = ((2 * torch.randn(shape)).bfloat16() for _ in range(3))
        dgate, dup, dots = isa.swiglu_backward_dots(dy, gate, up)
        assert all(map(torch.equal, (dgate, dup), isa.swiglu_backward(dy, gate, up)))
        assert torch.equal(dots, torch.stack((isa.column_dots(dgate, gate), isa.column_dots(dup, up))))


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
    q, k, _ = (
        (3 * torch.randn(tokens, heads + 2 * groups, D, generator=generator))
        .to(dtype)
        .split([heads, groups, groups], 1)
    )
    angles = 9 * torch.rand(positions, D, generator=generator)
    return [q, k, *((1.2 * x).to(dtype) for x in (angles.cos(), angles.sin()))]


def rotation_results(kernels, *shape) -> list[torch.Tensor]:
    q, k, cos, sin = rotation(*shape)
    return [*kernels.rotate(q, k, cos, sin), *kernels.rotate_backward(q, k, cos, sin)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotation_is_rounded_once(isa, dtype):
    for shape in ROTATIONS:
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_give_the_same_bits_everywhere(kernels, dtype, threads):
    same_everywhere(
        kernels, threads, lambda: [part for shape in ROTATIONS for part in rotation_results(kernels, *shape, dtype)]
    )


def test_a_rotation_that_does_not_fit_is_refused(kernels):
    q, k, cos, sin = rotation(*ROTATIONS[3], torch.float32)
    for wrong in ((q, k[1:], cos, sin), (q, k, cos[1:], sin), (q, k, cos[1:], sin[1:]), (q, k[..., 1:], cos, sin)):
        with pytest.raises(ValueError, match="turned by"):
            kernels.rotate(*wrong)
    wide = [x.double() for x in (q, k, cos, sin)]
    assert all(map(torch.equal, kernels.rotate(*wide), reference.rotate(*wide)))


def test_cross_entropy_at_the_edges(isa):
    """Sure predictions keep their digits, impossible ones stay finite, and what is no number is not hidden."""
    logits = torch.tensor([[0.0, 30.0, -5.0], [-1e4, 0.0, 1e4], [math.inf, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    losses = isa.cross_entropy_(logits, torch.tensor([1, 0, 1, 1]))
    assert losses[0].item() == pytest.approx(math.exp(-30), rel=1e-3) and logits[0, 1].item() == pytest.approx(
        -math.exp(-30), rel=1e-3
    )
    assert losses[1].item() == pytest.approx(2e4) and logits[1].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-30)
    assert losses[2:].isnan().all()
    for target in (-100, 3):
        with pytest.raises(IndexError, match="targets"):
            isa.cross_entropy_(torch.zeros(1, 3), torch.tensor([target]))


# ---------------------------------------------------------------- AdamW

SIZES = [5, 1, 0, 16, 31, 33, 1, 97, 0, 4096, 8191, 20_001, 2]


def pieces(
    sizes: list[int], gap: int, offset: int, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int], torch.Tensor]:
    """Parameters and gradients at addresses that are multiples of 4 only, and places with gaps between them; and all
    parameters' memory.
    """
    generator = torch.Generator().manual_seed(seed)
    at = [sum(sizes[:i]) + i * gap for i in range(len(sizes))]
    memory = torch.randn(offset + sum(sizes) + len(sizes), generator=generator)
    starts = [offset + sum(sizes[:i]) + i for i in range(len(sizes))]  # one element between them
    spread = 10.0 ** torch.randint(-9, 4, memory.shape, generator=generator)
    gradients = torch.randn(memory.shape, generator=generator) * spread
    return (
        *([x[start : start + size] for start, size in zip(starts, sizes, strict=True)] for x in (memory, gradients)),
        at,
        memory,
    )


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.9), (0.0, 0.0)])
@pytest.mark.parametrize(("gap", "offset"), [(0, 0), (3, 1), (200, 7)])
def test_adamw_has_the_bits_of_torch(isa, threads, betas, gap, offset):
    """On every instruction set, for one thread and two, wherever a piece lies; between the pieces nothing is written."""
    for count, decay, sizes in [(1, 0.1, SIZES), (2, 0.1, SIZES), (2, 0.0, [1, 2, 0] * 200)]:
        threads(count)
        p, _, at, memory = pieces(sizes, gap, offset, 0)
        n = at[-1] + sizes[-1] + gap
        m, v, between = torch.zeros(n), torch.zeros(n), memory[[x.storage_offset() + x.numel() for x in p]].clone()
        theirs = [torch.nn.Parameter(x.clone()) for x in p]
        optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=betas, weight_decay=decay, foreach=False, fused=False)
        second, moments = [x.clone() for x in p], torch.zeros(2, n)
        for step in range(1, 4):
            g, scale = pieces(sizes, gap, offset, step)[1], (1.0, 0.3, 1 / 777)[step - 1]
            scalars = (
                *betas,
                1e-8,
                1 - 1e-2 * decay,
                1e-2 / (1 - betas[0] ** step),
                (1 - betas[1] ** step) ** 0.5,
                scale,
            )
            isa.adamw_(p, g, at, m, v, torch.empty(3, n), *scalars)
            reference.adamw_(second, g, at, *moments, torch.empty(3, n), *scalars)
            for parameter, gradient in zip(theirs, g, strict=True):
                parameter.grad = gradient * scale
            optimizer.step()
        state = [optimizer.state[x] for x in theirs]
        for got, other, x, entry, first in zip(p, second, theirs, state, at, strict=True):
            assert same_bits(got, x.detach()) and same_bits(got, other)
            for moment, name in ((m, "exp_avg"), (v, "exp_avg_sq")):
                assert same_bits(moment[first : first + x.numel()], entry[name])
        assert same_bits(torch.stack((m, v)), moments)
        assert same_bits(memory[[x.storage_offset() + x.numel() for x in p]], between)


def test_the_norm_of_many_pieces(kernels, threads):
    """torch's up to rounding, with the same bits on every instruction set and for any number of threads."""
    for sizes in ([0], [1], SIZES, [1, 2, 0] * 4000, [100_003]):
        tensors = pieces(sizes, 0, 1, 0)[1]
        torch.testing.assert_close(
            kernels.total_norm(tensors).double(), torch.cat(tensors).double().norm(), rtol=1e-6, atol=0
        )
        same_everywhere(kernels, threads, lambda tensors=tensors: [kernels.total_norm(tensors)])
    for bad in (math.inf, -math.inf, math.nan):
        tensors[0][70_000] = bad
        assert str(kernels.total_norm(tensors).item()) == str(abs(bad))
    tall = [torch.randn(30, 40).t(), torch.randn(5, dtype=torch.float64)]
    torch.testing.assert_close(kernels.total_norm(tall), torch.nn.utils.get_total_norm(tall))


def test_adamw_of_any_floats(isa):
    """Subnormal, huge, infinite, and not a number: what the reference makes of them."""
    values = torch.randint(-(1 << 31), 1 << 31, (4, 1 << 14)).to(torch.int32).view(torch.float32)
    ends = []
    for code in (isa, reference):
        p, g, m, v = (x.clone() for x in values)
        code.adamw_([p], [g], [0], m, v, torch.empty(3, len(p)), 0.9, 0.99, 1e-8, 0.9, 1e-3, 0.5, 0.25)
        ends.append(torch.stack((p, m, v)))
    assert (
        same_bits(*(x.nan_to_num(7.0, posinf=math.inf, neginf=-math.inf) for x in ends))
        and ends[0].isfinite().any(1).all()
    )


def test_adamw_refuses_what_does_not_fit(kernels):
    """C code would write past the end."""

    def refused(p: int, g: int, at: list[int], moments: tuple[int, int] = (20, 20), work: int = 20) -> None:
        tensors = [torch.zeros(p)] * 2, [torch.zeros(g)] * 2
        with pytest.raises(ValueError):
            kernels.adamw_(
                *tensors, at, *map(torch.zeros, moments), torch.zeros(3, work), 0.9, 0.99, 1e-8, 0.9, 1e-3, 0.5, 1.0
            )

    for at in ([0, 11], [0, 9], [-1, 10], [0, 10, 20], [0]):
        refused(10, 10, at)
    refused(10, 9, [0, 10])
    refused(10, 10, [0, 10], moments=(20, 19))
    refused(10, 10, [0, 10], work=19)

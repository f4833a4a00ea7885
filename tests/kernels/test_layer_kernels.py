"""The native kernels of an adapted layer: its norms and factors, its products, and the sums of its gradients, against
float64 and `reference.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import NESTED, TOLERANCE, constants, relative, same_bits

from qlora_kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned", "threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_dots(isa, dtype):
    """Sums over tokens to float32 rounding, in any stride; the same bits on every instruction set."""
    for tokens, out in [(0, 5), (1, 1), (3, 70), (128, 64), (129, 1100), (700, 576)]:
        a, b = torch.randn(tokens, out).to(dtype), torch.randn(tokens, out).to(dtype)
        for x, y in ((a, b), (a[:, 1:], b[:, : out - 1]), (a[::2], b[::2]), (a.t().contiguous().t(), b)):
            got, exact = isa.column_dots(x, y), (x.double() * y.double()).sum(0)
            assert got.dtype == torch.float32
            bound = (x.double() * y.double()).abs().sum(0) * 2**-24 * 130 + 1e-30
            assert bool(((got - exact).abs() <= bound).all()), (tokens, out)
            isa.select("portable")
            portable = isa.column_dots(x, y)
            isa.select()
            assert same_bits(portable, isa.column_dots(x, y))


def test_column_dots_of_other_dtypes_take_the_reference(kernels):
    a, b = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    assert torch.equal(kernels.column_dots(a, b), reference.column_dots(a, b))
    assert kernels.column_dots(a, b).dtype == torch.float64
    mixed = kernels.column_dots(a.bfloat16(), b.float())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, (a.bfloat16().float() * b.float()).sum(0))


@pytest.mark.parametrize("double_quant", [False, True])
def test_row_norms(isa, double_quant):
    """Against the dense definition in float64: n^2 to 1e-6 of (||W_j|| + ||s B_j A||)^2, which is what the sums are
    made of.
    """
    for shape in [(1, 1), (1, 5), (7, 64), (33, 77), (5, 4097), (130, 576)]:
        for blocksize in (64, 4096):
            packed, absmax = reference.quantize_nf4(torch.randn(shape), blocksize)
            parts = (packed, *constants(absmax, double_quant))
            W = reference.dequantize_nf4(*parts, None, *shape, blocksize, NESTED, torch.float32).double()
            for rank in (1, 8, 16, 40, 130):
                A, B = torch.randn(rank, shape[1]), torch.randn(shape[0], rank) * 0.02
                got = isa.row_norms_nf4(*parts, A, B, 1.7, *shape, blocksize, NESTED).double()
                update = 1.7 * B.double() @ A.double()
                error = (got.square() - (W + update).square().sum(1)).abs()
                assert bool((error <= 1e-6 * (W.norm(dim=1) + update.norm(dim=1)).square()).all()), (
                    shape,
                    blocksize,
                    rank,
                )


def test_row_norms_of_a_fresh_adapter_do_not_depend_on_it(isa):
    """B = 0: the norm of W itself, bit for bit the same for any A and rank, so that g starts at exactly 1."""
    packed, absmax = reference.quantize_nf4(torch.randn(37, 192), 64)
    weight = (packed, absmax, None, None)
    plain = isa.row_norms_nf4(*weight, torch.zeros(1, 192), torch.zeros(37, 1), 1.0, 37, 192, 64, NESTED)
    assert same_bits(
        plain, isa.row_norms_nf4(*weight, torch.randn(16, 192), torch.zeros(37, 16), 2.0, 37, 192, 64, NESTED)
    )


def test_row_norms_where_the_sums_cancel(isa):
    """s B A takes away all but 1 % of a row, or all of it: those rows come from the dense definition."""
    shape, s = (20, 640), 0.5
    packed, absmax = reference.quantize_nf4(torch.randn(shape), 64)
    weight = (packed, absmax, None, None)
    W = reference.dequantize_nf4(*weight, None, *shape, 64, NESTED, torch.float32)
    A, B = W.clone(), -torch.eye(20) / s
    B[:10] *= 0.99
    B[15:] = 0
    got = isa.row_norms_nf4(*weight, A, B, s, *shape, 64, NESTED).double()
    exact = (W.double() + s * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6 * W.norm(dim=1).max().item())


# tokens, rows, columns, rank, block size: whole tiles and tokens over, more panels than a thread keeps, ranks that fill
# no tile, and what tiles do not take
LAYERS = [
    (32, 32, 64, 1, 64),
    (33, 96, 64, 16, 64),
    (95, 64, 128, 40, 128),
    (300, 160, 192, 17, 64),
    (70, 32, 4096, 16, 256),
    (40, 2048, 64, 5, 64),
    (64, 96, 64, 80, 64),
    (31, 64, 64, 3, 64),
    (50, 33, 70, 4, 32),
]


def drawn_layer(tokens, rows, columns, rank, blocksize, nested, dtype=torch.bfloat16):
    packed, absmax = reference.quantize_nf4(torch.randn(rows, columns), blocksize)
    constants_, shape = constants(absmax, nested), (rows, columns, blocksize, NESTED)
    W = reference.dequantize_nf4(packed, *constants_, None, *shape, torch.float64)
    A, B, m = torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank) * 0.3, torch.rand(rows) + 0.5
    x, dy = torch.randn(tokens, columns).to(dtype), torch.randn(tokens, rows).to(dtype)
    return (packed, *constants_, *shape), W, A, B, m, x, dy


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "float32 scales"])
def test_products_of_a_layer(isa, threads, nested):
    """Forward and backward against float64, with a given n and with one made on the way; our kernels give the same bits
    for any number of threads.
    """
    for size in LAYERS:
        weight, W, A, B, m, x, dy = drawn_layer(*size, nested)
        s, other = 0.7, torch.randn_like(x)
        V = W + s * B.double() @ A.double()
        n = V.norm(dim=1)
        for magnitude, norm in ((None, None), (m, n.float()), (m, None)):
            gain = torch.ones(len(m), dtype=torch.float64) if magnitude is None else m.double() / n
            found, back = [], []
            for count in (1, 2, 5):
                threads(count)
                found.append(isa.adapted_product(x, other, A, B, magnitude, norm, W.norm(dim=1).float(), s, *weight))
                y, u, down, up, factors = found[-1]
                back.append(
                    isa.adapted_product_backward(
                        dy, x, down, up, u, None if magnitude is None else y, factors, s, *weight, True
                    )
                )
            for results in (found, back):
                same = all(same_bits(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))
                assert same or not isa.multiplies(x, *weight), (size, norm is None)
            expected = (x.double() @ W.t() + s * (other.double() @ A.double().t()) @ B.double().t()) * gain
            assert relative(y, expected) < 0.02 and y.dtype == x.dtype, size
            assert (
                relative(u, other.double() @ A.double().t()) < 0.02
                and relative(up, s * gain.unsqueeze(1) * B) < 0.01
                and relative(down, A) < 0.01
            )
            assert factors.shape == (0 if magnitude is None else 3, len(m))
            if magnitude is not None:
                torch.testing.assert_close(
                    factors.double(), torch.stack((gain, m.double(), n)), rtol=3e-4 if norm is None else 1e-6, atol=0
                )  # updates as large as W
            dx, dA, dB, dm = back[0]
            wide, g = dy.double(), gain.unsqueeze(1)
            assert relative(dx, wide @ (g * V)) < 0.02 and dx.dtype == dy.dtype
            assert (
                relative(dA, (wide @ (g * s * B)).t() @ x.double()) < 0.02
                and relative(dB, g * s * (wide.t() @ u.double())) < 0.02
            )
            assert dm.numel() == 0 if magnitude is None else relative(dm, (wide * y.double()).sum(0) / m) < 0.02
            assert isa.adapted_product_backward(dy, x, down, up, u, None, factors, s, *weight, False)[0].numel() == 0
        for row_gain in (None, m):
            scaled = W if row_gain is None else m.double().unsqueeze(1) * W
            *parts, rows, columns, blocksize, nested_blocksize = weight
            for source, matrix, transposed in ((x, scaled.t(), True), (dy, scaled, False)):
                product = isa.nf4_product(
                    source, *parts, row_gain, rows, columns, blocksize, nested_blocksize, transposed
                )
                assert relative(product, source.double() @ matrix) < 0.02, (size, transposed)


def test_a_norm_made_on_the_way_where_its_sums_cancel(isa):
    """A lies along rows of W, where rounding W counts most, and takes some or all of them away; B = 0 in others, whose
    n is the base's to the bit.
    """
    weight, W, _, _, m, x, _ = drawn_layer(64, 64, 192, 64, 64, True)
    base, B = W.norm(dim=1).float(), torch.zeros(64, 64)
    for taken in (0.0, 0.1, 0.25, 0.5, 1.0):
        B[:8, :8] = -taken * torch.eye(8)
        n = isa.adapted_product(x, x, W.float(), B, m, None, base, 1.0, *weight)[4][2]
        torch.testing.assert_close(
            n[:8], (1 - taken) * base[:8], rtol=1e-3 if taken < 0.29 else 1e-5, atol=1e-4 if taken == 1 else 0
        )
        torch.testing.assert_close(n[8:], base[8:], rtol=0 if isa.bf16_unit == "AMX" and taken < 0.29 else 1e-6, atol=0)


def test_products_refuse_what_does_not_fit(isa):
    weight, W, A, B, m, x, dy = drawn_layer(40, 64, 128, 4, 64, True)
    *parts, rows, columns, blocksize, nested = weight
    for call in (
        lambda: isa.adapted_product(x[:, :64], x[:, :64], A, B, m, m, None, 1.0, *weight),
        lambda: isa.adapted_product(x, x, A, B[:32], m, m, None, 1.0, *weight),
        lambda: isa.adapted_product_backward(
            dy[:, :32], x, A.bfloat16(), B.bfloat16(), x[:, :4], None, torch.empty(0, 64), 1.0, *weight, True
        ),
        lambda: isa.nf4_product(x, *parts, m[:5], rows, columns, blocksize, nested, True),
        lambda: isa.nf4_product(x, *parts, None, rows, columns, blocksize, nested, False),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_over_tokens(isa, dtype):
    """v, dB, dm and dA against float64, at sizes that fill no tile and at some that take several parts and strips."""
    for tokens, out, rank in ((1, 1, 1), (31, 32, 17), (33, 70, 5), (513, 300, 40), (1100, 290, 16), (40, 64, 80)):
        dy, y = (torch.randn(tokens, 2 * out)[:, ::2].to(dtype) for _ in range(2))
        u, up = torch.randn(tokens, rank).to(dtype), torch.randn(out, rank).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        gain, safe = torch.randn(out, dtype=wide), torch.rand(out, dtype=wide) + 0.5
        exact_dB = dy.double().t() @ u.double()
        for factor, beside in ((gain, y), (None, None)):
            v, dB, dm = isa.adapter_gradients(dy, up, u, beside, factor, safe, 1.7)
            assert (v.dtype, dB.dtype, dm.dtype) == (dtype, wide, wide)
            assert relative(v, dy.double() @ up.double()) < TOLERANCE[dtype]
            assert (
                relative(dB, exact_dB * (1.7 if factor is None else 1.7 * gain.double().unsqueeze(1)))
                < TOLERANCE[dtype]
            )
            if beside is None:
                assert dm.numel() == 0
            else:
                assert (
                    relative(dm, (dy.double() * y.double()).sum(0) / safe.double()) < 1e-6
                )  # summed wide, whatever dtype
        dA = isa.token_product(u, dy)
        assert dA.dtype == wide and relative(dA, exact_dB.t()) < TOLERANCE[dtype]


def test_sums_over_tokens_refuse_what_does_not_fit(isa):
    dy, u, up = torch.randn(8, 32).bfloat16(), torch.randn(8, 4).bfloat16(), torch.randn(32, 4).bfloat16()
    for arguments in (
        (dy, up[:-1], u, None, None, None),
        (dy, up, u, dy[:, 1:], None, torch.ones(32)),
        (dy, up, u, None, torch.ones(31), None),
        (dy, up, u[1:], None, None, None),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            isa.adapter_gradients(*arguments, 1.0)
    with pytest.raises((ValueError, RuntimeError)):
        isa.token_product(u[1:], dy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_equal_the_reference(isa, dtype):
    """To the bit, with the guards of norms and magnitudes near zero, and what is no number stays none."""
    for rank, columns, rows in ((1, 1, 1), (3, 70, 33), (16, 576, 3000)):
        A, B, m, n = torch.randn(rank, columns), torch.randn(rows, rank), torch.randn(rows), torch.rand(rows)
        m[0], n[-1] = -1e-9, 0.0
        m[rows // 2] = math.nan
        for parts in ((m, n), (None, None)):
            found, expected = (
                isa.fold_factors(A, B, *parts, 0.7, dtype),
                reference.fold_factors(A, B, *parts, 0.7, dtype),
            )
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(ours.isnan(), theirs.isnan())
                assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    with pytest.raises(ValueError, match="for 3 rows"):
        isa.fold_factors(torch.randn(2, 8), torch.randn(3, 2), torch.ones(4), torch.ones(4), 1.0, dtype)

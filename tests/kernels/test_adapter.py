"""LoRA and DoRA by the native CPU kernels: norms and factors, a layer's products, and the sums of its gradients,
against float64 and the reference.

`isa` is the kernels themselves; `routed(isa)` the operators with them, which take the reference for shapes and dtypes
without a kernel.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, TOLERANCE, decoded, pairwise, quantized, relative, routed, same_bits

from qlora_kernels import reference
from qlora_kernels.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("poisoned", "threads")

# ---------------------------------------------------------------- row norms


@pytest.mark.parametrize(
    ("shape", "blocksize", "rank", "double_quant"),
    pairwise(
        [(1, 1), (1, 5), (7, 64), (33, 77), (5, 4097), (130, 576)], [64, 4096], [1, 8, 16, 40, 130], [False, True]
    ),
    ids=str,
)
def test_row_norms(isa, shape, blocksize, rank, double_quant):
    """Against the dense definition in float64: n^2 to 1e-6 of (||W_j|| + ||s B_j A||)^2, which is what the sums are
    made of.
    """
    weight = quantized(torch.randn(shape), blocksize, double_quant)
    W = decoded(weight).double()
    A, B = torch.randn(rank, shape[1]), torch.randn(shape[0], rank) * 0.02
    got = isa.row_norms_4bit(weight.parts, weight.layout, A, B, 1.7).double()
    update = 1.7 * B.double() @ A.double()
    error = (got.square() - (W + update).square().sum(1)).abs()
    assert bool((error <= 1e-6 * (W.norm(dim=1) + update.norm(dim=1)).square()).all())


def test_row_norms_of_a_fresh_adapter_do_not_depend_on_it(isa):
    """B = 0: the norm of W itself, bit for bit the same for any A and rank, so that g starts at exactly 1."""
    weight = quantized(torch.randn(37, 192), double_quant=False)
    plain = isa.row_norms_4bit(weight.parts, weight.layout, torch.zeros(1, 192), torch.zeros(37, 1), 1.0)
    other = isa.row_norms_4bit(weight.parts, weight.layout, torch.randn(16, 192), torch.zeros(37, 16), 2.0)
    assert same_bits(plain, other)


def test_row_norms_where_the_sums_cancel(isa):
    """s B A takes away all but 1 % of a row, or all of it: those rows come from the dense definition."""
    shape, s = (20, 640), 0.5
    weight = quantized(torch.randn(shape), double_quant=False)
    W = decoded(weight)
    A, B = W.clone(), -torch.eye(20) / s
    B[:10] *= 0.99
    B[15:] = 0
    got = isa.row_norms_4bit(weight.parts, weight.layout, A, B, s).double()
    exact = (W.double() + s * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6 * W.norm(dim=1).max().item())


@pytest.mark.parametrize("double_quant", [False, True])
def test_row_norms_of_many_layers_are_those_of_each(isa, double_quant):
    """To the bit; weights, layouts and adapters of different sizes in flat lists."""
    weights = [quantized(torch.randn(shape), 64, double_quant) for shape in ((5, 64), (33, 77), (8, 128))]
    A = [torch.randn(r, w.shape[1]) for r, w in zip((1, 4, 16), weights, strict=True)]
    B = [torch.randn(w.shape[0], len(a)) for a, w in zip(A, weights, strict=True)]
    parts, layouts = [p for w in weights for p in w.parts], [n for w in weights for n in w.layout]
    scaling = [1.0, 0.5, 2.0]
    operators, rest = routed(isa), list(zip(A, B, scaling, strict=True))
    together = operators.row_norms_4bit_all(parts, layouts, A, B, scaling)
    each = [operators.row_norms_4bit(w.parts, w.layout, *own) for w, own in zip(weights, rest, strict=True)]
    assert all(map(same_bits, together, each))
    expected = reference.row_norms_4bit_all(parts, layouts, A, B, scaling)
    assert [a.shape for a in together] == [(5,), (33,), (8,)]
    assert max(map(relative, together, expected)) < 1e-6
    assert operators.row_norms_4bit_all([], [], [], [], []) == []


@pytest.mark.parametrize("blocksize", [48, 64])
def test_row_norms_in_float64_go_to_the_reference(kernels, blocksize):
    weight = quantized(torch.randn(6, 96, dtype=torch.float64), blocksize, double_quant=False)
    A, B = torch.randn(4, 96, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    got = routed(kernels).row_norms_4bit(weight.parts, weight.layout, A, B, 1.0)
    W = decoded(weight, torch.float64)
    torch.testing.assert_close(got, (W + B @ A).norm(dim=1), rtol=1e-14, atol=0)


def test_row_norms_refuse_what_does_not_fit(kernels):
    weight = quantized(torch.randn(4, 64), double_quant=False)
    with pytest.raises(ValueError, match="do not fit a weight of 4 x 64"):
        kernels.row_norms_4bit(weight.parts, weight.layout, torch.ones(2, 63), torch.ones(4, 2), 1.0)


# ---------------------------------------------------------------- factors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank, columns, rows", [(1, 1, 1), (3, 70, 33), (16, 576, 3000)])
@pytest.mark.parametrize("magnitude", [True, False], ids=["DoRA", "LoRA"])
def test_factors_equal_the_reference(isa, dtype, rank, columns, rows, magnitude):
    """To the bit, with the guards of norms and magnitudes near zero, and what is no number stays none."""
    A, B, m, n = torch.randn(rank, columns), torch.randn(rows, rank), torch.randn(rows), torch.rand(rows)
    m[0], n[-1] = -1e-9, 0.0
    m[rows // 2] = math.nan
    arguments = (A, B, *((m, n) if magnitude else (None, None)), 0.7, dtype)
    found, expected = isa.prepare_lora_factors(*arguments), reference.prepare_lora_factors(*arguments)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_factors_refuse_what_does_not_fit(isa):
    with pytest.raises(ValueError, match="for 3 rows"):
        isa.prepare_lora_factors(torch.randn(2, 8), torch.randn(3, 2), torch.ones(4), torch.ones(4), 1.0, torch.float32)


# ---------------------------------------------------------------- a whole layer

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
SIZES = pytest.mark.parametrize("size", LAYERS, ids=lambda size: "x".join(map(str, size)))
NESTED = pytest.mark.parametrize("nested", [True, False], ids=["nested", "float32 scales"])


def drawn_layer(
    tokens: int, rows: int, columns: int, rank: int, blocksize: int, nested: bool
) -> tuple[QuantizedWeight, *tuple[torch.Tensor, ...]]:
    """A weight, the same dense in float64, A, B, m, x, dy."""
    weight = quantized(torch.randn(rows, columns), blocksize, nested)
    A, B, m = torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank) * 0.3, torch.rand(rows) + 0.5
    x, dy = torch.randn(tokens, columns).bfloat16(), torch.randn(tokens, rows).bfloat16()
    return weight, decoded(weight, torch.float64), A, B, m, x, dy


@SIZES
@NESTED
@pytest.mark.parametrize("adapter", ["LoRA", "DoRA, n given", "DoRA, n made"])
def test_products_of_a_layer(isa, threads, size, nested, adapter):
    """Forward and backward against float64, with a given n and with one made on the way; our kernels give the same bits
    for any number of threads.
    """
    weight, W, A, B, m, x, dy = drawn_layer(*size, nested)
    operators, s, other = routed(isa), 0.7, torch.randn_like(x)
    V = W + s * B.double() @ A.double()
    n, dora = V.norm(dim=1), adapter != "LoRA"
    row_scale = m.double() / n if dora else torch.ones(len(m), dtype=torch.float64)
    given = (m if dora else None, n.float() if adapter == "DoRA, n given" else None, W.norm(dim=1).float())
    found, back = [], []
    for count in (1, 2, 5):
        threads(count)
        found.append(operators.adapted_linear(x, other, A, B, *given, s, weight.parts, weight.layout))
        y, *saved = found[-1]
        y = y if dora else None
        back.append(operators.adapted_linear_backward(dy, [x, *saved], y, s, weight.parts, weight.layout, True))
    for results in (found, back):
        same = all(same_bits(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))
        assert same or not isa.supports_fused_gemm(x, weight.parts, weight.layout)
    y, xA, A_cast, B_scaled, factors = found[-1]
    expected = (x.double() @ W.t() + s * (other.double() @ A.double().t()) @ B.double().t()) * row_scale
    assert relative(y, expected) < 0.02 and y.dtype == x.dtype
    assert relative(xA, other.double() @ A.double().t()) < 0.02
    assert relative(B_scaled, s * row_scale.unsqueeze(1) * B) < 0.01 and relative(A_cast, A) < 0.01
    assert factors.shape == (3 if dora else 0, len(m))
    if dora:
        exact = torch.stack((row_scale, m.double(), n))
        rtol = 3e-4 if adapter == "DoRA, n made" else 1e-6  # updates as large as W
        torch.testing.assert_close(factors.double(), exact, rtol=rtol, atol=0)
    dx, dA, dB, dm = back[0]
    wide, g = dy.double(), row_scale.unsqueeze(1)
    assert relative(dx, wide @ (g * V)) < 0.02 and dx.dtype == dy.dtype
    assert relative(dA, (wide @ (g * s * B)).t() @ x.double()) < 0.02
    assert relative(dB, g * s * (wide.t() @ xA.double())) < 0.02
    assert relative(dm, (wide * y.double()).sum(0) / m) < 0.02 if dora else dm.numel() == 0
    saved = [x, xA, A_cast, B_scaled, factors]
    without = operators.adapted_linear_backward(dy, saved, None, s, weight.parts, weight.layout, False)
    assert without[0].numel() == 0


@SIZES
@NESTED
def test_products_of_a_weight(isa, threads, size, nested):
    threads(5)
    weight, W, _, _, m, x, dy = drawn_layer(*size, nested)
    for row_scale in (None, m):
        scaled = W if row_scale is None else m.double().unsqueeze(1) * W
        for source, matrix, transposed in ((x, scaled.t(), True), (dy, scaled, False)):
            product = routed(isa).matmul_4bit(source, weight.parts, weight.layout, row_scale, transposed)
            assert relative(product, source.double() @ matrix) < 0.02, (row_scale is not None, transposed)


@SIZES
def test_products_err_by_their_rounding_alone(isa, size):
    """Against float64: what is lost is what one rounding to bf16 loses, of the result, and of the weight where products
    of bf16 make it.
    """
    weight, W, _, _, m, x, dy = drawn_layer(*size, True)
    if not isa.supports_fused_gemm(x, weight.parts, weight.layout):
        return
    forward = backward = m.double().unsqueeze(1) * W
    if isa.layers_in_bf16 or isa.bf16_unit == "AMX":
        forward = backward = decoded(weight, torch.bfloat16, m).double()
    if isa.bf16_unit == "AMX":  # the gain goes onto sums
        forward = m.double().unsqueeze(1) * decoded(weight, torch.bfloat16).double()
    for source, matrix, transposed in ((x, forward.t(), True), (dy, backward, False)):
        exact = source.double() @ matrix
        found = isa.matmul_4bit(source, weight.parts, weight.layout, m, transposed)
        errors = [(rounded.double() - exact).norm(dim=1) for rounded in (found, exact.bfloat16())]
        assert bool((errors[0] <= 1.1 * errors[1] + 1e-4 * exact.norm(dim=1)).all())


def test_products_have_kernels_where_tiles_fit(isa):
    """The first seven sizes are whole tiles, the eighth only of the weight: none of them is left to the reference, but
    that AMX wants 32 tokens.
    """
    whole = LAYERS[: 7 if isa.bf16_unit == "AMX" else 8]
    for size in LAYERS:
        weight, _, A, B, m, x, _ = drawn_layer(*size, True)
        fits = isa.layers > 0 and size in whole
        assert isa.supports_fused_gemm(x, weight.parts, weight.layout) == fits, size
        found = isa.adapted_linear(x, x, A, B, m, None, None, 0.7, weight.parts, weight.layout)
        assert (found is not NotImplemented) == fits, size


def test_a_norm_made_on_the_way_where_its_sums_cancel(isa):
    """A lies along rows of W, where rounding W counts most, and takes some or all of them away; B = 0 in others, whose
    n is the base's to the bit.
    """
    weight, W, _, _, m, x, _ = drawn_layer(64, 64, 192, 64, 64, True)
    base, B = W.norm(dim=1).float(), torch.zeros(64, 64)
    for taken in (0.0, 0.1, 0.25, 0.5, 1.0):
        B[:8, :8] = -taken * torch.eye(8)
        made = routed(isa).adapted_linear(x, x, W.float(), B, m, None, base, 1.0, weight.parts, weight.layout)
        n, rtol = made[4][2], 1e-3 if taken < 0.29 else 1e-5
        torch.testing.assert_close(n[:8], (1 - taken) * base[:8], rtol=rtol, atol=1e-4 if taken == 1 else 0)
        torch.testing.assert_close(n[8:], base[8:], rtol=0 if isa.bf16_unit == "AMX" and taken < 0.29 else 1e-6, atol=0)


def test_products_refuse_what_does_not_fit(isa):
    weight, _, A, B, m, x, dy = drawn_layer(40, 64, 128, 4, 64, True)
    operators, parts = routed(isa), (weight.parts, weight.layout)
    saved = [x, x[:, :4], A.bfloat16(), B.bfloat16(), torch.empty(0, 64)]
    for call in (
        lambda: operators.adapted_linear(x[:, :64], x[:, :64], A, B, m, m, None, 1.0, *parts),
        lambda: operators.adapted_linear(x, x, A, B[:32], m, m, None, 1.0, *parts),
        lambda: operators.adapted_linear_backward(dy[:, :32], saved, None, 1.0, *parts, True),
        lambda: operators.matmul_4bit(x, *parts, m[:5], True),
        lambda: operators.matmul_4bit(x, *parts, None, False),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()


# ---------------------------------------------------------------- sums over tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, out", [(0, 5), (1, 1), (3, 70), (128, 64), (129, 1100), (700, 576)])
def test_columnwise_dot(isa, dtype, tokens, out):
    """Sums over tokens to float32 rounding, in any stride; the same bits on every instruction set."""
    a, b = torch.randn(tokens, out).to(dtype), torch.randn(tokens, out).to(dtype)
    for x, y in ((a, b), (a[:, 1:], b[:, : out - 1]), (a[::2], b[::2]), (a.t().contiguous().t(), b)):
        got, exact = isa.columnwise_dot(x, y), (x.double() * y.double()).sum(0)
        assert got.dtype == torch.float32
        bound = (x.double() * y.double()).abs().sum(0) * 2**-24 * 130 + 1e-30
        assert bool(((got - exact).abs() <= bound).all())
        isa.select("portable")
        portable = isa.columnwise_dot(x, y)
        isa.select()
        assert same_bits(portable, isa.columnwise_dot(x, y))


def test_columnwise_dot_of_other_dtypes_goes_to_the_reference(kernels):
    columnwise_dot = routed(kernels).columnwise_dot
    a, b = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    assert torch.equal(columnwise_dot(a, b), reference.columnwise_dot(a, b))
    assert columnwise_dot(a, b).dtype == torch.float64
    mixed = columnwise_dot(a.bfloat16(), b.float())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, (a.bfloat16().float() * b.float()).sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "tokens, out, rank", [(1, 1, 1), (31, 32, 17), (33, 70, 5), (513, 300, 40), (1100, 290, 16), (40, 64, 80)]
)
def test_sums_over_tokens(isa, dtype, tokens, out, rank):
    """v, dB, dm and dA against float64, at sizes that fill no tile and at some that take several parts and strips."""
    dy, y = (torch.randn(tokens, 2 * out)[:, ::2].to(dtype) for _ in range(2))
    xA, B_scaled = torch.randn(tokens, rank).to(dtype), torch.randn(out, rank).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    row_scale, m_clamped = torch.randn(out, dtype=wide), torch.rand(out, dtype=wide) + 0.5
    exact_dB = dy.double().t() @ xA.double()
    for factor, beside in ((row_scale, y), (None, None)):
        v, dB, dm = isa.adapter_gradients(dy, B_scaled, xA, beside, factor, m_clamped, 1.7)
        assert (v.dtype, dB.dtype, dm.dtype) == (dtype, wide, wide)
        assert relative(v, dy.double() @ B_scaled.double()) < TOLERANCE[dtype]
        scaling = 1.7 if factor is None else 1.7 * row_scale.double().unsqueeze(1)
        assert relative(dB, exact_dB * scaling) < TOLERANCE[dtype]
        if beside is None:
            assert dm.numel() == 0
        else:  # summed wide, whatever dtype
            assert relative(dm, (dy.double() * y.double()).sum(0) / m_clamped.double()) < 1e-6
    dA = routed(isa).matmul_tn(xA, dy)
    assert dA.dtype == wide and relative(dA, exact_dB.t()) < TOLERANCE[dtype]


def test_sums_over_tokens_refuse_what_does_not_fit(isa):
    dy, xA, B_scaled = torch.randn(8, 32).bfloat16(), torch.randn(8, 4).bfloat16(), torch.randn(32, 4).bfloat16()
    for arguments in (
        (dy, B_scaled[:-1], xA, None, None, None),
        (dy, B_scaled, xA, dy[:, 1:], None, torch.ones(32)),
        (dy, B_scaled, xA, None, torch.ones(31), None),
        (dy, B_scaled, xA[1:], None, None, None),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            isa.adapter_gradients(*arguments, 1.0)
    with pytest.raises((ValueError, RuntimeError)):
        routed(isa).matmul_tn(xA[1:], dy)


def test_results_do_not_depend_on_the_number_of_threads(isa, threads):
    """Large enough that every operator splits its work; 3 threads leave uneven shares."""
    weight, narrower = quantized(torch.randn(300, 1153)), quantized(torch.randn(300, 1152))
    A, B = torch.randn(24, 1153), torch.randn(300, 24)
    a, b = torch.randn(900, 1200).bfloat16(), torch.randn(900, 1200).bfloat16()
    xA, B_scaled = torch.randn(900, 24).bfloat16(), torch.randn(1200, 24).bfloat16()

    def everything() -> dict[str, torch.Tensor]:
        gradients = isa.adapter_gradients(a, B_scaled, xA, b, None, torch.ones(1200), 2.0)
        return {
            "norms": isa.row_norms_4bit(weight.parts, weight.layout, A, B, 2.0),
            "norms of whole blocks": isa.row_norms_4bit(
                narrower.parts, narrower.layout, A[:, :1152].contiguous(), B, 2.0
            ),
            "dots": isa.columnwise_dot(a, b),
            **dict(zip(("v", "dB", "dm"), gradients, strict=True)),
            "dA": routed(isa).matmul_tn(xA, a),
        }

    threads(1)
    alone = everything()
    for count in (2, 3):
        threads(count)
        found = everything()
        assert [name for name in alone if not same_bits(alone[name], found[name])] == [], count

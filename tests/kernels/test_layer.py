"""An adapted layer in float32 as one native operator, with AVX2 and AVX-512, and its products by 16-bit integers.

The oracle is float64. test_adapter.py has the same operators in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import decoded, quantized, relative, same_bits
from torch import Tensor

from qlora_kernels import reference
from qlora_kernels.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("poisoned", "threads")

# tokens, rows, columns, rank, block size: tiles and tokens over, less than a tile, widths and ranks of several depths,
# ranks that fill nothing
LAYERS = [
    (32, 32, 64, 1, 64),
    (33, 96, 64, 16, 64),
    (95, 64, 128, 40, 128),
    (130, 160, 192, 17, 64),
    (70, 32, 4096, 16, 256),
    (41, 2048, 64, 5, 64),
    (32, 96, 1600, 900, 64),
    (1, 96, 128, 16, 64),
    (5, 64, 192, 3, 64),
    (31, 2048, 64, 17, 64),
]
SIZES = pytest.mark.parametrize("size", LAYERS, ids=lambda size: "x".join(map(str, size)))
S = 0.7


@pytest.fixture(params=["highest", "high"])
def precision(request) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def tolerance(isa, precision: str) -> float:
    """Of the large products, relative to the largest value: a tenth of what bf16 leaves where integers do them."""
    return 6e-4 if precision == "high" and isa.layers == 2 else 5e-6


def drawn(tokens: int, rows: int, columns: int, rank: int, blocksize: int) -> tuple[QuantizedWeight, list[Tensor]]:
    """A weight, and A, B, m, x, dy."""
    weight = quantized(torch.randn(rows, columns), blocksize)
    A, B = torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank) * 0.3
    m = (torch.rand(rows) + 0.5) * torch.randn(rows).sign()
    return weight, [A, B, m, torch.randn(tokens, columns), torch.randn(tokens, rows)]


def both_ways(isa, weight: QuantizedWeight, drawn: list[Tensor], dora: bool, other: Tensor) -> list[Tensor]:
    """y, xA, A, B, factors, dx, dA, dB, dm."""
    A, B, m, x, dy = drawn
    operands = (S, weight.parts, weight.layout)
    y, *saved = isa.adapted_linear(x, other, A, B, m if dora else None, None, None, *operands)
    back = isa.adapted_linear_backward(dy, [other, *saved], y if dora else None, *operands, True)
    return [y, *saved, *back]


@SIZES
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_layer_in_float32(isa, threads, precision, size, dora):
    """Against float64, forward and backward; the same bits for any number of threads."""
    weight, parts = drawn(*size)
    A, B, m, x, dy = parts
    other, W, wide = torch.randn_like(x), decoded(weight, torch.float64), dy.double()
    if not isa.layers:
        assert isa.adapted_linear(x, x, A, B, None, None, None, S, weight.parts, weight.layout) is NotImplemented
        return
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(both_ways(isa, weight, parts, dora, other))
    assert all(same_bits(a, b) for found in results[1:] for a, b in zip(results[0], found, strict=True))
    y, xA, _, B_scaled, factors, dx, dA, dB, dm = results[0]
    V = W + S * B.double() @ A.double()
    g = (m.double() / V.norm(dim=1) if dora else torch.ones(len(m), dtype=torch.float64)).unsqueeze(1)
    within = tolerance(isa, precision)
    assert relative(y, (x.double() @ W.t() + S * (other.double() @ A.double().t()) @ B.double().t()) * g.t()) < within
    assert relative(dx, wide @ (g * V)) < within
    exact = {  # the adapter's own products are float32 in either precision
        "xA": (xA, other.double() @ A.double().t()),
        "B": (B_scaled, S * g * B),
        "dA": (dA, (wide @ (g * S * B)).t() @ other.double()),
        "dB": (dB, g * S * (wide.t() @ (other.double() @ A.double().t()))),
        **({"dm": (dm, (wide * y.double()).sum(0) / m), "g": (factors[0], g.squeeze(1))} if dora else {}),
    }
    assert {name: relative(*pair) for name, pair in exact.items() if relative(*pair) > 5e-6} == {}
    assert factors.shape == (3 if dora else 0, len(m)) and dm.numel() == (len(m) if dora else 0)


@SIZES
def test_products_of_a_weight_in_float32(isa, precision, size):
    weight, (_, _, m, x, dy) = drawn(*size)
    W = decoded(weight, torch.float64)
    for row_scale in (None, m) if isa.layers else ():
        scaled = W if row_scale is None else m.double().unsqueeze(1) * W
        for source, matrix, transposed in ((x, scaled.t(), True), (dy, scaled, False)):
            product = isa.matmul_4bit(source, weight.parts, weight.layout, row_scale, transposed)
            assert relative(product, source.double() @ matrix) < tolerance(isa, precision)


def test_float32_has_kernels_with_avx2_and_more(isa):
    weight, (_, _, _, x, _) = drawn(*LAYERS[0])
    assert isa.supports_fused_gemm(x, weight.parts, weight.layout) == (isa.isa != "portable C++") == (isa.layers > 0)
    assert isa.supports_fused_gemm(x[:1], weight.parts, weight.layout) == (isa.layers > 0)
    assert not isa.supports_fused_gemm(x[:0], weight.parts, weight.layout)
    assert not isa.supports_fused_gemm(x.double(), weight.parts, weight.layout)


@SIZES
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_bf16_that_nothing_multiplies_is_float32_between_reading_and_writing(isa, precision, size, dora):
    """The same bits as in float32, rounded at the end, and by integers without anybody's leave. A gain rounds what a
    forward pass multiplies, so those of DoRA are near.
    """
    weight, parts = drawn(*size)
    A, B, m, x, dy = (part.bfloat16() for part in parts)
    if not isa.layers or isa.layers_in_bf16 or isa.bf16_unit == "AMX":
        return
    A, B, m, n = A.float(), B.float(), m.float() if dora else None, torch.rand(len(B)) + 0.5 if dora else None
    operands = (0.5, weight.parts, weight.layout)
    low, *saved = isa.adapted_linear(x, x, A, B, m, n, None, *operands)
    found = isa.adapted_linear_backward(dy, [x, *saved], low if dora else None, *operands, True)
    torch.set_float32_matmul_precision("high")  # in float32 they need it
    y, xA, *_ = isa.adapted_linear(x.float(), x.float(), A, B, m, n, None, *operands)
    wide = [part.float() for part in (x, *saved)]
    expected = isa.adapted_linear_backward(dy.float(), wide, low.float() if dora else None, *operands, True)
    assert {part.dtype for part in (low, *saved[:3], found[0])} == {torch.bfloat16}
    assert relative(low, y) < 4e-3 if dora else same_bits(low, y.bfloat16())
    if dora:  # results in another type would be read as what they are not
        mixed = isa.adapted_linear_backward(dy, [x, *saved], low.float(), *operands, True)
        assert mixed is NotImplemented
    assert same_bits(saved[0], xA.bfloat16()) and same_bits(found[0], expected[0].bfloat16())
    assert all(map(same_bits, found[1:], expected[1:]))


def against_bf16(isa, x: Tensor, dy: Tensor, weight: QuantizedWeight, row_scale: Tensor) -> None:
    """The errors of integers and of bf16's own path (weight and result rounded; what goes in is bf16 already), by the
    root of the mean square of a token's: the worst token's by integers is below the best one's in bf16.
    """
    W = row_scale.double().unsqueeze(1) * decoded(weight, torch.float64)
    bf16 = decoded(weight, torch.bfloat16, row_scale).double()
    for source, transposed in ((x.bfloat16(), True), (dy.bfloat16(), False)):
        exact = source.double() @ (W.t() if transposed else W)
        rounded = (source.double() @ (bf16.t() if transposed else bf16)).bfloat16()
        ours = isa.matmul_4bit(source.float(), weight.parts, weight.layout, row_scale, transposed)
        error = [((found.double() - exact).norm(dim=1) / exact.norm(dim=1)) for found in (ours, rounded)]
        assert error[0].max() < error[1].min()


@pytest.mark.parametrize("kind", ["even", "heavy tails", "columns and tokens that stand out"])
def test_float32_by_integers_errs_less_than_bf16(isa, precision, kind):
    """Where scales differ most within what shares one: heavy tails, a column a hundred times as large, rows and tokens
    that differ.
    """
    x, dy, W = torch.randn(64, 192), torch.randn(64, 320), torch.randn(320, 192)
    if kind == "heavy tails":
        t = torch.distributions.StudentT(3.0)
        x, dy, W = t.sample(x.shape), t.sample(dy.shape), W * torch.randn(320, 1).exp()
    elif kind != "even":
        x[:, 7] *= 100
        dy[:, 5] *= 100
        x, dy = (t * (4 * torch.randn(64, 1)).exp() for t in (x, dy))
        W *= (torch.randn(320, 1) / 2).exp()
    if isa.layers:
        against_bf16(isa, x, dy, quantized(W), torch.rand(320) + 0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(isa, precision, value):
    """In its own token alone, so that a training step that went wrong is seen."""
    weight, (_, _, _, x, dy) = drawn(*LAYERS[1])
    x[3, 5] = dy[4, 70] = value
    for source, token, transposed in ((x, 3, True), (dy, 4, False)) if isa.layers else ():
        y = isa.matmul_4bit(source, weight.parts, weight.layout, None, transposed)
        finite = y.isfinite().all(1)
        assert finite.sum() == len(y) - 1 and not finite[token]


def test_the_largest_integers_do_not_overflow(isa, precision):
    """Every value at its block's largest, all of one sign: the sum of 64 is as large as it can be."""
    weight = quantized(torch.full((64, 128), 2.5), double_quant=False)
    x, dy = torch.full((40, 128), -3.0), torch.full((40, 64), 1e30)
    for source, exact, transposed in ((x, -3.0 * 2.5 * 128, True), (dy, 1e30 * 2.5 * 64, False)) if isa.layers else ():
        y = isa.matmul_4bit(source, weight.parts, weight.layout, None, transposed)
        torch.testing.assert_close(y, torch.full_like(y, exact), rtol=1e-5, atol=0)


def test_tokens_and_weights_of_zeros_stay_zeros(isa, precision):
    weight = quantized(torch.zeros(64, 128), double_quant=False)
    x = torch.randn(40, 128)
    x[7] = 0
    if isa.layers:
        assert not isa.matmul_4bit(x, weight.parts, weight.layout, None, True).any()
        other = quantized(torch.randn(64, 128))
        y = isa.matmul_4bit(x, other.parts, other.layout, None, True)
        assert not y[7].any() and y[6].any()


def test_float32_layers_refuse_what_does_not_fit(kernels):
    weight, (A, B, m, x, dy) = drawn(40, 64, 128, 4, 64)
    saved = [x, x[:, :4], A, B, torch.empty(0, 64)]
    for call in (
        lambda: kernels.adapted_linear(x[:, :64], x[:, :64], A, B, m, m, None, 1.0, weight.parts, weight.layout),
        lambda: kernels.adapted_linear(x, x, A, B[:32], m, m, None, 1.0, weight.parts, weight.layout),
        lambda: kernels.adapted_linear_backward(dy[:, :32], saved, None, 1.0, weight.parts, weight.layout, True),
    ):
        with pytest.raises(ValueError, match="for a weight of 64 x 128"):
            call()


def test_the_reference_is_asked_for_mixed_dtypes(kernels):
    weight, (A, B, _, x, _) = drawn(40, 64, 128, 4, 64)
    found = kernels.adapted_linear(x, x.bfloat16(), A, B, None, None, None, 1.0, weight.parts, weight.layout)
    assert found is NotImplemented
    assert reference.adapted_linear(x, x, A, B, None, None, None, 1.0, weight.parts, weight.layout)[0].shape == (40, 64)

"""The levels travel with the weight: what the native CPU kernels do for NF4 they do for any codebook of 16 ascending
levels, and where they do not, the reference does.

The encoder finds a code by a cell of a fixed grid, which holds one midpoint at most; codebooks whose midpoints lie
closer are the reference's to encode. Decoding and products take all.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import DTYPES, NF4, decoded, pairwise, quantized, relative, routed, same_bits, scales_of

from qlora_kernels import backends, ops, reference
from qlora_kernels.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("poisoned", "threads")


def drawn_codebooks() -> Iterator[torch.Tensor]:
    """Random ascending levels in [-1, 1] with a 0, which is not the eighth as in NF4."""
    generator = torch.Generator().manual_seed(0)
    while True:
        levels = torch.cat((torch.zeros(1), 2 * torch.rand(15, generator=generator) - 1)).sort().values
        if zero_code(levels) != 7:
            yield levels


def zero_code(levels: torch.Tensor) -> int:
    """The code of 0: the lower one where two levels are 0."""
    return levels.tolist().index(0.0)


def apart(levels: torch.Tensor) -> bool:
    """Whether each midpoint has a cell of its own and is away from its border: the rule of the native encoder."""
    at = (levels[:-1] + levels[1:]).double() / 2 * 15 + 0.5
    inside = at - at.floor()
    return len(set(at.floor().tolist())) == 15 and bool(((inside > 0.011) & (inside < 0.989)).all())


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]) / 6
CODEBOOKS = {
    "nf4": NF4,
    "e2m1": torch.cat((-E2M1.flip(0), E2M1)),  # 0 twice, as a 4-bit float has it
    "even": torch.arange(-8, 8) / 8,
    "skewed": torch.arange(-2, 14) / 14,  # 0 is the third
    "random": next(levels for levels in drawn_codebooks() if apart(levels)),
    "crowded": next(levels for levels in drawn_codebooks() if not apart(levels)),
}
ENCODED = ("nf4", "even", "skewed", "random")  # natively
SHAPES = [(1, 5), (33, 77), (64, 192), (5, 4097)]
each_codebook = pytest.mark.parametrize("levels", CODEBOOKS.values(), ids=CODEBOOKS)
each_double_quant = pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "float32 scales"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def dense(shape: tuple[int, int], levels: torch.Tensor) -> torch.Tensor:
    """Gaussian, with values halfway between two levels, and a row of zeros."""
    values = torch.randn(shape)
    flat, midpoints = values.view(-1), (levels[:-1] + levels[1:]) / 2
    third = flat.numel() // 3
    flat[:third] = midpoints[torch.randint(15, (third,))]
    flat[:third:16] = 1.0
    values[shape[0] // 2, : shape[1] // 2] = 0
    return values


def test_codebooks_are_what_the_tests_need():
    for name, levels in CODEBOOKS.items():
        assert levels.shape == (16,) and levels.dtype == torch.float32 and 0.0 in levels.tolist(), name
        assert bool((levels.diff() >= 0).all()) and levels.abs().max() <= 1, name
    assert len({zero_code(levels) for levels in CODEBOOKS.values()}) >= 4


# ---------------------------------------------------------------- encoding


@each_codebook
def test_the_encoder_says_which_levels_it_takes(kernels, levels):
    """And for the others every one of its operators leaves the weight to the reference."""
    takes = any(levels is CODEBOOKS[name] for name in ENCODED)
    assert bool(kernels.library.qlora_supports_levels(levels.data_ptr())) == takes
    weight = torch.randn(4, 64)
    scales = weight.abs().amax(1)
    for result in (
        kernels.quantize_4bit(weight, levels, 64),
        kernels.fit_scales_4bit(weight, levels, 64),
        kernels.encode_4bit(weight, levels, scales, 64),
    ):
        assert (result is not NotImplemented) == takes


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "blocksize"), pairwise(CODEBOOKS, SHAPES, DTYPES, [32, 64, 4096]), ids=str
)
def test_codes_and_scales_equal_the_reference(isa, name, shape, dtype, blocksize):
    levels = CODEBOOKS[name]
    operators, weight = routed(isa), dense(shape, levels).to(dtype)
    expected = reference.quantize_4bit(weight, levels, blocksize)
    assert all(map(same_bits, operators.quantize_4bit(weight, levels, blocksize), expected))
    scales = reference.fit_scales_4bit(weight, levels, blocksize)
    assert same_bits(operators.fit_scales_4bit(weight, levels, blocksize), scales)
    mixed = scales * torch.tensor([1.0, -0.6, 0.0]).repeat(scales.numel())[: scales.numel()]
    for used in (scales, mixed):
        codes = operators.encode_4bit(weight, levels, used, blocksize)
        assert same_bits(codes, reference.encode_4bit(weight, levels, used, blocksize))


@each_codebook
def test_a_code_is_the_nearest_level(isa, levels):
    """By the definition, for values everywhere in a block whose largest magnitude is 1."""
    weight = torch.cat((torch.ones(1), 2 * torch.rand(4095) - 1)).view(1, 4096)
    packed, absmax = routed(isa).quantize_4bit(weight, levels, 4096)
    found = decoded(QuantizedWeight.of(packed, (absmax,), (1, 4096), 4096, levels=levels))
    nearest = (weight.double().view(-1, 1) - levels.double()).abs().amin(1)
    assert absmax.item() == 1
    torch.testing.assert_close((weight.double() - found.double()).abs().view(-1), nearest, rtol=0, atol=1e-7)


@each_codebook
@each_dtype
def test_nothing_takes_the_code_of_zero(isa, levels, dtype):
    """The pad nibble of an odd tail, a block of zeros, and a block whose scale is 0."""
    operators, zero = routed(isa), zero_code(levels)
    weight = torch.randn(5, 77).to(dtype)
    weight.view(-1)[64:192] = 0
    packed, absmax = operators.quantize_4bit(weight, levels, 64)
    assert packed.shape == (193, 1) and packed[-1].item() & 15 == zero
    assert absmax[1:3].tolist() == [0, 0] and set(packed[32:96].view(-1).tolist()) == {zero << 4 | zero}
    scales = torch.ones_like(absmax)
    scales[[0, 6]] = 0
    packed = operators.encode_4bit(torch.ones(5, 77, dtype=dtype), levels, scales, 64)
    assert set(packed[:32].view(-1).tolist()) == set(packed[192:].view(-1).tolist()) == {zero << 4 | zero}
    assert packed[191].item() >> 4 == 15
    packed, absmax = operators.quantize_4bit(torch.zeros(3, 5, dtype=dtype), levels, 64)
    assert absmax.tolist() == [0] and set(packed.view(-1).tolist()) == {zero << 4 | zero}


@each_codebook
def test_the_operators_themselves_take_any_levels(levels):
    """By `ops`, with whatever runs on this machine; a codebook that is refused is counted as the reference's."""
    weight = dense((33, 77), levels)
    before = backends.ROUTES.copy()
    packed, absmax = ops.quantize_4bit(weight, levels, 64)
    assert all(map(same_bits, (packed, absmax), reference.quantize_4bit(weight, levels, 64)))
    native = backends.NATIVE is not None and any(levels is CODEBOOKS[name] for name in ENCODED)
    assert backends.ROUTES - before == {("quantize_4bit", "native" if native else "reference"): 1}
    scales = ops.fit_scales_4bit(weight, levels, 64)
    assert same_bits(scales, reference.fit_scales_4bit(weight, levels, 64))
    assert same_bits(ops.encode_4bit(weight, levels, scales, 64), reference.encode_4bit(weight, levels, scales, 64))
    found = QuantizedWeight.of(packed, scales_of(absmax, True), (33, 77), levels=levels)
    assert same_bits(
        ops.dequantize_4bit(found.parts, found.layout, None, torch.bfloat16), decoded(found, torch.bfloat16)
    )


# ---------------------------------------------------------------- decoding and products


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "double_quant"), pairwise(CODEBOOKS, SHAPES, DTYPES, [True, False]), ids=str
)
def test_decoded_bits_equal_the_reference(isa, name, shape, double_quant, dtype):
    levels = CODEBOOKS[name]
    weight = quantized(dense(shape, levels), 64, double_quant, levels)
    for row_scale in (None, torch.randn(shape[0])):
        expected = decoded(weight, dtype, row_scale)
        assert same_bits(isa.dequantize_4bit(weight.parts, weight.layout, row_scale, dtype), expected)
        out = torch.empty(shape, dtype=dtype)
        isa.dequantize_4bit_into(out, weight.parts, weight.layout, row_scale)
        assert same_bits(out, expected)


@each_codebook
@each_double_quant
def test_row_norms_and_products_with_a_vector(isa, levels, double_quant):
    """Against the dense definition in float64."""
    weight, operators, x = quantized(torch.randn(33, 192), 64, double_quant, levels), routed(isa), torch.randn(192)
    W, A, B = decoded(weight, torch.float64), torch.randn(8, 192), torch.randn(33, 8) * 0.02
    y = operators.gemv_4bit(x, weight.parts, weight.layout)
    assert same_bits(y, reference.gemv_4bit(x, weight.parts, weight.layout))
    torch.testing.assert_close(y.double(), W @ x.double(), rtol=1e-5, atol=1e-4)
    n, update = isa.row_norms_4bit(weight.parts, weight.layout, A, B, 1.7), 1.7 * B.double() @ A.double()
    torch.testing.assert_close(n.double(), (W + update).norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(n, reference.row_norms_4bit(weight.parts, weight.layout, A, B, 1.7), rtol=1e-6, atol=0)


@each_codebook
@each_double_quant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_a_layer(isa, levels, double_quant, dtype):
    """Whole tiles, which a kernel takes on every instruction set but the portable one, against the reference's
    products, forward and backward.
    """
    weight, operators = quantized(torch.randn(96, 128), 64, double_quant, levels), routed(isa)
    x, dy, m = torch.randn(40, 128).to(dtype), torch.randn(40, 96).to(dtype), torch.rand(96) + 0.5
    A, B, parts = torch.randn(16, 128) / 11, torch.randn(96, 16) * 0.3, (weight.parts, weight.layout)
    assert isa.supports_fused_gemm(x, *parts) == (isa.layers > 0)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for row_scale in (None, m):
        for source, transposed in ((x, True), (dy, False)):
            found = operators.matmul_4bit(source, *parts, row_scale, transposed)
            assert relative(found, reference.matmul_4bit(source, *parts, row_scale, transposed)) < tolerance
    base = decoded(weight, torch.float64).norm(dim=1).float()
    results = []
    for code in (operators, reference):
        y, *saved = code.adapted_linear(x, x, A, B, m, None, base, 0.7, *parts)
        back = code.adapted_linear_backward(dy, [x, *saved], y, 0.7, *parts, True)
        results.append((y, *saved, *back))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype and relative(found, expected) < tolerance


def test_levels_that_are_not_contiguous(kernels):
    """Every other float of a tensor: the kernels read 16 in a row, so they must notice."""
    operators, spaced = routed(kernels), torch.stack((NF4, torch.full((16,), 77.0)), 1)[:, 0]
    values, A, B = torch.randn(33, 77), torch.randn(4, 77), torch.randn(33, 4)
    found, expected = operators.quantize_4bit(values, spaced, 64), reference.quantize_4bit(values, NF4, 64)
    assert all(map(same_bits, found, expected))
    weight = quantized(values)
    parts, layout = [*weight.parts[:2], spaced, *weight.parts[3:]], weight.layout
    assert same_bits(operators.dequantize_4bit(parts, layout, None, torch.float32), decoded(weight))
    norms = reference.row_norms_4bit(weight.parts, layout, A, B, 1.0)
    torch.testing.assert_close(operators.row_norms_4bit(parts, layout, A, B, 1.0), norms, rtol=1e-6, atol=0)


def test_weights_of_different_levels_do_not_disturb_each_other(isa, threads):
    """Used in turn, by several operators and two threads: each gives what it gives alone."""
    threads(2)
    values, A, B = torch.randn(96, 576), torch.randn(8, 576), torch.randn(96, 8)
    x, operators = torch.randn(576), routed(isa)

    def results(levels: torch.Tensor) -> Iterator[torch.Tensor]:
        """One operator after the other, so that two codebooks can take turns."""
        packed, absmax = operators.quantize_4bit(values, levels, 64)
        yield from (packed, absmax)
        scales = operators.fit_scales_4bit(values, levels, 64)
        yield from (scales, operators.encode_4bit(values, levels, scales, 64))
        weight = QuantizedWeight.of(packed, scales_of(absmax, True), (96, 576), levels=levels)
        yield operators.dequantize_4bit(weight.parts, weight.layout, None, torch.bfloat16)
        yield operators.gemv_4bit(x, weight.parts, weight.layout)
        yield operators.row_norms_4bit(weight.parts, weight.layout, A, B, 0.5)
        yield operators.matmul_4bit(x.expand(32, 576).bfloat16(), weight.parts, weight.layout, None, True)

    alone = {name: list(results(levels)) for name, levels in CODEBOOKS.items()}
    in_turn = list(zip(*map(results, CODEBOOKS.values()), strict=True))
    for step, found in enumerate(in_turn):
        for name, tensor in zip(CODEBOOKS, found, strict=True):
            assert same_bits(tensor, alone[name][step]), (name, step)
    assert not torch.equal(alone["nf4"][0], alone["random"][0])

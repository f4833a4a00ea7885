"""Quantized weights by the native CPU kernels against the reference: the same codes, scales and decoded bits.

Every instruction set, dtype, block size and odd shape, in covers of pairs; outputs start out poisoned, so that a value
left unwritten shows. The alternative, the whole product of all cases, takes ten times as long and finds no more.
"""

from __future__ import annotations

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from helpers import DTYPES, ISAS, NF4, decoded, pairwise, quantized, routed, same_bits, scales_of

from qlora_kernels import reference
from qlora_kernels.bitsandbytes import nf4 as bitsandbytes_nf4
from qlora_kernels.weight import NESTED_BLOCKSIZE, QuantizedWeight

SHAPES = [(1, 1), (3, 1), (1, 5), (7, 64), (33, 77), (64, 64), (5, 4097), (130, 576)]
BLOCKSIZES = [32, 64, 256, 4096]
pytestmark = pytest.mark.usefixtures("poisoned", "threads")


def ties(shape: tuple[int, int]) -> torch.Tensor:
    """Values halfway between two levels, in blocks whose largest is 1."""
    midpoints = (NF4[:-1] + NF4[1:]) / 2
    drawn = midpoints[torch.randint(15, shape)]
    drawn.view(-1)[::32] = 1.0
    return drawn


def every_other_row_zero(shape: tuple[int, int]) -> torch.Tensor:
    drawn = torch.randn(shape)
    drawn[::2] = 0
    return drawn


# What reaches every branch: heavy tails, ties, blocks of zeros, subnormals, the largest float16.
DISTRIBUTIONS = {
    "gaussian": torch.randn,
    "student-t": lambda shape: torch.randn(shape) / torch.randn(shape).abs().clamp(min=1e-3),
    "constant": lambda shape: torch.full(shape, -0.37),
    "sparse": lambda shape: torch.randn(shape) * (torch.rand(shape) < 0.02),
    "zeros": torch.zeros,
    "zero rows": every_other_row_zero,
    "ties": ties,
    "just above ties": lambda shape: torch.nextafter(ties(shape), torch.tensor(2.0)).clamp(max=1),
    "just below ties": lambda shape: torch.nextafter(ties(shape), torch.tensor(-2.0)),
    "subnormal": lambda shape: torch.randn(shape) * 1e-39,
    "bf16 subnormal": lambda shape: torch.randn(shape) * 3e-38,
    "fp16 subnormal": lambda shape: torch.randn(shape) * 1e-5,
    "large": lambda shape: torch.randn(shape).clamp(-1, 1) * 65504,
}

# ---------------------------------------------------------------- codes and scales


@pytest.mark.parametrize(
    ("dtype", "shape", "distribution", "blocksize"), pairwise(DTYPES, SHAPES, DISTRIBUTIONS, BLOCKSIZES), ids=str
)
def test_codes_equal_the_reference(isa, dtype, shape, distribution, blocksize):
    weight = DISTRIBUTIONS[distribution](shape).to(dtype)
    packed, absmax = isa.quantize_4bit(weight, NF4, blocksize)
    expected, expected_absmax = reference.quantize_4bit(weight, NF4, blocksize)
    assert torch.equal(packed, expected)
    assert same_bits(absmax, expected_absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "distribution", "blocksize"), pairwise(SHAPES[2:], DISTRIBUTIONS, [64, 4096]), ids=str
)
def test_fitted_scales_and_their_codes_equal_the_reference(kernels, dtype, shape, distribution, blocksize):
    """Scales bit for bit; codes also under scales that clip, that are negative (double quantization can make them so),
    or zero.
    """
    weight = DISTRIBUTIONS[distribution](shape).to(dtype)
    scales = reference.fit_scales_4bit(weight, NF4, blocksize)
    mixed = scales * torch.tensor([1.0, -0.6, 0.0]).repeat(scales.numel())[: scales.numel()]
    expected = [(used, reference.encode_4bit(weight, NF4, used, blocksize)) for used in (scales, mixed)]
    for isa in ISAS:  # in one test: the reference takes longer than all kernels
        kernels.select(isa)
        assert same_bits(kernels.fit_scales_4bit(weight, NF4, blocksize), scales), isa
        for used, codes in expected:
            assert torch.equal(kernels.encode_4bit(weight, NF4, used, blocksize), codes), isa


def squared_error(weight: torch.Tensor, found: QuantizedWeight) -> torch.Tensor:
    """Of each block of 64."""
    return (decoded(found).double() - weight.double()).square().view(-1, 64).sum(1)


@pytest.mark.parametrize("layer", ["gaussian", "down_proj", "gate_proj"])
def test_fitted_scales_leave_less_error(isa, smollm2_dense, layer):
    """At least 10 % less than absmax leaves, Gaussian or real weights, with double quantization."""
    mlp = smollm2_dense.model.layers[3].mlp
    weight = torch.randn(256, 576) if layer == "gaussian" else getattr(mlp, layer).weight.detach()
    packed, absmax = isa.quantize_4bit(weight, NF4, 64)
    plain = QuantizedWeight.of(packed, scales_of(absmax, True), tuple(weight.shape))
    scales = scales_of(isa.fit_scales_4bit(weight, NF4, 64), True)
    used = reference.decode_absmax(QuantizedWeight.of(packed, scales, tuple(weight.shape)))
    fitted = QuantizedWeight.of(isa.encode_4bit(weight, NF4, used, 64), scales, tuple(weight.shape))
    assert squared_error(weight, fitted).sum() < 0.9 * squared_error(weight, plain).sum()


@pytest.mark.parametrize("distribution", sorted(set(DISTRIBUTIONS) - {"subnormal"}))  # scales below 1e-38 count as zero
def test_fitted_scales_never_leave_more_error_in_a_block(isa, distribution):
    shape = (40, 192)
    weight = DISTRIBUTIONS[distribution](shape)
    packed, absmax = isa.quantize_4bit(weight, NF4, 64)
    scales = isa.fit_scales_4bit(weight, NF4, 64)
    fitted = QuantizedWeight.of(isa.encode_4bit(weight, NF4, scales, 64), (scales,), shape)
    before = squared_error(weight, QuantizedWeight.of(packed, (absmax,), shape))
    size = weight.double().square().view(-1, 64).sum(1)
    assert bool((squared_error(weight, fitted) <= before + 1e-6 * size + 1e-80).all())


def test_a_brute_force_finds_no_better_scale(isa):
    """400 scales a block, tried one by one: the fitted ones leave at most 2 % more error."""
    weight = torch.randn(64, 64)

    def error(scales: torch.Tensor, code) -> torch.Tensor:
        packed = code.encode_4bit(weight, NF4, scales, 64)
        return squared_error(weight, QuantizedWeight.of(packed, (scales,), (64, 64)))

    least = torch.full((64,), float("inf"), dtype=torch.float64)
    for factor in torch.linspace(0.5, 2.0, 400):
        least = torch.minimum(least, error(weight.abs().amax(1) * factor, reference))
    assert error(isa.fit_scales_4bit(weight, NF4, 64), isa).sum() < 1.02 * least.sum()


def test_a_weight_that_is_not_contiguous(isa):
    weight = torch.randn(96, 70).t()[::2]
    found, expected = isa.quantize_4bit(weight, NF4, 64), reference.quantize_4bit(weight, NF4, 64)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 65, 130])
def test_a_value_that_is_not_finite_reaches_its_block_maximum(isa, dtype, bad, at):
    weight = torch.ones(131, dtype=dtype)
    weight[at] = bad
    for scales in (
        isa.quantize_4bit(weight, NF4, 64)[1],
        isa.fit_scales_4bit(weight, NF4, 64),
        reference.fit_scales_4bit(weight, NF4, 64),
    ):
        assert [bool(v) for v in scales.isfinite()] == [at // 64 != block for block in range(3)]


# ---------------------------------------------------------------- double quantization


def midpoints_and_their_neighbours() -> torch.Tensor:
    """Exact midpoints (ties to the lower code) and their neighbours; the mean is 0 and the largest magnitude 1, so
    nothing is rounded.
    """
    levels = reference.dynamic_map(torch.device("cpu"))
    midpoints = (levels[:-1] + levels[1:]) / 2
    up, down = torch.nextafter(midpoints, torch.tensor(2.0)), torch.nextafter(midpoints, torch.tensor(-2.0))
    exact = torch.cat([levels, midpoints, up, down])
    return torch.cat([exact, -exact])


ABSMAX = {
    "exact": midpoints_and_their_neighbours,
    "one": lambda: torch.rand(1),
    "zeros": lambda: torch.zeros(300),
    "of weights": lambda: torch.rand(5000) ** 4,
    "constant": lambda: torch.full((257,), 0.3),
    "subnormal": lambda: torch.rand(256) * 1e-39,
}


@pytest.mark.parametrize("scales", ABSMAX)
@pytest.mark.parametrize("nested_blocksize", [NESTED_BLOCKSIZE, 4096])
def test_nested_codes_equal_the_reference(isa, scales, nested_blocksize):
    absmax = ABSMAX[scales]()
    codes, nested, offset = isa.quantize_absmax(absmax, nested_blocksize)
    expected = reference.quantize_absmax(absmax, nested_blocksize)
    assert torch.equal(codes, expected[0])
    assert same_bits(nested, expected[1]) and same_bits(offset, expected[2])


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("dtype", "shape", "distribution", "blocksize", "double_quant"),
    pairwise(DTYPES, SHAPES, DISTRIBUTIONS, BLOCKSIZES, [False, True]),
    ids=str,
)
def test_decoded_bits_equal_the_reference(isa, dtype, shape, distribution, blocksize, double_quant):
    """With and without a scale per row, subnormal and overflowing values included; nothing is written beyond the
    result.
    """
    guard, n = 64, shape[0] * shape[1]
    weight = quantized(DISTRIBUTIONS[distribution](shape), blocksize, double_quant)
    for row_scale in (None, torch.randn(shape[0])):
        expected = decoded(weight, dtype, row_scale)
        assert same_bits(isa.dequantize_4bit(weight.parts, weight.layout, row_scale, dtype), expected)
    buffer = torch.full((n + 2 * guard,), 77.0, dtype=dtype)
    out = buffer[guard : guard + n].view(shape)
    isa.dequantize_4bit_into(out, weight.parts, weight.layout, row_scale)
    assert same_bits(out, expected)
    assert bool((buffer[:guard] == 77).all()) and bool((buffer[guard + n :] == 77).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5_000_000, 88_000_000])
def test_a_result_larger_than_the_caches(isa, dtype, size, threads):
    """Into memory that exists its lines are fetched ahead, or it is written past the caches; not into fresh memory: the
    same bits, rows of an odd length and a result that begins no line included.
    """
    threads(2)
    rows, columns = 1501, size // 1501 // dtype.itemsize | 1
    n = rows * columns
    packed = torch.randint(256, ((n + 1) // 2, 1), dtype=torch.uint8)
    factors, buffer = torch.randn(rows), torch.empty(n + 1, dtype=dtype)
    # one test for all: to draw the codes takes longer than to decode them
    for blocksize, row_scale, offset in ((64, None, 0), (64, factors, 0), (256, None, 0), (64, None, 1)):
        scales = scales_of(torch.rand(-(-n // blocksize)), True)
        weight = QuantizedWeight.of(packed, scales, (rows, columns), blocksize)
        out = buffer[offset : offset + n].view(rows, columns).fill_(math.nan)
        isa.dequantize_4bit_into(out, weight.parts, weight.layout, row_scale)
        fresh = isa.dequantize_4bit(weight.parts, weight.layout, row_scale, dtype)
        assert same_bits(out, fresh), (blocksize, row_scale is not None, offset)


def test_results_do_not_depend_on_the_number_of_threads(isa, threads):
    """Large enough that every operator splits its work; 3 threads leave uneven shares."""
    dense, row_scale = torch.randn(300, 1153), torch.randn(300)
    weight = quantized(dense)
    absmax = reference.quantize_4bit(dense, NF4, 64)[1]

    def everything() -> dict[str, torch.Tensor]:
        found = dict(zip(("codes", "absmax"), isa.quantize_4bit(dense, NF4, 64), strict=True))
        found["fitted"] = isa.fit_scales_4bit(dense, NF4, 64)
        found["codes of fitted"] = isa.encode_4bit(dense, NF4, found["fitted"], 64)
        found["nested codes"], found["nested"], _ = isa.quantize_absmax(absmax, NESTED_BLOCKSIZE)
        found["decoded"] = isa.dequantize_4bit(weight.parts, weight.layout, row_scale, torch.bfloat16)
        return found

    threads(1)
    alone = everything()
    for count in (2, 3):
        threads(count)
        found = everything()
        assert [name for name in alone if not same_bits(alone[name], found[name])] == [], count


# ---------------------------------------------------------------- what the kernels do not take


@pytest.mark.parametrize("blocksize", [48, 64])
def test_what_the_kernels_lack_goes_to_the_reference(kernels, blocksize):
    """float64, and block sizes that are no power of two."""
    operators, weight = routed(kernels), torch.randn(6, 96, dtype=torch.float64)
    packed, absmax = operators.quantize_4bit(weight, NF4, blocksize)
    assert torch.equal(packed, reference.quantize_4bit(weight, NF4, blocksize)[0])
    scales = operators.fit_scales_4bit(weight, NF4, blocksize)
    assert torch.equal(scales, reference.fit_scales_4bit(weight, NF4, blocksize))
    codes = operators.encode_4bit(weight, NF4, scales, blocksize)
    assert torch.equal(codes, reference.encode_4bit(weight, NF4, scales, blocksize))
    found, row_scale = QuantizedWeight.of(packed, (absmax,), (6, 96), blocksize), torch.randn(6)
    dense = operators.dequantize_4bit(found.parts, found.layout, row_scale, torch.float64)
    assert same_bits(dense, decoded(found, torch.float64, row_scale))
    into = torch.empty(6, 96, dtype=torch.float64)
    operators.dequantize_4bit_into(into, found.parts, found.layout, row_scale)
    assert same_bits(into, dense)


def test_a_block_size_that_is_no_power_of_two_is_decoded_by_the_reference(kernels):
    weight = quantized(torch.randn(6, 96), 48)
    dense = routed(kernels).dequantize_4bit(weight.parts, weight.layout, None, torch.float32)
    assert same_bits(dense, decoded(weight))


def test_sizes_that_do_not_fit_are_refused(kernels):
    weight = quantized(torch.randn(4, 64), double_quant=False)
    with pytest.raises(ValueError, match="row_scale holds 3 values for 4 rows"):
        kernels.dequantize_4bit(weight.parts, weight.layout, torch.ones(3), torch.float32)
    with pytest.raises(ValueError, match="3 scales for 4 blocks"):
        kernels.encode_4bit(torch.randn(4, 64), NF4, torch.ones(3), 64)
    with pytest.raises(ValueError, match=r"out \(4, 63\) for a weight of 4 x 64"):
        kernels.dequantize_4bit_into(torch.empty(4, 63), weight.parts, weight.layout, None)


# ---------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 256, 1024])
def test_the_same_bytes_as_bitsandbytes(isa, dtype, blocksize):
    """Codes and scales of the same weight, values of the same bytes. There are no bf16 subnormals here, which
    bitsandbytes flushes.
    """
    weight = torch.randn(48, 1024).to(dtype)
    theirs, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
    packed, absmax = isa.quantize_4bit(weight, NF4, blocksize)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")[1].absmax)
    scales = (state.absmax, state.state2.absmax, state.offset)
    ours = QuantizedWeight.of(packed, scales, (48, 1024), blocksize)
    assert same_bits(bnb.dequantize_4bit(theirs, state), isa.dequantize_4bit(ours.parts, ours.layout, None, dtype))


def test_bitsandbytes_reads_fitted_scales(isa):
    weight, shape = torch.randn(32, 512), (32, 512)
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    scales = reference.quantize_absmax(isa.fit_scales_4bit(weight, NF4, 64), NESTED_BLOCKSIZE)
    used = reference.decode_absmax(QuantizedWeight.of(torch.empty(0), scales, shape))
    ours = QuantizedWeight.of(isa.encode_4bit(weight, NF4, used, 64), scales, shape)
    state.absmax, state.state2.absmax, state.offset = scales
    dense = isa.dequantize_4bit(ours.parts, ours.layout, None, torch.float32)
    assert same_bits(bnb.dequantize_4bit(ours.packed, state), dense)


@pytest.mark.parametrize("shape, blocksize", [((40, 192), 64), ((3, 1024), 512), ((7, 77), 64), ((4, 64), 32)])
def test_bitsandbytes_as_a_backend_gives_the_same_values(shape, blocksize):
    """Where it is taken (whole blocks in each row), and where the reference stands in for it."""
    operators, weight = routed(bitsandbytes_nf4, "bitsandbytes"), torch.randn(shape)
    packed, absmax = operators.quantize_4bit(weight, NF4, blocksize)
    expected, expected_absmax = reference.quantize_4bit(weight, NF4, blocksize)
    assert torch.equal(packed, expected) and same_bits(absmax, expected_absmax)
    for double_quant in (True, False):
        found = QuantizedWeight.of(packed, scales_of(absmax, double_quant), shape, blocksize)
        for row_scale in (None, torch.rand(shape[0])):
            for dtype in DTYPES:
                got = operators.dequantize_4bit(found.parts, found.layout, row_scale, dtype)
                case = (double_quant, row_scale is not None, dtype)
                assert same_bits(got, decoded(found, dtype, row_scale)), case
                into = torch.full(shape, float("nan"), dtype=dtype)
                operators.dequantize_4bit_into(into, found.parts, found.layout, row_scale)
                assert same_bits(into, got), case


def test_bitsandbytes_takes_whole_blocks_of_nf4_only():
    """Its kernels know no other levels, and read wrong values where a block crosses rows."""
    taken, crossing = quantized(torch.randn(4, 128)), quantized(torch.randn(4, 96))
    other = QuantizedWeight([*taken.parts[:2], torch.arange(-8, 8) / 8, *taken.parts[3:]], taken.layout)
    for weight, takes in ((taken, True), (crossing, False), (other, False)):
        found = bitsandbytes_nf4.dequantize_4bit(weight.parts, weight.layout, None, torch.float32)
        assert (found is not NotImplemented) == takes
        codes = bitsandbytes_nf4.quantize_4bit(torch.randn(weight.shape), weight.levels, 64)
        assert (codes is not NotImplemented) == takes

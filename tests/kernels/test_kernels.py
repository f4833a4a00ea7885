"""The native CPU kernels against `reference.py`: same codes and decoded bits, same sums to float32 rounding.

Every instruction set, dtype, block size and odd shape; outputs start out poisoned, so that a value left unwritten
shows.
"""

from __future__ import annotations

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from helpers import ISAS, NESTED, constants, same_bits

from qlora_kernels import bitsandbytes_nf4, ops, reference

SHAPES = [(1, 1), (3, 1), (1, 5), (7, 64), (33, 77), (64, 64), (5, 4097), (130, 576)]
BLOCKSIZES = [32, 64, 256, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned", "threads")


def weights(shape):
    """Distributions that reach every branch: heavy tails, ties, blocks of zeros, subnormals, the largest float16."""
    gaussian = torch.randn(shape)
    midpoints = (torch.tensor(reference.NF4_LEVELS)[:-1] + torch.tensor(reference.NF4_LEVELS)[1:]) / 2
    ties = midpoints[torch.randint(15, shape)]
    ties.view(-1)[::32] = 1.0
    zero_rows = gaussian.clone()
    zero_rows[::2] = 0
    return {
        "gaussian": gaussian,
        "student-t": gaussian / torch.randn(shape).abs().clamp(min=1e-3),
        "constant": torch.full(shape, -0.37),
        "sparse": gaussian * (torch.rand(shape) < 0.02),
        "zeros": torch.zeros(shape),
        "zero rows": zero_rows,
        "ties": ties,
        "just above ties": torch.nextafter(ties, torch.tensor(2.0)).clamp(max=1),
        "just below ties": torch.nextafter(ties, torch.tensor(-2.0)),
        "subnormal": gaussian * 1e-39,
        "bf16 subnormal": gaussian * 3e-38,
        "fp16 subnormal": gaussian * 1e-5,
        "large": gaussian.clamp(-1, 1) * 65504,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_equal_the_reference(isa, dtype):
    for shape in SHAPES:
        for name, weight in weights(shape).items():
            weight = weight.to(dtype)
            for blocksize in BLOCKSIZES:
                packed, absmax = isa.quantize_nf4(weight, blocksize)
                expected, expected_absmax = reference.quantize_nf4(weight, blocksize)
                assert torch.equal(packed, expected), (shape, name, blocksize)
                assert same_bits(absmax, expected_absmax), (shape, name, blocksize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fitted_scales_and_their_codes_equal_the_reference(kernels, dtype):
    """Scales bit for bit; codes also under scales that clip, that are negative (double quantization can make them so),
    or zero.
    """
    for shape in SHAPES[2:]:
        for name, weight in weights(shape).items():
            weight = weight.to(dtype)
            for blocksize in (64, 4096):
                scales = reference.fit_scales_nf4(weight, blocksize)
                mixed = scales * torch.tensor([1.0, -0.6, 0.0]).repeat(scales.numel())[: scales.numel()]
                expected = {used: reference.encode_nf4(weight, used, blocksize) for used in (scales, mixed)}
                for isa in ISAS:
                    kernels.select(isa)
                    assert same_bits(kernels.fit_scales_nf4(weight, blocksize), scales), (isa, shape, name, blocksize)
                    for used, codes in expected.items():
                        assert torch.equal(kernels.encode_nf4(weight, used, blocksize), codes), (
                            isa,
                            shape,
                            name,
                            blocksize,
                        )
    kernels.select()


def squared_error(weight, packed, parts, blocksize=64):
    decoded = reference.dequantize_nf4(packed, *parts, None, *weight.shape, blocksize, NESTED, torch.float32)
    return (decoded.double() - weight.double()).square().sum().item()


def test_fitted_scales_leave_less_error(isa, smollm2_dense):
    """At least 10 % less than absmax leaves, Gaussian or real weights, with double quantization; never more in any
    block without.
    """
    mlp = smollm2_dense.model.layers[3].mlp
    for weight in (torch.randn(256, 576), mlp.down_proj.weight.detach(), mlp.gate_proj.weight.detach()):
        packed, absmax = isa.quantize_nf4(weight, 64)
        plain = squared_error(weight, packed, constants(absmax, True))
        parts = constants(isa.fit_scales_nf4(weight, 64), True)
        fitted = squared_error(weight, isa.encode_nf4(weight, reference.decode_absmax(*parts, NESTED), 64), parts)
        assert fitted < 0.9 * plain
    for name, weight in weights((40, 192)).items():
        if name == "subnormal":  # scales below 1e-38 count as zero
            continue
        packed, absmax = isa.quantize_nf4(weight, 64)
        scales = isa.fit_scales_nf4(weight, 64)
        fitted = isa.encode_nf4(weight, scales, 64)
        errors = [
            (
                reference.dequantize_nf4(codes, part, None, None, None, 40, 192, 64, NESTED, torch.float32).double()
                - weight
            )
            .square()
            .view(-1, 64)
            .sum(1)
            for codes, part in ((packed, absmax), (fitted, scales))
        ]
        size = weight.double().square().view(-1, 64).sum(1)
        assert bool((errors[1] <= errors[0] + 1e-6 * size + 1e-80).all()), name


def test_a_brute_force_finds_no_better_scale(isa):
    """400 scales a block, tried one by one: the fitted ones leave at most 2 % more error."""
    weight = torch.randn(64, 64)
    scales = isa.fit_scales_nf4(weight, 64)
    least = torch.full((64,), float("inf"), dtype=torch.float64)
    for factor in torch.linspace(0.5, 2.0, 400):
        tried = weight.abs().amax(1) * factor
        decoded = reference.dequantize_nf4(
            reference.encode_nf4(weight, tried, 64), tried, None, None, None, 64, 64, 64, NESTED, torch.float32
        )
        least = torch.minimum(least, (decoded.double() - weight).square().sum(1))
    assert squared_error(weight, isa.encode_nf4(weight, scales, 64), (scales, None, None)) < 1.02 * least.sum().item()


def test_bitsandbytes_reads_fitted_scales(isa):
    weight = torch.randn(32, 512)
    parts = reference.quantize_absmax(isa.fit_scales_nf4(weight, 64), NESTED)
    packed = isa.encode_nf4(weight, reference.decode_absmax(*parts, NESTED), 64)
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    state.absmax, state.state2.absmax, state.offset = parts
    ours = isa.dequantize_nf4(packed, *parts, None, 32, 512, 64, NESTED, torch.float32)
    assert same_bits(bnb.dequantize_4bit(packed, state), ours)


def test_a_weight_that_is_not_contiguous(isa):
    weight = torch.randn(96, 70).t()[::2]
    for got, expected in zip(isa.quantize_nf4(weight, 64), reference.quantize_nf4(weight, 64), strict=True):
        assert torch.equal(got, expected)


def test_a_value_that_is_not_finite_reaches_its_block_maximum(isa):
    for bad in (float("nan"), float("inf"), -float("inf")):
        for dtype in DTYPES:
            for at in (0, 65, 130):
                weight = torch.ones(131, dtype=dtype)
                weight[at] = bad
                for scales in (
                    isa.quantize_nf4(weight, 64)[1],
                    isa.fit_scales_nf4(weight, 64),
                    reference.fit_scales_nf4(weight, 64),
                ):
                    assert [bool(v) for v in scales.isfinite()] == [at // 64 != block for block in range(3)], (
                        bad,
                        dtype,
                        at,
                    )


def test_nested_codes_equal_the_reference(isa):
    """Exact midpoints (ties to the lower code) and their neighbours, and scales as weights have them."""
    levels = reference.dynamic_map(torch.device("cpu"))
    midpoints = (levels[:-1] + levels[1:]) / 2
    up, down = torch.nextafter(midpoints, torch.tensor(2.0)), torch.nextafter(midpoints, torch.tensor(-2.0))
    exact = torch.cat([levels, midpoints, up, down])
    exact = torch.cat([exact, -exact])  # the mean is 0 and the largest magnitude 1, so nothing is rounded
    for absmax in (
        exact,
        torch.rand(1),
        torch.zeros(300),
        torch.rand(5000) ** 4,
        torch.full((257,), 0.3),
        torch.rand(256) * 1e-39,
    ):
        for nested_blocksize in (NESTED, 4096):
            codes, nested, offset = isa.quantize_absmax(absmax, nested_blocksize)
            expected = reference.quantize_absmax(absmax, nested_blocksize)
            assert torch.equal(codes, expected[0])
            assert same_bits(nested, expected[1]) and same_bits(offset, expected[2])


@pytest.mark.parametrize("signed", [False, True])
def test_8bit_blocks_equal_the_reference(isa, signed):
    """Exact midpoints and their neighbours, values of all sizes, zeros and subnormals; what is above 0 is not encoded
    as 0.
    """
    levels, midpoints = reference.block_tables(torch.device("cpu"), signed)
    exact = torch.cat(
        [
            levels,
            midpoints,
            torch.nextafter(midpoints, torch.tensor(2.0)),
            torch.nextafter(midpoints, torch.tensor(-2.0)),
            levels[-3:],
        ]
    )
    spread = torch.randn(64, 256) * 10.0 ** torch.randint(-9, 3, (64, 256))
    cases = [
        exact.clamp(-1 if signed else 0, 1),
        torch.zeros(256),
        torch.rand(512) * 1e-39,
        *(spread if signed else spread**2),
    ]
    for values in cases:
        for blocksize in (256, values.numel()):
            n = values.numel()
            results = []
            for code in (isa, reference):
                codes, absmax = torch.empty(n, dtype=torch.uint8), torch.empty(n // blocksize)
                again, work = torch.empty(n), torch.empty(n, dtype=torch.int32)
                code.encode_blocks_into(codes, absmax, values.clone(), work, blocksize, signed)
                code.decode_blocks_into(again, codes, absmax, work, blocksize, signed)
                results.append((codes, absmax, again))
            assert all(torch.equal(got, expected) for got, expected in zip(*results, strict=True))
            codes, absmax, again = results[0]
            assert torch.equal(absmax, values.view(-1, blocksize).abs().amax(1))
            if not signed and absmax.min() > 1e-30:
                assert (codes[values > absmax.max() * 1e-37] > 0).all()
    with pytest.raises(ValueError, match="257 values"):
        isa.encode_blocks_into(codes, absmax, torch.zeros(257), work, 256, signed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_decoded_bits_equal_the_reference(isa, dtype, double_quant):
    """With and without a gain per row, subnormal and overflowing values included; nothing is written beyond the result."""
    guard = 64
    for shape in SHAPES:
        n = shape[0] * shape[1]
        gain = torch.randn(shape[0])
        for name, weight in weights(shape).items():
            for blocksize in BLOCKSIZES:
                packed, absmax = reference.quantize_nf4(weight, blocksize)
                parts = constants(absmax, double_quant)
                for row_gain in (None, gain):
                    arguments = (packed, *parts, row_gain, *shape, blocksize, NESTED, dtype)
                    expected = reference.dequantize_nf4(*arguments)
                    assert same_bits(isa.dequantize_nf4(*arguments), expected), (shape, name, blocksize)
                buffer = torch.full((n + 2 * guard,), 77.0, dtype=dtype)
                out = buffer[guard : guard + n].view(shape)
                isa.dequantize_nf4_into(out, packed, *parts, gain, blocksize, NESTED)
                assert same_bits(out, expected), (shape, name, blocksize)
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
    packed, gain, buffer = (
        torch.randint(256, ((n + 1) // 2, 1), dtype=torch.uint8),
        torch.randn(rows),
        torch.empty(n + 1, dtype=dtype),
    )
    for blocksize, row_gain, offset in ((64, None, 0), (64, gain, 0), (256, None, 0), (64, None, 1)):
        parts, out = (
            constants(torch.rand(-(-n // blocksize)), True),
            buffer[offset : offset + n].view(rows, columns).fill_(math.nan),
        )
        isa.dequantize_nf4_into(out, packed, *parts, row_gain, blocksize, NESTED)
        assert same_bits(out, isa.dequantize_nf4(packed, *parts, row_gain, rows, columns, blocksize, NESTED, dtype)), (
            blocksize,
            offset,
        )


def test_the_same_bytes_as_bitsandbytes(isa):
    """Codes and scales of the same weight, values of the same bytes (bitsandbytes flushes bf16 subnormals: none here)."""
    for blocksize in (64, 256, 1024):
        for dtype in DTYPES:
            weight = torch.randn(48, 1024).to(dtype)
            theirs, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
            packed, absmax = isa.quantize_nf4(weight, blocksize)
            assert torch.equal(packed, theirs)
            assert torch.equal(absmax, bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")[1].absmax)
            parts = (state.absmax, state.state2.absmax, state.offset)
            ours = isa.dequantize_nf4(packed, *parts, None, 48, 1024, blocksize, NESTED, dtype)
            assert same_bits(ours, bnb.dequantize_4bit(theirs, state)), (blocksize, dtype)


def test_results_do_not_depend_on_the_number_of_threads(isa, threads):
    """Large enough that every operator splits its work; 3 threads leave uneven shares."""
    shape = (300, 1153)
    weight = torch.randn(shape)
    packed, absmax = reference.quantize_nf4(weight, 64)
    parts = reference.quantize_absmax(absmax, NESTED)
    gain, A, B = torch.randn(300), torch.randn(24, 1153), torch.randn(300, 24)
    a, b = torch.randn(900, 1200).bfloat16(), torch.randn(900, 1200).bfloat16()
    u, up = torch.randn(900, 24).bfloat16(), torch.randn(1200, 24).bfloat16()

    def everything():
        yield from isa.quantize_nf4(weight, 64)
        scales = isa.fit_scales_nf4(weight, 64)
        yield from (scales, isa.encode_nf4(weight, scales, 64))
        yield from isa.quantize_absmax(absmax, NESTED)[:2]
        yield isa.dequantize_nf4(packed, *parts, gain, *shape, 64, NESTED, torch.bfloat16)
        yield isa.row_norms_nf4(packed, *parts, A, B, 2.0, *shape, 64, NESTED)
        yield isa.column_dots(a, b)
        yield isa.row_norms_nf4(packed, *parts, A[:, :1152].contiguous(), B, 2.0, 300, 1152, 64, NESTED)
        yield from isa.adapter_gradients(a, up, u, b, None, torch.ones(1200), 2.0)
        yield isa.token_product(u, a)

    threads(1)
    alone = list(everything())
    for count in (2, 3):
        threads(count)
        for expected, got in zip(alone, everything(), strict=True):
            assert same_bits(expected, got), count


def test_what_the_kernels_lack_goes_to_the_reference(kernels):
    """float64, and block sizes that are no power of two."""
    weight = torch.randn(6, 96, dtype=torch.float64)
    for blocksize in (48, 64):
        packed, absmax = kernels.quantize_nf4(weight, blocksize)
        assert torch.equal(packed, reference.quantize_nf4(weight, blocksize)[0])
        scales = kernels.fit_scales_nf4(weight, blocksize)
        assert torch.equal(scales, reference.fit_scales_nf4(weight, blocksize))
        assert torch.equal(
            kernels.encode_nf4(weight, scales, blocksize), reference.encode_nf4(weight, scales, blocksize)
        )
        arguments = (packed, absmax, None, None, torch.randn(6), 6, 96, blocksize, NESTED, torch.float64)
        assert same_bits(kernels.dequantize_nf4(*arguments), reference.dequantize_nf4(*arguments))
    A, B = torch.randn(4, 96, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    got = kernels.row_norms_nf4(packed, absmax, None, None, A, B, 1.0, 6, 96, 64, NESTED)
    W = reference.dequantize_nf4(packed, absmax, None, None, None, 6, 96, 64, NESTED, torch.float64)
    torch.testing.assert_close(got, (W + B @ A).norm(dim=1), rtol=1e-14, atol=0)


def test_sizes_that_do_not_fit_are_refused(kernels):
    packed, absmax = reference.quantize_nf4(torch.randn(4, 64), 64)
    with pytest.raises(ValueError, match="row_gain holds 3 values for 4 rows"):
        kernels.dequantize_nf4(packed, absmax, None, None, torch.ones(3), 4, 64, 64, NESTED, torch.float32)
    with pytest.raises(ValueError, match="3 scales for 4 blocks"):
        kernels.encode_nf4(torch.randn(4, 64), torch.ones(3), 64)
    with pytest.raises(ValueError, match="do not fit a weight of 4 x 64"):
        kernels.row_norms_nf4(packed, absmax, None, None, torch.ones(2, 63), torch.ones(4, 2), 1.0, 4, 64, 64, NESTED)


# ---------------------------------------------------------------- between the products


def test_operators_pass_opcheck():
    """Schema, shape functions and dispatch of every operator, as torch checks them, with whatever runs on this machine."""
    weight = torch.randn(10, 128)
    packed, absmax = ops.quantize_nf4(weight, 64)
    parts = ops.quantize_absmax(absmax, NESTED)
    gain, A, B = torch.rand(10), torch.randn(4, 128), torch.randn(10, 4)
    heads = weight.view(10, 2, 64).bfloat16()
    codes, maxima, work = torch.zeros(512, dtype=torch.uint8), torch.ones(2), torch.zeros(512, dtype=torch.int32)
    cases = {
        ops.quantize_nf4: (weight.bfloat16(), 64),
        ops.fit_scales_nf4: (weight, 64),
        ops.encode_nf4: (weight, absmax, 64),
        ops.quantize_absmax: (absmax, NESTED),
        ops.dequantize_nf4: (packed, *parts, gain, 10, 128, 64, NESTED, torch.bfloat16),
        ops.dequantize_nf4_into: (torch.zeros(10, 128, dtype=torch.float16), packed, *parts, None, 64, NESTED),
        ops.nf4_gemv: (weight[0].bfloat16(), packed, *parts, 10, 128, 64, NESTED),
        ops.row_norms_nf4: (packed, *parts, A, B, 2.0, 10, 128, 64, NESTED),
        ops.row_norms_nf4_all: (*([part] for part in (packed, *parts, A, B, 2.0, 10, 128, 64)), NESTED),
        ops.nf4_product: (torch.randn(32, 128).bfloat16(), packed, *parts, gain, 10, 128, 64, NESTED, True),
        ops.adapted_product: (
            *[torch.randn(32, 128).bfloat16()] * 2,
            A,
            B,
            gain,
            None,
            gain,
            2.0,
            packed,
            *parts,
            10,
            128,
            64,
            NESTED,
        ),
        ops.adapted_product_backward: (
            torch.randn(32, 10).bfloat16(),
            torch.randn(32, 128).bfloat16(),
            A.bfloat16(),
            B.bfloat16(),
            torch.randn(32, 4).bfloat16(),
            torch.randn(32, 10).bfloat16(),
            torch.rand(3, 10),
            2.0,
            packed,
            *parts,
            10,
            128,
            64,
            NESTED,
            True,
        ),
        ops.column_dots: (weight.bfloat16(), weight.bfloat16()),
        ops.token_product: (B.bfloat16(), weight.bfloat16()),
        ops.adapter_gradients: (
            weight.bfloat16(),
            A.t().contiguous().bfloat16(),
            B.bfloat16(),
            weight.bfloat16(),
            None,
            torch.ones(128),
            2.0,
        ),
        ops.cross_entropy_: (weight.clone(), torch.arange(10)),
        ops.adamw_: (
            list(torch.rand(2, 30)),
            list(torch.rand(2, 30)),
            [0, 30],
            *torch.rand(2, 60),
            torch.rand(3, 60),
            0.9,
            0.999,
            1e-8,
            0.99,
            1e-3,
            0.5,
            0.1,
        ),
        ops.total_norm: ([weight, A, gain],),
        ops.encode_blocks_into: (codes.clone(), maxima.clone(), torch.randn(512), work.clone(), NESTED, True),
        ops.decode_blocks_into: (torch.empty(512), codes, maxima, work.clone(), NESTED, False),
        ops.rms_norm: (weight.bfloat16(), gain.new_ones(128).bfloat16(), 1e-6),
        ops.rms_norm_backward: (weight, weight, gain.new_ones(128), gain),
        ops.swiglu: (weight, weight),
        ops.swiglu_backward: (weight, weight, weight.flip(0)),
        ops.swiglu_backward_dots: (weight.bfloat16(), weight.bfloat16(), weight.flip(0).bfloat16()),
        ops.fold_factors: (A, B, gain, gain, 2.0, torch.bfloat16),
        ops.rotate: (heads, heads[:, :1], heads[:5, 0], heads[5:, 0]),
        ops.rotate_backward: (heads, heads[:, :1], heads[:5, 0], heads[5:, 0]),
        ops.attention: (heads, heads[:, :1], heads[:, 1:], [0, 3, 10], 0.125),
        ops.attention_backward: (heads, heads, heads[:, :1], heads[:, 1:], heads, torch.ones(2, 10), [0, 3, 10], 0.125),
    }
    for operator, arguments in cases.items():
        torch.library.opcheck(operator, arguments)


def test_writing_into_a_tensor_counts_as_a_change(kernels):
    """Autograd must notice when a tensor it has saved is overwritten, on both paths."""
    packed, absmax = reference.quantize_nf4(torch.randn(4, 64), 64)
    for write in (ops.dequantize_nf4_into, kernels.dequantize_nf4_into):
        out = torch.empty(4, 64)
        before = out._version
        write(out, packed, absmax, None, None, None, 64, NESTED)
        assert out._version > before
    for write in (ops.adamw_, kernels.adamw_, reference.adamw_):
        p, m, v, work = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.empty(3, 3)
        before = p._version
        write([p], [torch.ones(3)], [0], m, v, work, 0.9, 0.999, 1e-8, 1.0, 1e-3, 0.5, 1.0)
        assert p._version > before


def test_bitsandbytes_as_a_backend_gives_the_same_values():
    """Where it is taken (whole blocks in each row), and where the reference stands in for it."""
    for shape, blocksize in [((40, 192), 64), ((3, 1024), 512), ((7, 77), 64), ((4, 64), 32)]:
        weight = torch.randn(shape)
        packed, absmax = bitsandbytes_nf4.quantize_nf4(weight, blocksize)
        expected, expected_absmax = reference.quantize_nf4(weight, blocksize)
        assert torch.equal(packed, expected) and same_bits(absmax, expected_absmax)
        for parts in (constants(absmax, True), constants(absmax, False)):
            for gain in (None, torch.rand(shape[0])):
                for dtype in DTYPES:
                    got = bitsandbytes_nf4.dequantize_nf4(packed, *parts, gain, *shape, blocksize, NESTED, dtype)
                    assert same_bits(
                        got, reference.dequantize_nf4(packed, *parts, gain, *shape, blocksize, NESTED, dtype)
                    ), (shape, dtype)
                    into = torch.full(shape, float("nan"), dtype=dtype)
                    bitsandbytes_nf4.dequantize_nf4_into(into, packed, *parts, gain, blocksize, NESTED)
                    assert same_bits(into, got)

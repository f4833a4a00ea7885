"""The native CPU kernels against `reference.py`: same codes and decoded bits, same sums to float32 rounding.

Every instruction set, dtype, block size and odd shape; outputs start out poisoned, so that a value left unwritten shows.
"""

from __future__ import annotations

import itertools
import math

import bitsandbytes.functional as bnb
import pytest
import torch
from helpers import ISAS, TOLERANCE, relative
from qlora_kernels import bitsandbytes_nf4, ops, reference

SHAPES = [(1, 1), (3, 1), (1, 5), (7, 64), (33, 77), (64, 64), (5, 4097), (130, 576)]
BLOCKSIZES = [32, 64, 256, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NESTED = 256
pytestmark = pytest.mark.usefixtures("poisoned", "threads")


@pytest.fixture(params=["", *ISAS], ids=["best", *ISAS])
def isa(request, kernels):
    """The kernels by the best that the processor has, which may be its matrix unit, and by each instruction set."""
    kernels.select(request.param)
    yield kernels
    kernels.select()


def same_bits(a, b):
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integers), b.view(integers))


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


def constants(absmax, double_quant):
    """(absmax, nested_absmax, nested_offset) as the operators take them."""
    return reference.quantize_absmax(absmax, NESTED) if double_quant else (absmax, None, None)


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
    """Scales bit for bit; codes also under scales that clip, that are negative (double quantization can make them so), or zero."""
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
                        assert torch.equal(kernels.encode_nf4(weight, used, blocksize), codes), (isa, shape, name, blocksize)
    kernels.select()


def squared_error(weight, packed, parts, blocksize=64):
    decoded = reference.dequantize_nf4(packed, *parts, None, *weight.shape, blocksize, NESTED, torch.float32)
    return (decoded.double() - weight.double()).square().sum().item()


def test_fitted_scales_leave_less_error(isa, smollm2_dense):
    """At least 10 % less than absmax leaves, Gaussian or real weights, with double quantization; never more in any block without."""
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
            (reference.dequantize_nf4(codes, part, None, None, None, 40, 192, 64, NESTED, torch.float32).double() - weight).square().view(-1, 64).sum(1)
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
        decoded = reference.dequantize_nf4(reference.encode_nf4(weight, tried, 64), tried, None, None, None, 64, 64, 64, NESTED, torch.float32)
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
                for scales in (isa.quantize_nf4(weight, 64)[1], isa.fit_scales_nf4(weight, 64), reference.fit_scales_nf4(weight, 64)):
                    assert [bool(v) for v in scales.isfinite()] == [at // 64 != block for block in range(3)], (bad, dtype, at)


def test_nested_codes_equal_the_reference(isa):
    """Exact midpoints (ties to the lower code) and their neighbours, and scales as weights have them."""
    levels = reference.dynamic_map(torch.device("cpu"))
    midpoints = (levels[:-1] + levels[1:]) / 2
    up, down = torch.nextafter(midpoints, torch.tensor(2.0)), torch.nextafter(midpoints, torch.tensor(-2.0))
    exact = torch.cat([levels, midpoints, up, down])
    exact = torch.cat([exact, -exact])  # the mean is 0 and the largest magnitude 1, so nothing is rounded
    for absmax in (exact, torch.rand(1), torch.zeros(300), torch.rand(5000) ** 4, torch.full((257,), 0.3), torch.rand(256) * 1e-39):
        for nested_blocksize in (NESTED, 4096):
            codes, nested, offset = isa.quantize_absmax(absmax, nested_blocksize)
            expected = reference.quantize_absmax(absmax, nested_blocksize)
            assert torch.equal(codes, expected[0])
            assert same_bits(nested, expected[1]) and same_bits(offset, expected[2])


@pytest.mark.parametrize("signed", [False, True])
def test_8bit_blocks_equal_the_reference(isa, signed):
    """Exact midpoints and their neighbours, values of all sizes, zeros and subnormals; what is above 0 is not encoded as 0."""
    levels, midpoints = reference.block_tables(torch.device("cpu"), signed)
    exact = torch.cat([levels, midpoints, torch.nextafter(midpoints, torch.tensor(2.0)), torch.nextafter(midpoints, torch.tensor(-2.0)), levels[-3:]])
    spread = torch.randn(64, 256) * 10.0 ** torch.randint(-9, 3, (64, 256))
    cases = [exact.clamp(-1 if signed else 0, 1), torch.zeros(256), torch.rand(512) * 1e-39, *(spread if signed else spread**2)]
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
def test_a_result_larger_than_the_caches(isa, dtype, threads):
    """Written past the caches into memory that exists, not into fresh memory: the same bits, rows of an odd length and a result that begins no line included."""
    threads(2)
    rows, columns = 1501, 88_000_000 // 1501 // dtype.itemsize | 1
    n = rows * columns
    packed, gain, buffer = torch.randint(256, ((n + 1) // 2, 1), dtype=torch.uint8), torch.randn(rows), torch.empty(n + 1, dtype=dtype)
    for blocksize, row_gain, offset in ((64, None, 0), (64, gain, 0), (256, None, 0), (64, None, 1)):
        parts, out = constants(torch.rand(-(-n // blocksize)), True), buffer[offset : offset + n].view(rows, columns).fill_(math.nan)
        isa.dequantize_nf4_into(out, packed, *parts, row_gain, blocksize, NESTED)
        assert same_bits(out, isa.dequantize_nf4(packed, *parts, row_gain, rows, columns, blocksize, NESTED, dtype)), (blocksize, offset)


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
    """Against the dense definition in float64: n^2 to 1e-6 of (||W_j|| + ||s B_j A||)^2, which is what the sums are made of; to 3e-6 by the
    matrix unit, which has 16 bits of A and of the levels."""
    allowed = 3e-6 if isa.bf16_unit == "AMX" else 1e-6
    for shape in SHAPES:
        for blocksize in (64, 4096):
            packed, absmax = reference.quantize_nf4(torch.randn(shape), blocksize)
            parts = (packed, *constants(absmax, double_quant))
            W = reference.dequantize_nf4(*parts, None, *shape, blocksize, NESTED, torch.float32).double()
            for rank in (1, 8, 16, 40, 130):
                A, B = torch.randn(rank, shape[1]), torch.randn(shape[0], rank) * 0.02
                got = isa.row_norms_nf4(*parts, A, B, 1.7, *shape, blocksize, NESTED).double()
                update = 1.7 * B.double() @ A.double()
                error = (got.square() - (W + update).square().sum(1)).abs()
                assert bool((error <= allowed * (W.norm(dim=1) + update.norm(dim=1)).square()).all()), (shape, blocksize, rank)


def test_row_norms_of_a_fresh_adapter_do_not_depend_on_it(isa):
    """B = 0: the norm of W itself, bit for bit the same for any A and rank, so that g starts at exactly 1."""
    packed, absmax = reference.quantize_nf4(torch.randn(37, 192), 64)
    weight = (packed, absmax, None, None)
    plain = isa.row_norms_nf4(*weight, torch.zeros(1, 192), torch.zeros(37, 1), 1.0, 37, 192, 64, NESTED)
    assert same_bits(plain, isa.row_norms_nf4(*weight, torch.randn(16, 192), torch.zeros(37, 16), 2.0, 37, 192, 64, NESTED))


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


# tokens, rows, columns, rank, block size: whole tiles and tokens over, more panels than a thread keeps, ranks that fill no tile, and what tiles do not take
LAYERS = [(32, 32, 64, 1, 64), (33, 96, 64, 16, 64), (95, 64, 128, 40, 128), (300, 160, 192, 17, 64), (70, 32, 4096, 16, 256), (40, 2048, 64, 5, 64), (64, 96, 64, 80, 64), (31, 64, 64, 3, 64), (50, 33, 70, 4, 32)]


def drawn_layer(tokens, rows, columns, rank, blocksize, nested, dtype=torch.bfloat16):
    packed, absmax = reference.quantize_nf4(torch.randn(rows, columns), blocksize)
    constants_, shape = constants(absmax, nested), (rows, columns, blocksize, NESTED)
    W = reference.dequantize_nf4(packed, *constants_, None, *shape, torch.float64)
    A, B, m = torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank) * 0.3, torch.rand(rows) + 0.5
    x, dy = torch.randn(tokens, columns).to(dtype), torch.randn(tokens, rows).to(dtype)
    return (packed, *constants_, *shape), W, A, B, m, x, dy


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "float32 scales"])
def test_products_of_a_layer(isa, threads, nested):
    """Forward and backward against float64, with a given n and with one made on the way; our kernels give the same bits for any number of threads."""
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
                back.append(isa.adapted_product_backward(dy, x, down, up, u, None if magnitude is None else y, factors, s, *weight, True))
            for results in (found, back):
                same = all(same_bits(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))
                assert same or not isa.multiplies(x, *weight), (size, norm is None)
            expected = (x.double() @ W.t() + s * (other.double() @ A.double().t()) @ B.double().t()) * gain
            assert relative(y, expected) < 0.02 and y.dtype == x.dtype, size
            assert relative(u, other.double() @ A.double().t()) < 0.02 and relative(up, s * gain.unsqueeze(1) * B) < 0.01 and relative(down, A) < 0.01
            assert factors.shape == (0 if magnitude is None else 3, len(m))
            if magnitude is not None:
                torch.testing.assert_close(factors.double(), torch.stack((gain, m.double(), n)), rtol=3e-4 if norm is None else 1e-6, atol=0)  # updates as large as W
            dx, dA, dB, dm = back[0]
            wide, g = dy.double(), gain.unsqueeze(1)
            assert relative(dx, wide @ (g * V)) < 0.02 and dx.dtype == dy.dtype
            assert relative(dA, (wide @ (g * s * B)).t() @ x.double()) < 0.02 and relative(dB, g * s * (wide.t() @ u.double())) < 0.02
            assert dm.numel() == 0 if magnitude is None else relative(dm, (wide * y.double()).sum(0) / m) < 0.02
            assert isa.adapted_product_backward(dy, x, down, up, u, None, factors, s, *weight, False)[0].numel() == 0
        for row_gain in (None, m):
            scaled = W if row_gain is None else m.double().unsqueeze(1) * W
            *parts, rows, columns, blocksize, nested_blocksize = weight
            for source, matrix, transposed in ((x, scaled.t(), True), (dy, scaled, False)):
                product = isa.nf4_product(source, *parts, row_gain, rows, columns, blocksize, nested_blocksize, transposed)
                assert relative(product, source.double() @ matrix) < 0.02, (size, transposed)


def test_a_norm_made_on_the_way_where_its_sums_cancel(isa):
    """A lies along rows of W, where rounding W counts most, and takes some or all of them away; B = 0 in others, whose n is the base's to the bit."""
    weight, W, _, _, m, x, _ = drawn_layer(64, 64, 192, 64, 64, True)
    base, B = W.norm(dim=1).float(), torch.zeros(64, 64)
    for taken in (0.0, 0.1, 0.25, 0.5, 1.0):
        B[:8, :8] = -taken * torch.eye(8)
        n = isa.adapted_product(x, x, W.float(), B, m, None, base, 1.0, *weight)[4][2]
        torch.testing.assert_close(n[:8], (1 - taken) * base[:8], rtol=6e-4 if taken < 0.29 else 1e-5, atol=1e-4 if taken == 1 else 0)
        torch.testing.assert_close(n[8:], base[8:], rtol=0 if isa.bf16_unit == "AMX" and taken < 0.29 else 1e-6, atol=0)


def test_products_refuse_what_does_not_fit(isa):
    weight, W, A, B, m, x, dy = drawn_layer(40, 64, 128, 4, 64, True)
    *parts, rows, columns, blocksize, nested = weight
    for call in (
        lambda: isa.adapted_product(x[:, :64], x[:, :64], A, B, m, m, None, 1.0, *weight),
        lambda: isa.adapted_product(x, x, A, B[:32], m, m, None, 1.0, *weight),
        lambda: isa.adapted_product_backward(dy[:, :32], x, A.bfloat16(), B.bfloat16(), x[:, :4], None, torch.empty(0, 64), 1.0, *weight, True),
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
            assert relative(dB, exact_dB * (1.7 if factor is None else 1.7 * gain.double().unsqueeze(1))) < TOLERANCE[dtype]
            if beside is None:
                assert dm.numel() == 0
            else:
                assert relative(dm, (dy.double() * y.double()).sum(0) / safe.double()) < 1e-6  # summed wide, whatever dtype
        dA = isa.token_product(u, dy)
        assert dA.dtype == wide and relative(dA, exact_dB.t()) < TOLERANCE[dtype]


def test_sums_over_tokens_refuse_what_does_not_fit(isa):
    dy, u, up = torch.randn(8, 32).bfloat16(), torch.randn(8, 4).bfloat16(), torch.randn(32, 4).bfloat16()
    for arguments in ((dy, up[:-1], u, None, None, None), (dy, up, u, dy[:, 1:], None, torch.ones(32)), (dy, up, u, None, torch.ones(31), None), (dy, up, u[1:], None, None, None)):
        with pytest.raises((ValueError, RuntimeError)):
            isa.adapter_gradients(*arguments, 1.0)
    with pytest.raises((ValueError, RuntimeError)):
        isa.token_product(u[1:], dy)


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
        assert torch.equal(kernels.encode_nf4(weight, scales, blocksize), reference.encode_nf4(weight, scales, blocksize))
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

STEP_SHAPES = [(1, 1), (3, 15), (5, 16), (2, 4097), (7, 576), (300, 130)]


def step_results(kernels, dtype: torch.dtype, shape: tuple[int, int]) -> list[torch.Tensor]:
    """Every elementwise kernel of a step on the same random values."""
    generator = torch.Generator().manual_seed(shape[1])
    a, b, c = ((4 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3))
    targets, logits = torch.randint(0, shape[1], shape[:1], generator=generator), 5 * a
    y, inverse = kernels.rms_norm(a, b[0], 1e-5)
    return [
        kernels.cross_entropy_(logits, targets), logits, y, inverse, kernels.rms_norm_backward(c, a, b[0], inverse),
        kernels.swiglu(a, b), *kernels.swiglu_backward(c, a, b), *kernels.swiglu_backward_dots(c, a, b),
    ]  # fmt: skip


@pytest.mark.parametrize("shape", STEP_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_kernels_equal_the_reference(isa, dtype, shape):
    """To the rounding of float32 inside; then each rounds to its dtype where the reference does."""
    for found, expected in zip(step_results(isa, dtype, shape), step_results(reference, dtype, shape), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(found, expected, rtol=2 * eps + 1e-5, atol=(eps + 4e-6) * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_kernels_give_the_same_bits_everywhere(kernels, dtype, threads):
    found = []
    for isa, count in [*((isa, 1) for isa in ISAS), (ISAS[-1], 2)]:
        kernels.select(isa)
        threads(count)
        found.append([part for shape in STEP_SHAPES for part in step_results(kernels, dtype, shape)])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


def test_every_bf16_gate(kernels):
    """All 65536, infinities and NaN among them: the nearest bf16 to float64's result, up to float32's error, and one result everywhere."""
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    one, x = torch.ones_like(gate), gate.double()
    s = x.sigmoid()
    exact, results = (x * s, s * (1 + x * (1 - s)), x * s), []
    for isa in ISAS:
        kernels.select(isa)
        results.append((kernels.swiglu(gate, one), *kernels.swiglu_backward(one, gate, one)))
        for found, expected in zip(results[-1], exact, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=2**-8 + 2**-20, atol=2e-7, equal_nan=True)
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(results[-1], results[0], strict=True))


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
    """1 + 2^-23 + 2^-24 (1 - 2^-46), which a sum in double turns into the middle between two floats, and that into the upper one."""
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


ROTATIONS = [(1, 1, 2, 1, 1), (3, 1, 30, 7, 7), (2, 2, 64, 5, 5), (1, 3, 80, 33, 11), (9, 3, 64, 300, 150)]  # heads, groups, D, tokens, positions


def rotation(heads: int, groups: int, D: int, tokens: int, positions: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q and k as they lie beside each other in the result of one product, and cos and sin of a rotation that also stretches."""
    generator = torch.Generator().manual_seed(D)
    q, k, _ = (3 * torch.randn(tokens, heads + 2 * groups, D, generator=generator)).to(dtype).split([heads, groups, groups], 1)
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
            torch.testing.assert_close(found.double(), expected, rtol=rounding * (1 + 1e-4), atol=1e-5 if dtype != torch.float32 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_give_the_same_bits_everywhere(kernels, dtype, threads):
    found = []
    for isa, count in [*((isa, 1) for isa in ISAS), (ISAS[-1], 2)]:
        kernels.select(isa)
        threads(count)
        found.append([part for shape in ROTATIONS for part in rotation_results(kernels, *shape, dtype)])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


def test_a_rotation_that_does_not_fit_is_refused(kernels):
    q, k, cos, sin = rotation(*ROTATIONS[3], torch.float32)
    for wrong in ((q, k[1:], cos, sin), (q, k, cos[1:], sin), (q, k, cos[1:], sin[1:]), (q, k[..., 1:], cos, sin)):
        with pytest.raises(ValueError, match="turned by"):
            kernels.rotate(*wrong)
    wide = [x.double() for x in (q, k, cos, sin)]
    assert all(map(torch.equal, kernels.rotate(*wide), reference.rotate(*wide)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_equal_the_reference(isa, dtype):
    """To the bit, with the guards of norms and magnitudes near zero, and what is no number stays none."""
    for rank, columns, rows in ((1, 1, 1), (3, 70, 33), (16, 576, 3000)):
        A, B, m, n = torch.randn(rank, columns), torch.randn(rows, rank), torch.randn(rows), torch.rand(rows)
        m[0], n[-1] = -1e-9, 0.0
        m[rows // 2] = math.nan
        for parts in ((m, n), (None, None)):
            found, expected = isa.fold_factors(A, B, *parts, 0.7, dtype), reference.fold_factors(A, B, *parts, 0.7, dtype)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(ours.isnan(), theirs.isnan())
                assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    with pytest.raises(ValueError, match="for 3 rows"):
        isa.fold_factors(torch.randn(2, 8), torch.randn(3, 2), torch.ones(4), torch.ones(4), 1.0, dtype)


def test_cross_entropy_at_the_edges(isa):
    """Sure predictions keep their digits, impossible ones stay finite, and what is no number is not hidden."""
    logits = torch.tensor([[0.0, 30.0, -5.0], [-1e4, 0.0, 1e4], [math.inf, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    losses = isa.cross_entropy_(logits, torch.tensor([1, 0, 1, 1]))
    assert losses[0].item() == pytest.approx(math.exp(-30), rel=1e-3) and logits[0, 1].item() == pytest.approx(-math.exp(-30), rel=1e-3)
    assert losses[1].item() == pytest.approx(2e4) and logits[1].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-30)
    assert losses[2:].isnan().all()
    for target in (-100, 3):
        with pytest.raises(IndexError, match="targets"):
            isa.cross_entropy_(torch.zeros(1, 3), torch.tensor([target]))


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
        ops.adapted_product: (*[torch.randn(32, 128).bfloat16()] * 2, A, B, gain, None, gain, 2.0, packed, *parts, 10, 128, 64, NESTED),
        ops.adapted_product_backward: (
            torch.randn(32, 10).bfloat16(), torch.randn(32, 128).bfloat16(), A.bfloat16(), B.bfloat16(), torch.randn(32, 4).bfloat16(),
            torch.randn(32, 10).bfloat16(), torch.rand(3, 10), 2.0, packed, *parts, 10, 128, 64, NESTED, True,
        ),
        ops.column_dots: (weight.bfloat16(), weight.bfloat16()),
        ops.token_product: (B.bfloat16(), weight.bfloat16()),
        ops.adapter_gradients: (weight.bfloat16(), A.t().contiguous().bfloat16(), B.bfloat16(), weight.bfloat16(), None, torch.ones(128), 2.0),
        ops.cross_entropy_: (weight.clone(), torch.arange(10)),
        ops.adamw_: (*torch.rand(5, 60).unbind(), 0.9, 0.999, 1e-8, 0.99, 1e-3, 0.5),
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
                    assert same_bits(got, reference.dequantize_nf4(packed, *parts, gain, *shape, blocksize, NESTED, dtype)), (shape, dtype)
                    into = torch.full(shape, float("nan"), dtype=dtype)
                    bitsandbytes_nf4.dequantize_nf4_into(into, packed, *parts, gain, blocksize, NESTED)
                    assert same_bits(into, got)

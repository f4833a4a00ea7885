"""An optimizer's step by the native CPU kernels: AdamW against torch's own to the bit, the norm of all gradients, 8-bit
blocks of moments against the reference.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import routed, same_bits, same_everywhere

from qlora_kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned", "threads")

SIZES = [5, 1, 0, 16, 31, 33, 1, 97, 0, 4096, 8191, 20_001, 2]

# ---------------------------------------------------------------- AdamW


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


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.9), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize(("gap", "offset"), [(0, 0), (3, 1), (200, 7)])
@pytest.mark.parametrize(
    ("count", "decay", "sizes"),
    [(1, 0.1, SIZES), (2, 0.1, SIZES), (2, 0.0, [1, 2, 0] * 200)],
    ids=["1 thread", "2 threads", "tiny pieces"],
)
def test_adamw_has_the_bits_of_torch(isa, threads, betas, gap, offset, count, decay, sizes):
    """With every instruction set, one thread and two, wherever a piece lies; nothing is written between the pieces."""
    threads(count)
    p, _, at, memory = pieces(sizes, gap, offset, 0)
    n = at[-1] + sizes[-1] + gap
    m, v, between = torch.zeros(n), torch.zeros(n), memory[[x.storage_offset() + x.numel() for x in p]].clone()
    theirs = [torch.nn.Parameter(x.clone()) for x in p]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=betas, weight_decay=decay, foreach=False, fused=False)
    second, moments = [x.clone() for x in p], torch.zeros(2, n)
    for step in range(1, 4):
        g, scale = pieces(sizes, gap, offset, step)[1], (1.0, 0.3, 1 / 777)[step - 1]
        step_size, correction = 1e-2 / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
        numbers = [*betas, 1e-8, 1 - 1e-2 * decay, step_size, correction, scale]
        routed(isa).adamw_(p, g, at, m, v, torch.empty(3, n), numbers)
        reference.adamw_(second, g, at, *moments, torch.empty(3, n), numbers)
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


def test_adamw_of_any_floats(isa):
    """Subnormal, huge, infinite, and not a number: what the reference makes of them."""
    values = torch.randint(-(1 << 31), 1 << 31, (4, 1 << 14)).to(torch.int32).view(torch.float32)
    ends = []
    for code in (routed(isa), reference):
        p, g, m, v = (x.clone() for x in values)
        code.adamw_([p], [g], [0], m, v, torch.empty(3, len(p)), [0.9, 0.99, 1e-8, 0.9, 1e-3, 0.5, 0.25])
        ends.append(torch.stack((p, m, v)))
    assert same_bits(*(x.nan_to_num(7.0, posinf=math.inf, neginf=-math.inf) for x in ends))
    assert ends[0].isfinite().any(1).all()


def test_adamw_in_float64_goes_to_the_reference(kernels):
    ends = []
    for code in (routed(kernels), reference):
        torch.manual_seed(0)
        p, g, m, v = torch.rand(4, 30, dtype=torch.float64)
        work = torch.empty(3, 30, dtype=torch.float64)
        code.adamw_([p], [g], [0], m, v, work, [0.9, 0.99, 1e-8, 0.9, 1e-3, 0.5, 0.25])
        ends.append(torch.stack((p, m, v)))
    assert same_bits(*ends)


def refused_by_adamw(
    kernels, p: int, g: int, at: list[int], moments: tuple[int, int] = (20, 20), work: int = 20
) -> None:
    tensors = [torch.zeros(p)] * 2, [torch.zeros(g)] * 2
    numbers = [0.9, 0.99, 1e-8, 0.9, 1e-3, 0.5, 1.0]
    with pytest.raises(ValueError):
        kernels.adamw_(*tensors, at, *map(torch.zeros, moments), torch.zeros(3, work), numbers)


@pytest.mark.parametrize("at", [[0, 11], [0, 9], [-1, 10], [0, 10, 20], [0]], ids=str)
def test_adamw_refuses_places_that_do_not_fit(kernels, at):
    """C code would write past the end."""
    refused_by_adamw(kernels, 10, 10, at)


@pytest.mark.parametrize(
    "g, moments, work", [(9, (20, 20), 20), (10, (20, 19), 20), (10, (20, 20), 19)], ids=["g", "moments", "work"]
)
def test_adamw_refuses_sizes_that_do_not_fit(kernels, g, moments, work):
    refused_by_adamw(kernels, 10, g, [0, 10], moments, work)


# ---------------------------------------------------------------- the norm of all gradients


@pytest.mark.parametrize(
    "sizes",
    [[0], [1], SIZES, [1, 2, 0] * 4000, [100_003]],
    ids=["nothing", "one", "odd sizes", "tiny pieces", "one large"],
)
def test_the_norm_of_many_pieces(kernels, threads, sizes):
    """torch's up to rounding, with the same bits on every instruction set and for any number of threads."""
    tensors = pieces(sizes, 0, 1, 0)[1]
    exact = torch.cat(tensors).double().norm()
    torch.testing.assert_close(kernels.total_norm(tensors).double(), exact, rtol=1e-6, atol=0)
    same_everywhere(kernels, threads, lambda: [kernels.total_norm(tensors)])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_norm_hides_nothing_that_is_not_finite(kernels, bad):
    tensors = pieces([100_003], 0, 1, 0)[1]
    tensors[0][70_000] = bad
    assert str(kernels.total_norm(tensors).item()) == str(abs(bad))


def test_the_norm_of_other_tensors_goes_to_the_reference(kernels):
    tall = [torch.randn(30, 40).t(), torch.randn(5, dtype=torch.float64)]
    torch.testing.assert_close(routed(kernels).total_norm(tall), torch.nn.utils.get_total_norm(tall))


# ---------------------------------------------------------------- 8-bit moments


def midpoints_and_their_neighbours(signed: bool) -> torch.Tensor:
    levels, midpoints = reference.block_tables(torch.device("cpu"), signed)
    up, down = torch.nextafter(midpoints, torch.tensor(2.0)), torch.nextafter(midpoints, torch.tensor(-2.0))
    return torch.cat([levels, midpoints, up, down, levels[-3:]]).clamp(-1 if signed else 0, 1)


def of_all_sizes(signed: bool) -> torch.Tensor:
    spread = torch.randn(64, 256) * 10.0 ** torch.randint(-9, 3, (64, 256))
    return spread if signed else spread**2


BLOCKS = {
    "exact": lambda signed: midpoints_and_their_neighbours(signed).unsqueeze(0),
    "zeros": lambda signed: torch.zeros(1, 256),
    "subnormal": lambda signed: torch.rand(1, 512) * 1e-39,
    "of all sizes": of_all_sizes,
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("blocksize", [256, None], ids=["blocks of 256", "one block"])
def test_8bit_blocks_equal_the_reference(isa, signed, kind, blocksize):
    """Exact midpoints and their neighbours, values of all sizes, zeros and subnormals; what is above 0 is not encoded
    as 0.
    """
    for row, values in enumerate(BLOCKS[kind](signed)):
        n, size = values.numel(), blocksize or values.numel()
        results = []
        for code in (isa, reference):
            codes, absmax = torch.empty(n, dtype=torch.uint8), torch.empty(n // size)
            again, work = torch.empty(n), torch.empty(n, dtype=torch.int32)
            code.encode_blocks_into(codes, absmax, values.clone(), work, size, signed)
            code.decode_blocks_into(again, codes, absmax, work, size, signed)
            results.append((codes, absmax, again))
        assert all(map(same_bits, *results)), row
        codes, absmax, _ = results[0]
        assert torch.equal(absmax, values.view(-1, size).abs().amax(1)), row
        if not signed and absmax.min() > 1e-30:
            assert (codes[values > absmax.max() * 1e-37] > 0).all(), row


@pytest.mark.parametrize("signed", [False, True])
def test_8bit_blocks_refuse_what_does_not_fit(isa, signed):
    codes, absmax, work = torch.zeros(256, dtype=torch.uint8), torch.ones(1), torch.zeros(256, dtype=torch.int32)
    with pytest.raises(ValueError, match="257 values"):
        isa.encode_blocks_into(codes, absmax, torch.zeros(257), work, 256, signed)

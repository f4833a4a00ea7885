"""Products of a frozen dense weight, as the head's in the loss, in float32 or by 16-bit integers. The oracle is
float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import relative, routed, same_bits
from torch import Tensor

from qlora_kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned", "threads")

# tokens, rows, columns: tiles over, less than a tile, panels that are not whole, inner dimensions of several parts and
# not of 64s
SIZES = [
    (32, 1, 64),
    (1, 1090, 128),
    (7, 96, 64),
    (33, 64, 128),
    (45, 1090, 192),
    (40, 2049, 64),
    (130, 100, 1344),
    (32, 1600, 448),
]
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))


@pytest.fixture(params=["high", "highest"])
def kernel(isa, request) -> Iterator[str]:
    """What multiplies with torch's leave and without: "integers", "float32", or "" for the reference."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    integers = request.param == "high" and isa.layers == 2
    yield "integers" if integers else "float32" if isa.dense_in_float32 else ""
    torch.set_float32_matmul_precision(before)


def product(isa, x: Tensor, W: Tensor, transposed: bool) -> Tensor:
    out = torch.empty(x.shape[0], W.shape[0 if transposed else 1])
    assert isa.matmul_dense_into(out, x, W, transposed) is None
    return out


def exact(x: Tensor, W: Tensor, transposed: bool) -> Tensor:
    return x.double() @ (W.double().t() if transposed else W.double())


@each_size
@pytest.mark.parametrize("transposed", [True, False])
def test_products_of_a_dense_weight(isa, kernel, threads, size, transposed):
    """The same bits for any number of threads; where no kernel is, the reference's."""
    tokens, rows, columns = size
    x, W = torch.randn(tokens, columns if transposed else rows), torch.randn(rows, columns)
    assert isa.supports_matmul_dense(x, W) == bool(kernel)
    if not kernel:
        out = torch.empty(tokens, rows if transposed else columns)
        routed(isa).matmul_dense_into(out, x, W, transposed)
        assert relative(out, exact(x, W, transposed)) < 5e-6
        return
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(product(isa, x, W, transposed))
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    limits = (1e-7, 6e-4) if kernel == "integers" else (0, 5e-6)
    assert limits[0] <= relative(found[0], exact(x, W, transposed)) < limits[1]


@each_size
@pytest.mark.parametrize("transposed", [True, False])
def test_a_weight_in_bf16_is_the_same_in_float32(isa, kernel, size, transposed):
    """To the bit: float32 holds what bf16 does."""
    tokens, rows, columns = size
    x, W = torch.randn(tokens, columns if transposed else rows), torch.randn(rows, columns).bfloat16()
    assert isa.supports_matmul_dense(x, W) == bool(kernel)
    if kernel:
        assert same_bits(product(isa, x, W, transposed), product(isa, x, W.float(), transposed))
    else:
        out = torch.empty(tokens, rows if transposed else columns)
        routed(isa).matmul_dense_into(out, x, W, transposed)
        assert relative(out, exact(x, W, transposed)) < 5e-6


@pytest.mark.parametrize("kind", ["even", "heavy tails", "columns and tokens that stand out", "gradients of a loss"])
def test_integers_err_less_than_bf16(isa, kernel, kind):
    """By the root of the mean square of a token's errors, the worst one's by integers is below the best one's where
    weight and result are bf16; what goes in is bf16 for both. Gradients of logits: one of -1, the others near 0.
    """
    x, dy, W = torch.randn(64, 192), torch.randn(64, 320), torch.randn(320, 192)
    if kind == "heavy tails":
        t = torch.distributions.StudentT(3.0)
        x, dy, W = t.sample(x.shape), t.sample(dy.shape), W * torch.randn(320, 1).exp()
    elif kind == "gradients of a loss":
        dy = torch.softmax(3 * dy, 1) - torch.eye(320)[:64]
    elif kind != "even":
        x[:, 7] *= 100
        dy[:, 5] *= 100
        x, dy = (t * (4 * torch.randn(64, 1)).exp() for t in (x, dy))
        W *= (torch.randn(320, 1) / 2).exp()
    for source, transposed in ((x.bfloat16(), True), (dy.bfloat16(), False)) if kernel else ():
        wanted = exact(source, W, transposed)
        low = exact(source, W.bfloat16(), transposed).bfloat16()
        ours = product(isa, source.float(), W, transposed)
        error = [(found.double() - wanted).norm(dim=1) / wanted.norm(dim=1) for found in (ours, low)]
        assert error[0].max() < error[1].min()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(isa, kernel, value):
    """Of a token in it alone; of the weight, in its row of W^T."""
    x, dy, W = torch.randn(40, 128), torch.randn(40, 96), torch.randn(96, 128)
    x[3, 5] = dy[4, 70] = value
    for source, token, transposed in ((x, 3, True), (dy, 4, False)) if kernel else ():
        finite = product(isa, source, W, transposed).isfinite().all(1)
        assert finite.sum() == 39 and not finite[token]
    W[7, 9] = value
    if kernel:
        finite = product(isa, x[:32].nan_to_num(0, 0, 0), W, True).isfinite().all(0)
        assert finite.sum() == 95 and not finite[7]


def test_the_largest_integers_do_not_overflow(isa, kernel):
    W = torch.full((96, 128), 2.5)
    x, dy = torch.full((40, 128), -3.0), torch.full((40, 96), 1e30)
    for source, value, transposed in ((x, -3.0 * 2.5 * 128, True), (dy, 1e30 * 2.5 * 96, False)) if kernel else ():
        y = product(isa, source, W, transposed)
        torch.testing.assert_close(y, torch.full_like(y, value), rtol=1e-5, atol=0)


def test_what_kernels_do_not_take_is_the_references(isa, kernel):
    """Other dtypes, no tokens, columns not in 64s."""
    x, W = torch.randn(40, 128), torch.randn(96, 128)
    assert not isa.supports_matmul_dense(x[:0], W)
    assert not isa.supports_matmul_dense(x[:, :96], W[:, :96].contiguous())
    assert not isa.supports_matmul_dense(x.bfloat16(), W.bfloat16())
    assert not isa.supports_matmul_dense(x, W.t().contiguous().t())
    out, other = torch.empty(40, 96), torch.empty(40, 96)
    x, W = x[:, :96].contiguous(), W[:, :96].contiguous()
    routed(isa).matmul_dense_into(out, x, W, True)
    reference.matmul_dense_into(other, x, W, True)
    assert same_bits(out, other)


def test_wrong_shapes_are_refused(isa, kernel):
    x, W = torch.randn(40, 128), torch.randn(96, 128)
    for out, transposed in ((torch.empty(40, 95), True), (torch.empty(40, 128), False)) if kernel else ():
        with pytest.raises(ValueError, match="for a weight of 96 x 128"):
            isa.matmul_dense_into(out, x, W, transposed)

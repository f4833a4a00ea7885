"""AVX-VNNI: one instruction in place of AVX2's two, so a layer's products have the bits that AVX2 gives them, which the
other tests hold to the reference. A processor that has the instruction in AVX-512's encoding alone runs a library that
is compiled so for this test.
"""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from helpers import quantized, same_bits

from qlora_kernels.cpu import build, native

pytestmark = pytest.mark.usefixtures("poisoned", "threads")

CAN = torch.cpu.get_capabilities()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels, of which `select("avx_vnni")` finds the instruction here."""
    if CAN.get("avx_vnni"):
        return native.load()[0]
    if not (CAN.get("avx512_vnni") and CAN.get("avx512_vl")):
        pytest.skip("AVX-VNNI was not run: this processor has it in no encoding")
    built = build.compile_library(
        tmp_path_factory.mktemp("vnni") / build.LIBRARY, f"{os.environ.get('CXX', 'g++')} -DQLORA_EVEX"
    )
    return native.Native(ctypes.CDLL(str(built)))


@pytest.fixture
def by(library):
    """by(set, function): its tensors by the kernels of that set, where torch allows integers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")

    def run(isa: str, function) -> list[torch.Tensor]:
        library.select(isa)
        assert library.layers == 2
        return function(library)

    yield run
    torch.set_float32_matmul_precision(before)
    library.select()


@pytest.mark.parametrize("size", [(130, 160, 192, 17), (5, 64, 192, 3), (31, 2048, 64, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_has_the_bits_of_avx2(by, threads, size, dtype):
    tokens, rows, columns, rank = size
    weight = quantized(torch.randn(rows, columns), 64)
    A, B, m = torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank) * 0.3, torch.rand(rows) + 0.5
    x, dy = torch.randn(tokens, columns).to(dtype), torch.randn(tokens, rows).to(dtype)

    def both_ways(kernels) -> list[torch.Tensor]:
        operands = (0.7, weight.parts, weight.layout)
        y, *saved = kernels.adapted_linear(x, x, A, B, m, None, None, *operands)
        return [y, *saved, *kernels.adapted_linear_backward(dy, [x, *saved], y, *operands, True)]

    for count in (1, 2):
        threads(count)
        found = [by(isa, both_ways) for isa in ("avx2", "avx_vnni")]
        assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
        assert all(part.isfinite().all() and part.abs().sum() > 0 for part in found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_has_the_bits_of_avx2(by, dtype):
    W, x, dy = torch.randn(1090, 192).to(dtype), torch.randn(45, 192), torch.randn(45, 1090)

    def both_ways(kernels) -> list[torch.Tensor]:
        y, dx = torch.empty(45, 1090), torch.empty(45, 192)
        kernels.matmul_dense_into(y, x, W, True)
        kernels.matmul_dense_into(dx, dy, W, False)
        return [y, dx]

    found = [by(isa, both_ways) for isa in ("avx2", "avx_vnni")]
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    assert all(part.isfinite().all() and part.abs().sum() > 0 for part in found[1])


def test_the_words_name_it(library):
    library.select("avx_vnni")
    try:
        assert library.describe().startswith("native (AVX2 and AVX-VNNI, ")
    finally:
        library.select()

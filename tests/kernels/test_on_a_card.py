"""What the reference asks of a card, on tensors that claim to lie on one: they have no values, but what is called."""

from __future__ import annotations

import pytest
import torch
from launches import Launches
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_kernels import reference
from qlora_kernels.triton import adapter

CARD = torch.device("cuda", 0)


@pytest.fixture
def card():
    """While it is there, tensors made on CARD have no memory."""
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_an_adapter_arrive_in_float32_unrounded(card, dtype):
    """cuBLAS writes the sums over tokens itself; rounded to 16 bits first, a small step would be lost in them."""
    dy, xA, x, B = (torch.empty(*shape, dtype=dtype, device=CARD) for shape in ((50, 9), (50, 4), (50, 7), (9, 4)))
    with Launches() as launches:
        _, dB, _ = reference.adapter_gradients(dy, B, xA, None, None, None, 2.0)
        dA = reference.matmul_tn(xA, x)
    assert dB.dtype == dA.dtype == torch.float32
    assert launches.overloads["mm.dtype"] == 2 and launches.overloads["mm.default"] == 1  # v alone is in 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adapter_gradients", "joined_gradients"])
def test_triton_finishes_gradients_that_arrived_in_float32(card, name, dtype):
    """The sums come before the launch that finishes them, which a card without memory refuses."""
    dy, xA, B, y = (torch.empty(*shape, dtype=dtype, device=CARD) for shape in ((50, 9), (50, 4), (9, 4), (50, 9)))
    row_scale, m = torch.empty(2, 9, device=CARD).unbind()
    rest = (row_scale, m, 2.0) if name == "adapter_gradients" else (None, torch.stack((row_scale, m)), [9], 2.0)
    with Launches() as launches, pytest.raises((AssertionError, RuntimeError)):
        getattr(adapter, name)(dy, B, xA, y, *rest)
    assert launches.overloads["mm.dtype"] == 1 and launches.overloads["mm.default"] <= 1  # v alone is in 16 bits


def test_the_reference_is_not_cut_for_the_caches_of_a_cpu(card):
    """A card without kernels of ours launches its pieces one by one: in a CPU's, 4096 x 4096 were decoded by 326
    launches, and their row norms took 1,359. A piece is whole blocks.
    """
    pieces = {device: reference.chunk_elements(torch.empty(1, device=device)) for device in ("cpu", CARD)}
    assert pieces["cpu"] <= 1 << 18 and pieces[CARD] >= 4096 * 4096
    assert all(piece % 4096 == 0 for piece in pieces.values())

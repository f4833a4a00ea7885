"""Which device an option means, on a machine whose cards are only claimed: what torch.cuda says of them is set."""

from __future__ import annotations

import pytest
import torch

from qlora.errors import UserError
from qlora.models.device import device_notes, products_of, resolve_device, resolve_dtype


@pytest.fixture
def cards(monkeypatch):
    """Two cards, the second one current."""
    for name, value in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


@pytest.mark.parametrize("device, index", [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_card_has_its_number(cards, device, index):
    found = resolve_device(device)
    assert (found.type, found.index) == ("cuda", index)
    # the kind of function that refuses a card without a number
    assert torch.cuda._utils._get_device_index(found, optional=False) == index


def test_a_card_that_is_not_there_is_refused(cards):
    with pytest.raises(UserError, match=r"device=cuda:2: torch sees 2 CUDA devices\. Use cuda:0, cuda:1\."):
        resolve_device("cuda:2")
    assert resolve_device("cpu") == torch.device("cpu")


def test_without_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="device=cuda: torch sees no CUDA device here"):
        resolve_device("cuda")


def test_an_accelerator_that_is_left_aside_is_said(monkeypatch):
    cpu, nothing = torch.device("cpu"), device_notes(torch.device("cpu"), "fp32")
    for module, name in ((torch.backends.mps, "Apple GPU (mps)"), (torch.xpu, "Intel GPU (xpu)")):
        monkeypatch.setattr(module, "is_available", lambda: True)
        assert f"the {name} is not used: qlora trains on CPUs and CUDA devices" in device_notes(cpu, "fp32")
    assert len(device_notes(cpu, "fp32")) == len(nothing) + 2


@pytest.mark.parametrize("bf16", [False, True])
def test_auto_says_why_it_is_fp32(monkeypatch, bf16):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: bf16)
    notes = device_notes(torch.device("cpu"), resolve_dtype("auto", torch.device("cpu")))
    assert any("`dtype=bf16`" in note for note in notes) == (not bf16)


@pytest.mark.parametrize(
    "dtype, device, bf16, before, inside",
    [
        ("auto", "cpu", False, "highest", "high"),
        ("auto", "cpu", False, "medium", "medium"),
        ("auto", "cpu", True, "highest", "highest"),
        ("bf16", "cpu", False, "highest", "high"),
        ("bf16", "cpu", True, "highest", "highest"),
        ("fp32", "cpu", False, "highest", "highest"),
        ("auto", "cuda:0", False, "highest", "highest"),
    ],
)
def test_float32_products_are_less_precise_only_where_bf16_is_missing(monkeypatch, dtype, device, bf16, before, inside):
    """And only inside; what the caller allowed stands."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: bf16)
    torch.set_float32_matmul_precision(before)
    try:
        with pytest.raises(KeyboardInterrupt), products_of(dtype, torch.device(device)):
            assert torch.get_float32_matmul_precision() == inside
            raise KeyboardInterrupt
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")

"""n is computed once for each version of A, B and W, by whoever needs it first, and never stale."""

from __future__ import annotations

import pytest
import torch
from layers_for_tests import one_layer
from tiny import adapted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import qlora
from qlora import adapter_parameters, named_adapters
from qlora.layers import nf4
from qlora.layers.adapters import row_norms
from qlora.layers.attach import forget_row_norms, refresh_row_norms
from qlora.layers.linear import frozen_weight
from qlora.layers.norms import RowNormCache


def test_the_cache_keeps_what_belongs_to_a_version():
    """n by the whole version; ||W_j|| by the part that is W's."""
    cache, n, base = RowNormCache(), torch.ones(3), torch.zeros(3)
    first, moved, other_base = (0, 1, 2, 3, 4, 5, 6), (1, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 5, 7)
    assert cache.get(first) is None and cache.get_base(first) is None
    assert cache.put(first, n) is n and cache.put_base(first, base) is base
    assert cache.get(first) is n and cache.get(moved) is None and cache.get(other_base) is None
    assert cache.get_base(first) is base and cache.get_base(moved) is base and cache.get_base(other_base) is None


def expected_norm(adapter) -> torch.Tensor:
    return row_norms(frozen_weight(adapter.base), adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.scaling)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False, "fused": False}], ids=str)
def test_norm_follows_every_optimizer(options):
    """The fused AdamW, transformers.Trainer's default, does not bump Tensor._version."""
    model, _ = one_layer("nf4", 64, 48, dtype=torch.float32)
    adapted(model, "dora")
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.05, **options)
    for _ in range(4):
        model(torch.randn(5, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model.layer.current_row_norms(), expected_norm(model.layer))


@pytest.mark.parametrize("change", ["in place", "data", "load_state_dict", "base", "refresh"])
def test_norm_follows_other_changes(change):
    model, _ = one_layer("nf4", 64, 48, dtype=torch.float32)
    adapted(model, "dora")
    adapter, before = model.layer, model.layer.current_row_norms()
    if change == "in place":
        with torch.no_grad():
            adapter.lora_B.mul_(2)
    elif change == "data":
        adapter.lora_B.data = adapter.lora_B.data * 2
    elif change == "load_state_dict":
        model.load_state_dict({k: v * 2 if k.endswith("lora_B") else v for k, v in model.state_dict().items()})
    elif change == "base":
        adapter.base.quantized = nf4.quantize(torch.randn(48, 64))
    else:
        adapter.lora_B.detach().numpy()[:] *= 2
        forget_row_norms(model)
    assert not torch.equal(adapter.current_row_norms(), before)
    assert torch.equal(adapter.current_row_norms(), expected_norm(adapter))


class NormWatch(TorchDispatchMode):
    """Counts the operators that compute norms."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += "row_norms" in str(function)
        return function(*args, **(kwargs or {}))


def test_norm_is_computed_once_per_optimizer_step():
    """Not per micro-batch, and not in the recomputation of a checkpointed layer."""
    model, _ = one_layer("nf4", 64, 48, dtype=torch.float32)
    adapted(model, "dora")
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.01)
    with NormWatch() as watch:
        for _ in range(3):
            for _ in range(4):
                checkpoint(model, torch.randn(5, 64, requires_grad=True), use_reentrant=False).sum().backward()
            optimizer.step()
    assert watch.calls == 3


def test_norms_of_a_model_come_from_one_operator():
    """As before a forward pass on a GPU; with the bits that a layer by itself finds, and only what has changed."""
    model = qlora.load_base("smollm2-135m", bits=4, dtype="bf16")
    adapters = dict(named_adapters(adapted(model, targets="q_proj,down_proj")))
    forget_row_norms(model)
    with NormWatch() as watch:
        refresh_row_norms(model)
    assert watch.calls == 1
    for adapter in adapters.values():
        assert torch.equal(adapter.current_row_norms(), expected_norm(adapter))
    first, *others = adapters.values()
    before, untouched = first.current_row_norms(), [adapter.row_norms.n for adapter in others]
    with torch.no_grad():
        first.lora_B += 0.1
    with NormWatch() as watch:
        refresh_row_norms(model)
    assert (
        watch.calls == 1
        and not torch.equal(first.current_row_norms(), before)
        and torch.equal(first.current_row_norms(), expected_norm(first))
    )
    assert all(adapter.row_norms.n is kept for adapter, kept in zip(others, untouched, strict=True))

"""Adapters on a model: which layers, attached, switched, taken away, disabled; the base is never touched."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import TOLERANCE, relative
from tiny import adapted, disturb, random_model, tensors

from qlora import (
    AdapterSpec,
    UserError,
    activate,
    adapter_parameters,
    attach,
    attach_adapters,
    detach,
    disabled,
    named_adapters,
    quantize_,
)
from qlora.layers.attach import active_adapter, adapters_of
from qlora.layers.fused import fuse
from qlora_kernels import backends

IDS = torch.arange(24).view(2, 12)


def test_targets():
    def names(targets):
        model = random_model("llama")
        attach_adapters(model, targets=targets)
        return [name for name, _ in named_adapters(model)]

    assert len(names("all-linear")) == 14 and "lm_head" not in names("all-linear")
    assert names("q_proj,v_proj") == names(["q_proj", "v_proj"]) == names(r".*\.(q|v)_proj")
    assert names("layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    assert names(r"model\.layers\.1\..*") == [n for n in names("all-linear") if ".1." in n]


@pytest.mark.parametrize(
    "targets,text",
    [
        ("q_prj", "q_proj"),
        ("mlp", "LlamaMLP, not a linear layer"),
        (r".*nothing.*", "matches no linear layer"),
        (r"(", "no valid regular expression"),
        ("lm_head", "shares its weight with the embedding"),
        (["q_proj", "upp_proj"], "up_proj"),
    ],
)
def test_a_target_that_cannot_be_is_an_error(targets, text):
    model = random_model("llama")
    with pytest.raises(UserError, match="targets="):
        try:
            attach_adapters(model, targets=targets)
        except UserError as error:
            assert text in str(error)
            raise
    assert list(named_adapters(model)) == []


def test_all_problems_at_once():
    with pytest.raises(UserError) as error:
        attach_adapters(random_model("llama"), method="lokr", rank=0, alpha=-1, dropout=1.0, targets="nothing_here")
    assert len(error.value.problems) == 5


def test_attaching_twice_is_refused():
    model = attach_adapters(random_model("llama"))
    with pytest.raises(UserError, match="the model has an adapter of this name"):
        attach_adapters(model)


def test_only_the_adapters_train_and_stay_float32():
    model = attach_adapters(random_model("llama").to(torch.bfloat16))
    model.to(torch.bfloat16)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter_parameters(model)}
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model))


CASTS = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "device and dtype": lambda model: model.to("cpu", torch.float16),
    "float": lambda model: model.bfloat16().float(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("quantized", [True, False])
def test_a_cast_leaves_what_was_trained_to_the_bit(cast, quantized):
    base = random_model("llama")
    model = adapted(quantize_(base) if quantized else base)
    before = tensors(model)
    parameters = {id(p) for p in adapter_parameters(model)}
    for parameter in adapter_parameters(model):
        parameter.grad = torch.rand_like(parameter)
    CASTS[cast](model)
    assert {id(p) for p in adapter_parameters(model)} == parameters
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter_parameters(model))


def test_adapters_move_to_another_device():
    model = adapted(quantize_(random_model("llama")))
    model.to("meta")
    assert all(p.is_meta and p.dtype == torch.float32 and p.requires_grad for p in adapter_parameters(model))
    assert len(adapter_parameters(model)) == 42
    assert all(not p.is_meta for p in adapter_parameters(model.to_empty(device="cpu")))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bytes_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    adapter = {id(p) for p in adapter_parameters(model)}
    return {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()] if id(t) not in adapter}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_detached_is_the_base_again(method):
    """Names, values and logits, to the bit; nothing of the adapter is left in the model."""
    base = quantize_(random_model("llama"))
    before, state = logits(base), {k: v.clone() for k, v in base.state_dict().items()}
    model = adapted(base, method)
    assert not torch.equal(logits(model), before)
    assert detach(model) is model and torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(state) and all(
        torch.equal(v, state[k]) for k, v in model.state_dict().items()
    )
    assert active_adapter(model) is None and not list(named_adapters(model)) and not model.model._forward_pre_hooks
    attach_adapters(model, method=method)  # the name is free again
    with pytest.raises(UserError, match="the model has no such adapter"):
        detach(model, "other")


def test_several_adapters_on_one_base():
    """One is active at a time; a hundred switches leave every byte of the base, and each adapter computes the same."""
    model = quantize_(random_model("llama"))
    bare, frozen = logits(model), bytes_of(model)
    specs = {"one": AdapterSpec("dora", 3, 7.0), "two": AdapterSpec("lora", 5, 2.0, targets="q_proj,down_proj")}
    found = {}
    for name, spec in specs.items():
        disturb(attach(model, spec, name), seed=len(found))
        found[name] = logits(model)
    assert list(adapters_of(model)) == ["one", "two"] and active_adapter(model).rank == 5
    for name in ("one", "two") * 50:
        activate(model, name)
    for name in ("one", "two", "one"):
        activate(model, name)
        assert torch.equal(logits(model), found[name]) and active_adapter(model).method == specs[name].method
        now = {k.replace(".base.", "."): v for k, v in bytes_of(model).items()}
        assert now.keys() == frozen.keys() and all(torch.equal(now[k], frozen[k]) for k in frozen)
    detach(model, "two")
    assert torch.equal(logits(model), found["one"])
    detach(model)
    assert torch.equal(logits(model), bare)
    with pytest.raises(UserError, match="no adapter of this name, but none"):
        activate(model, "one")


def test_an_adapter_that_cannot_be_leaves_the_active_one():
    model = adapted(random_model("llama"))
    before = logits(model)
    with pytest.raises(UserError, match="matches no layer"):
        attach(model, AdapterSpec(targets="nothing"), "second")
    assert torch.equal(logits(model), before) and list(adapters_of(model)) == ["default"]


@pytest.mark.parametrize("fused", [False, True])
def test_disabled_is_the_base_for_a_moment(fused):
    from qlora.layers.fused import fuse

    model = quantize_(random_model("llama")).requires_grad_(False)
    model = fuse(model) if fused else model
    before = logits(model)
    adapted(model)
    moved = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), before)
        with torch.enable_grad():  # as the reference model of a preference loss
            assert relative(model(input_ids=IDS).logits.detach(), before) < TOLERANCE[torch.float32]
    assert torch.equal(logits(model), moved)
    with pytest.raises(RuntimeError), disabled(model):
        raise RuntimeError
    assert torch.equal(logits(model), moved)


def test_a_copy_has_adapters_of_its_own():
    model = adapted(quantize_(random_model("llama")))
    before = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adapter_parameters(twin):
            parameter.mul_(2)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    assert not torch.equal(logits(detach(twin)), logits(model)) and torch.equal(logits(twin), logits(detach(model)))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapted_model_can_be_pickled(method):
    model = adapted(fuse(quantize_(random_model("llama"))), method)
    before = logits(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), before)
    twin.load_state_dict({name: tensor * 1 for name, tensor in model.state_dict().items()})
    assert torch.equal(logits(twin), before) and active_adapter(twin) == active_adapter(model)


def test_a_state_of_the_adapter_alone_lacks_nothing_and_any_other_does():
    model = adapted(quantize_(random_model("llama")))
    state = {name: value * 2 for name, value in model.state_dict().items() if "lora_" in name or "magnitude" in name}
    assert model.load_state_dict(state) == ([], [])
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters() if p.requires_grad)
    del state["model.layers.0.mlp.up_proj.lora_A"]
    assert "model.layers.0.mlp.up_proj.lora_A" in model.load_state_dict(state, strict=False).missing_keys
    assert len(detach(model).load_state_dict({}, strict=False).missing_keys) == len(model.state_dict())


def test_what_kernels_share_is_made_when_an_adapter_is_attached(monkeypatch):
    """Not at their first launch, which may be inside a CUDA graph."""
    prepared, model = [], random_model("llama")
    monkeypatch.setattr(backends, "prepare", prepared.append)
    adapted(model, "lora")
    assert prepared == [torch.device("cpu")]

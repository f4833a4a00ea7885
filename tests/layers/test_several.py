"""Several adapters on one base: loaded by name, switched, mixed in one batch, combined; the base keeps every byte."""

from __future__ import annotations

import copy
import hashlib
import pickle

import peft
import pytest
import torch
from helpers import relative
from tiny import adapted, disturb, random_model, tensors

import qlora
from qlora import AdapterSpec, UserError, activate, adapters_of, attach, combine, detach, load_adapter, mixed, quantize_
from qlora.layers.adapters import merged_weight
from qlora.layers.attach import active_adapter
from qlora.layers.fused import fuse
from qlora.layers.linear import frozen_weight

IDS = torch.arange(40).view(4, 10)
NAMES = ["dora", None, "lora", "few"]
SPECS = {
    "dora": AdapterSpec("dora", 3, 7.0),
    "lora": AdapterSpec("lora", 5, 2.0, rslora=True),
    "few": AdapterSpec("dora", 2, 6.0, targets=r".*\.(down_proj|q_proj|c_fc|fc1)"),
}


def base(family: str = "llama", quantized: bool = True) -> torch.nn.Module:
    model = random_model(family).requires_grad_(False)
    return fuse(quantize_(model)) if quantized else model


def several(model: torch.nn.Module, names=tuple(SPECS)) -> torch.nn.Module:
    """With adapters of different kinds, ranks and layers, all away from their start."""
    for seed, name in enumerate(names):
        disturb(attach(model, SPECS[name], name), seed)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits


def alone(model: torch.nn.Module, name: str | None, ids: torch.Tensor) -> torch.Tensor:
    """The logits of one adapter, or of the base."""
    if name is None:
        with qlora.disabled(model):
            return logits(model, ids)
    return logits(activate(model, name), ids)


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of every byte of a model whose adapters are not looked at, by the names that the base has."""
    digest, ours = hashlib.sha256(), {id(p) for p in qlora.adapter_parameters(model)}
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        if id(value) not in ours:
            digest.update(name.replace(".base.", ".").encode())
            digest.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi", "gpt2"])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_mixed_batch_is_what_each_row_gives_alone(family, quantized):
    model = several(base(family, quantized))
    expected = torch.cat([alone(model, name, IDS[i : i + 1]) for i, name in enumerate(NAMES)])
    bare = alone(model, None, IDS)
    for name in SPECS:  # whatever was active
        activate(model, name)
        with mixed(model, NAMES):
            together = logits(model)
            with torch.enable_grad():
                apart = model(input_ids=IDS).logits.detach()
        assert relative(together, expected) < 1e-5 and relative(apart, expected) < 1e-5
        assert adapters_of(model).active == name
    assert all(relative(together[i], bare[i]) > 1e-3 for i, name in enumerate(NAMES) if name)


def test_a_mixed_batch_generates_what_each_adapter_generates():
    """With a cache, so that a row is one token."""
    model = several(base())
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = [activate(model, name).generate(IDS[i : i + 1], **options)[0] for i, name in ((0, "dora"), (2, "lora"))]
    with mixed(model, NAMES):
        found = model.generate(IDS, **options)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[1])


def test_gradients_reach_each_adapter_of_a_mixed_batch():
    model, found, alone_ = several(base(), ("dora", "lora")), {}, {}
    names = ["dora", "lora", "dora", None]

    def gradients(name: str) -> list[torch.Tensor]:
        layers = adapters_of(model)[name].layers.values()
        parameters = [p for layer in layers for p in layer.parameters(recurse=False)]
        grads = [p.grad.clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return grads

    with mixed(model, names):
        model(input_ids=IDS).logits.square().sum().backward()
    found = {name: gradients(name) for name in ("dora", "lora")}
    for name in ("dora", "lora"):
        rows = [i for i, owner in enumerate(names) if owner == name]
        activate(model, name)(input_ids=IDS[rows]).logits.square().sum().backward()
        alone_[name] = gradients(name)
        assert all(relative(a, b) < 1e-4 for a, b in zip(found[name], alone_[name], strict=True))


def test_what_cannot_be_mixed_leaves_the_model_as_it_was():
    model = several(base())
    before = logits(model)
    for names, said in (
        (["dora", "no such"], "adapter=no such: the model has no adapter of this name, but dora, lora, few"),
        ([], "names=(none): names no row"),
    ):
        with pytest.raises(UserError) as error, mixed(model, names):
            pass
        assert str(error.value).startswith(said)
    with pytest.raises(UserError, match=r"the batch has 2 rows, and model.layers.0.self_attn.q_proj gets an input"):
        with mixed(model, ["dora", "lora"]):
            logits(model)
    assert torch.equal(logits(model), before) and adapters_of(model).active == "few"


def test_the_base_keeps_every_byte(tmp_path):
    """A hundred switches, mixed batches, sums, loads, disabled: one hash, and the tensors are the same objects."""
    model = base()
    bare, before = logits(model), fingerprint(model)
    places = {name: value.data_ptr() for name, value in model.named_buffers()}
    several(model)
    qlora.save_adapter(activate(model, "dora"), tmp_path / "dora")
    found = {name: alone(model, name, IDS) for name in SPECS}
    for turn in range(100):
        activate(model, list(SPECS)[turn % 3])
        if turn % 10 == 0:
            assert fingerprint(model) == before
            with mixed(model, NAMES):
                logits(model)
                assert fingerprint(model) == before
    combine(model, {"dora": 0.5, "lora": 0.5}, "sum")
    load_adapter(model, tmp_path / "dora", name="again")
    for name, expected in (found | {"again": found["dora"]}).items():
        assert torch.equal(alone(model, name, IDS), expected) and fingerprint(model) == before
    for name in list(adapters_of(model)):
        detach(model, name)
    assert torch.equal(logits(model), bare) and fingerprint(model) == before
    assert {name: value.data_ptr() for name, value in model.named_buffers()} == places


def test_adapters_are_loaded_by_name(tmp_path):
    folders, expected = {}, {}
    for seed, name in enumerate(SPECS):
        model = disturb(attach(base(), SPECS[name]), seed)
        folders[name], expected[name] = qlora.save_adapter(model, tmp_path / name), logits(model)
    model = base()
    for name, folder in folders.items():
        load_adapter(model, folder, name=name)
        assert adapters_of(model).active == name and torch.equal(logits(model), expected[name])
    assert list(adapters_of(model)) == list(SPECS) and len(list(qlora.named_adapters(model))) == 4
    for name in SPECS:
        assert torch.equal(alone(model, name, IDS), expected[name])
    with pytest.raises(UserError, match=r"name=lora: the model has an adapter of this name\. Detach it"):
        load_adapter(model, folders["dora"], name="lora")
    other = qlora.save_adapter(adapted(random_model("gpt2")), tmp_path / "other")
    with pytest.raises(UserError, match="the model has no adapted or linear layer"):
        load_adapter(model, other, name="other")
    assert list(adapters_of(model)) == list(SPECS) and torch.equal(logits(model), expected["few"])


# ---------------------------------------------------------------- sums


def dense_sum(model: torch.nn.Module, weights: dict[str, float], family: str) -> torch.nn.Module:
    """A dense float32 model with W + sum_i w_i (W'_i - W), the sums in float64."""
    adapters, dense = adapters_of(model), random_model(family)
    for module in {module for name in weights for module in adapters[name].layers}:
        total, W = 0.0, None
        for name, weight in weights.items():
            layer = adapters[name].layers.get(module)
            if layer is None:
                continue
            A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
            m = None if layer.magnitude is None else layer.magnitude.detach().double()
            W = frozen_weight(layer.base).dense(torch.float32).double()
            total = total + weight * (merged_weight(frozen_weight(layer.base), A, B, m, layer.scaling, A.dtype) - W)
        target = dense.get_submodule(module).weight
        found = (W + total).float()
        with torch.no_grad():
            target.copy_(found.t() if found.shape != target.shape or family == "gpt2" else found)
    for name, layer in model.named_modules():  # a layer that no adapter is on: what the quantized base holds
        module = name.removesuffix(".base")
        if hasattr(layer, "quantized") and module not in {m for n in weights for m in adapters[n].layers}:
            with torch.no_grad():
                W = frozen_weight(layer).dense(torch.float32)
                target = dense.get_submodule(module).weight
                target.copy_(W.t() if family == "gpt2" else W)
    return dense


SUMS = [
    {"lora": 0.7, "dora": 0.3},
    {"dora": 0.5, "few": 0.5},
    {"lora": -1.0},
    {"dora": 1.0},
    {"lora": 0.4, "few": 1.2, "dora": -0.3},
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("weights", SUMS, ids=lambda weights: "+".join(weights))
def test_a_sum_of_adapters_is_exact(family, weights):
    model = several(base(family))
    dense = dense_sum(model, weights, family)
    combine(model, weights, "sum")
    spec = active_adapter(model)
    assert spec.rank == sum(SPECS[name].rank for name in weights) and spec.scaling == 1
    assert spec.method == ("lora" if list(weights) == ["lora"] else "dora")
    found = logits(model)
    assert relative(found, logits(dense)) < 2e-5
    assert relative(found, alone(model, None, IDS)) > 1e-2


def test_a_sum_is_an_adapter_like_any_other(tmp_path):
    """It is saved, PEFT loads it, and it is mixed with those that it was made of."""
    model = several(base(quantized=False))
    combine(model, {"dora": 0.6, "few": 0.6}, "sum")
    expected = logits(model)
    qlora.save_adapter(model, tmp_path / "sum")
    theirs = peft.PeftModel.from_pretrained(base(quantized=False), tmp_path / "sum").eval()
    assert relative(logits(theirs), expected) < 1e-5
    with mixed(model, ["sum", "dora", "sum", None]):
        together = logits(model)
    assert relative(together[0], expected[0]) < 1e-5 and relative(together[1], alone(model, "dora", IDS)[1]) < 1e-5


def test_sums_that_are_refused():
    model = several(base())
    before = logits(model)
    with pytest.raises(UserError) as error:
        combine(model, {"dora": 0.5, "lora": float("nan"), "nobody": 1, "few": True}, "dora")
    assert [line.split(":")[0] for line in error.value.problems] == [
        "adapter=nobody",
        "weights=lora",
        "weights=few",
        "name=dora",
    ]
    with pytest.raises(UserError, match=r"weights=\(none\)"):
        combine(model, {}, "sum")
    layer = adapters_of(model)["dora"].layers["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.magnitude[3] *= 1e-9
    with pytest.raises(UserError, match=r"row 3 of model.layers.1.mlp.up_proj all but vanishes"):
        combine(model, {"dora": 1.0}, "sum")
    adapters_of(model)["lora"].start = {}
    with pytest.raises(UserError, match="adapter=lora: began by undoing the error of the 4-bit base"):
        combine(model, {"lora": 1.0}, "sum")
    assert torch.equal(logits(model), before) and list(adapters_of(model)) == list(SPECS)


# ---------------------------------------------------------------- set aside


@pytest.mark.parametrize("change", ["bfloat16", "half", "copy", "pickle"])
def test_adapters_that_are_set_aside_keep_every_bit(change):
    model = several(base())
    before = {name: tensors(activate(model, name)) for name in SPECS}
    if change in ("bfloat16", "half"):
        twin = getattr(copy.deepcopy(model), change)()
    else:
        twin = copy.deepcopy(model) if change == "copy" else pickle.loads(pickle.dumps(model))
    for name in SPECS:
        now = tensors(activate(twin, name))
        assert all(p.dtype == torch.float32 and torch.equal(p, before[name][key]) for key, p in now.items())
        if change in ("copy", "pickle"):
            assert torch.equal(logits(twin), alone(model, name, IDS))


def test_an_adapter_comes_back_in_the_mode_of_its_base():
    """Its dropout would stay off in training, or on in evaluation."""
    model = several(base(), ("dora", "lora"))
    model.train()
    assert all(layer.training for _, layer in qlora.named_adapters(activate(model, "dora")))
    model.eval()
    assert not any(layer.training for _, layer in qlora.named_adapters(activate(model, "lora")))

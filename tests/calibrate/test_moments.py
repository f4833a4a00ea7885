"""A text that goes through a model once, its forward passes waiting for each other: each layer is fed what is right."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

from qlora.calibrate import moments
from qlora.calibrate.moments import Moments, block_width, input_moments, moment_bytes
from qlora.layers.linear import linear_names
from qlora.plan.meta import out_in
from qlora_kernels import backends

BATCHES = [torch.arange(2, 34).view(2, 16), torch.arange(40, 60).view(1, 20), torch.arange(60, 78).view(3, 6)]


def widths(model):
    return {name: out_in(model.get_submodule(name))[1] for name in linear_names(model)}


def found_in(model, **settings) -> dict[str, torch.Tensor]:
    return {name: H.clone() for name, H in input_moments(model, widths(model), BATCHES, **settings)}


def fed(model) -> dict[str, torch.Tensor]:
    """The inputs of each layer, one plain forward pass after the other."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in widths(model)}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].clone()))
        for name in inputs
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in there]) for name, there in inputs.items() if there}


@pytest.mark.parametrize("layer", ["layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"])
def test_a_layer_that_was_changed_feeds_the_later_ones(layer):
    model, changed = tiny.llama().eval(), tiny.llama().eval()
    with torch.no_grad():
        changed.get_submodule(f"model.{layer}").weight.mul_(1.5)
    found = {}
    for name, H in input_moments(model, widths(model), BATCHES):
        found[name] = H.clone()
        if layer in name:
            with torch.no_grad():
                model.get_submodule(name).weight.mul_(1.5)
    wanted, plain = found_in(changed), found_in(tiny.llama().eval())
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(found["model.layers.0.self_attn.o_proj"], plain["model.layers.0.self_attn.o_proj"]) or (
        "down_proj" in layer
    )
    assert not torch.equal(found["model.layers.1.mlp.down_proj"], plain["model.layers.1.mlp.down_proj"])


def test_a_text_goes_through_each_layer_once():
    config = transformers.LlamaConfig(**tiny.SMALL | {"num_hidden_layers": 8}, intermediate_size=64)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = [0 for _ in model.model.layers]
    for i, layer in enumerate(model.model.layers):

        def count(_, x, i=i):
            tokens[i] += x[0].shape[0] * x[0].shape[1]

        layer.input_layernorm.register_forward_pre_hook(count)
    found_in(model)
    tried = 2 * (moments.PROBED + 6)  # whether passes disturb each other: two rows, alone and together
    assert max(tokens) == sum(batch.numel() for batch in BATCHES) + tried


@pytest.mark.parametrize("name", [*tiny.CONFIGS, *sorted(tiny.MORE)])
def test_each_architecture_is_fed_as_by_plain_forward_passes(name, monkeypatch):
    """None of them is disturbed by a pass that comes between."""
    monkeypatch.setattr(moments, "_by_whole_text", None)
    model = tiny.build(name).eval()
    inputs, found = fed(model), found_in(model)
    assert found.keys() == inputs.keys()
    for layer, x in inputs.items():
        assert torch.allclose(found[layer][0], x.t() @ x / len(x), rtol=1e-4, atol=1e-5), layer


def remembering():
    """A model whose second layer adds what the first one was called with."""
    model = tiny.llama().eval()
    first, second = model.model.layers
    own_first, own_second = first.forward, second.forward

    def remembered(hidden, *arguments, **named):
        second.carried = hidden.mean(1, keepdim=True)
        return own_first(hidden, *arguments, **named)

    first.forward = remembered
    second.forward = lambda hidden, *arguments, **named: own_second(hidden + second.carried, *arguments, **named)
    return model


@pytest.mark.parametrize("budget", [moments.BUDGET, 1])
def test_a_model_whose_modules_remember_a_pass_gets_the_text_whole(budget, monkeypatch):
    monkeypatch.setattr(moments, "BUDGET", budget)
    called = []
    whole = moments._by_whole_text
    monkeypatch.setattr(moments, "_by_whole_text", lambda *given: called.append(1) or whole(*given))
    model = remembering()
    inputs, found = fed(model), found_in(model)
    assert called and found.keys() == inputs.keys() == widths(model).keys()
    for layer, x in inputs.items():
        assert torch.allclose(found[layer][0], x.t() @ x / len(x), rtol=1e-4, atol=1e-6)


def test_layers_that_get_the_same_tensor_share_its_moments():
    model = tiny.llama().eval()
    shared: dict[int, list[str]] = {}
    kept = []
    for name, H in input_moments(model, widths(model), BATCHES):
        kept.append(H)  # so that no address comes twice
        shared.setdefault(H.data_ptr(), []).append(name.rsplit(".", 1)[1])
    assert list(shared.values()) == 2 * [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_nothing_is_left_of_a_text_that_is_given_up():
    """Where the caller stops, or a layer of the model fails."""
    model = tiny.llama().eval()
    for stopping in (True, False):
        with pytest.raises(ZeroDivisionError):
            for name, _ in input_moments(model, widths(model), BATCHES):
                if "layers.1.self_attn.o_proj" in name:
                    if stopping:
                        raise ZeroDivisionError
                    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        assert not any(model.get_submodule(name)._forward_pre_hooks for name in widths(model))


def test_what_is_wide_is_cut_into_blocks_on_the_diagonal():
    assert [block_width(n, 8192) for n in (576, 8192, 11008, 28672)] == [576, 8192, 5504, 7168]
    assert block_width(8193, 8192) == 8193 and block_width(28672, None) == 28672  # nothing fits; not asked for
    assert moment_bytes(28672) == 4 * 28672**2 and moment_bytes(28672, 8192) == 4 * 28672 * 7168
    model = tiny.llama().eval()
    whole, cut = {}, {}
    for found, widest in ((whole, None), (cut, 64)):
        found |= found_in(model, widest=widest)
    name = "model.layers.0.mlp.down_proj"  # 192 inputs
    assert cut[name].shape == (3, 64, 64) and whole[name].shape == (1, 192, 192)
    for b in range(3):
        part = slice(64 * b, 64 * b + 64)
        assert torch.allclose(cut[name][b], whole[name][0][part, part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
def test_moments_are_those_of_every_position(dtype, rounded):
    model = tiny.llama().eval().to(dtype)
    name = "model.layers.1.mlp.down_proj"
    x, found = fed(model)[name].float(), found_in(model, rounded=rounded)
    rounding = 2**-8 if rounded and dtype == torch.bfloat16 and backends.multiplies_bf16() else 1e-5
    assert found[name].dtype == torch.float32
    size = x.square().mean(0).sqrt()  # an element's rounding is that of the products it sums
    assert bool(((found[name][0] - x.t() @ x / len(x)).abs() <= rounding * torch.outer(size, size) + 1e-9).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 600, 2304])  # one strip, three, eight
def test_half_of_the_products_are_all_of_them(width, dtype):
    rows = torch.randn(700, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    summed = Moments(torch.zeros(1, width, width))
    for part in rows.split(300):
        summed.add(part, rounded=True)
    H = summed.mean()[0]
    wanted, size = rows.double().t() @ rows.double() / len(rows), rows.double().square().mean(0).sqrt()
    rounding = 2**-8 if dtype == torch.bfloat16 and backends.multiplies_bf16() else 1e-6
    assert bool(((H - wanted).abs() <= rounding * torch.outer(size, size)).all())
    assert torch.equal(H, H.t())

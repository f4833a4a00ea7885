"""A text that goes from layer to layer: each is fed what is right, little is run, and unfit models are known."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

from qlora.calibrate.moments import Moments, block_width, held_bytes, input_moments
from qlora.calibrate.stages import Stages, decoder_layers
from qlora.layers.linear import linear_names

BATCHES = [torch.arange(2, 34).view(2, 16), torch.arange(40, 60).view(1, 20)]


def widths(model):
    return {name: model.get_submodule(name).in_features for name in linear_names(model)}


def counted(model) -> list[int]:
    """How often each decoder layer is run from now on."""
    calls = [0 for _ in model.model.layers]
    for i, layer in enumerate(model.model.layers):

        def count(*_, i=i):
            calls[i] += 1

        layer.input_layernorm.register_forward_pre_hook(count)
    return calls


def test_a_layer_that_was_changed_feeds_the_later_ones():
    model, changed = tiny.llama().eval(), tiny.llama().eval()
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    found = {}
    for moments in input_moments(model, widths(model), BATCHES):
        found |= dict.fromkeys(moments.layers, moments.mean)
        if any("layers.0.mlp.down_proj" in name for name in moments.layers):
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    wanted = {}
    for moments in input_moments(changed, widths(changed), BATCHES):
        wanted |= dict.fromkeys(moments.layers, moments.mean)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_text_goes_through_each_layer_twice_however_many_there_are():
    config = transformers.LlamaConfig(**tiny.SMALL | {"num_hidden_layers": 8}, intermediate_size=64)
    model = transformers.LlamaForCausalLM(config).eval()
    calls = counted(model)
    for _ in input_moments(model, widths(model), BATCHES):
        pass
    tried = 2  # whether the model can be run so
    assert max(calls) <= 2 * len(BATCHES) + tried


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi", "bloom", "opt", "lfm2", "mixtral"])
def test_models_that_can_be_run_layer_by_layer(name):
    model = tiny.build(name).eval()
    found = decoder_layers(model, linear_names(model))
    assert found is not None and Stages(model, found[1], BATCHES).works()


def test_a_model_whose_layers_know_of_each_other_is_run_whole():
    """The second layer adds what the first one was called with."""
    model = tiny.llama().eval()
    first, second = model.model.layers
    forward = first.forward

    def remembered(hidden, *arguments, **named):
        second.carried = hidden
        return forward(hidden, *arguments, **named)

    first.forward = remembered
    own = second.forward
    second.forward = lambda hidden, *arguments, **named: own(hidden + vars(second).pop("carried"), *arguments, **named)
    stages = Stages(model, model.model.layers, BATCHES)
    with torch.no_grad():
        assert not stages.works()
    fed = []
    hook = second.mlp.down_proj.register_forward_pre_hook(lambda _, x: fed.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch)
    hook.remove()
    found = {}
    for moments in input_moments(model, widths(model), BATCHES):
        found |= dict.fromkeys(moments.layers, moments.mean)
    x = torch.cat(fed)
    assert torch.allclose(found["model.layers.1.mlp.down_proj"], x.t() @ x / len(x), rtol=1e-4, atol=1e-6)
    assert first.forward is remembered and found.keys() == widths(model).keys()


def test_what_is_wide_is_cut_into_blocks_on_the_diagonal():
    assert [block_width(n, 8192) for n in (576, 8192, 11008, 28672)] == [576, 8192, 5504, 7168]
    assert block_width(8193, 8192) == 8193 and block_width(28672, None) == 28672  # nothing fits; not asked for
    model = tiny.llama().eval()
    whole, cut = {}, {}
    for found, widest in ((whole, None), (cut, 64)):
        for moments in input_moments(model, widths(model), BATCHES, widest=widest):
            found |= dict.fromkeys(moments.layers, moments.blocks)
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
    fed = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: fed.append(x[0]))
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch)
    hook.remove()
    found = {}
    for moments in input_moments(model, widths(model), BATCHES, rounded=rounded):
        found |= dict.fromkeys(moments.layers, moments.mean)
    x = torch.cat([values.flatten(0, 1).float() for values in fed])
    rounding = 2**-8 if rounded and dtype == torch.bfloat16 else 1e-5
    assert found[name].dtype == torch.float32
    size = x.square().mean(0).sqrt()  # an element's rounding is that of the products it sums
    assert bool(((found[name] - x.t() @ x / len(x)).abs() <= rounding * torch.outer(size, size) + 1e-9).all())


def test_moments_held_are_those_of_one_decoder_layer_within_the_budget():
    model = tiny.llama()
    layer = sum(4 * model.get_submodule(name).in_features ** 2 for name in widths(model) if ".layers.0." in name)
    largest = 4 * max(widths(model).values()) ** 2
    assert largest < layer == held_bytes(model, widths(model))
    assert held_bytes(model, widths(model), budget=layer - 1) == layer - 1
    assert held_bytes(model, widths(model), budget=1) == largest and held_bytes(model, {}) == 0
    assert held_bytes(tiny.llama().model.norm, widths(model)) == 2 * layer  # no list of decoder layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 600, 2304])  # one strip, three, eight
def test_half_of_the_products_are_all_of_them(width, dtype):
    rows = torch.randn(700, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    moments = Moments(["a"], torch.zeros(1, width, width))
    for part in rows.split(300):
        moments.add(part)
    wanted, size = rows.double().t() @ rows.double() / len(rows), rows.double().square().mean(0).sqrt()
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    assert bool(((moments.mean - wanted).abs() <= rounding * torch.outer(size, size)).all())
    assert torch.equal(moments.mean, moments.mean.t())
    moments.add(rows[:1])  # goes on after it was read
    assert torch.equal(moments.mean, moments.mean.t()) and moments.count == 701

"""Layers of one input as one product: the outputs and gradients of each by itself, and when they are not joined."""

from __future__ import annotations

import pytest
import torch
from helpers import relative
from tiny import adapted, random_model
from torch.utils.checkpoint import checkpoint

from qlora.data.batch import Example, pack
from qlora.layers.fused import fuse
from qlora.layers.joined import joinable
from qlora.layers.linear import quantize_
from qlora.layers.loss import loss_sum
from qlora_kernels import backends

BATCH = pack([Example(tuple(range(3, 3 + n)), (False,) + (True,) * (n - 1)) for n in (9, 4)])


def trained(name: str, method: str, join: bool, again: bool = False):
    """The loss of a quantized model with an adapter, and the gradients of its parameters by name."""
    torch.manual_seed(0)
    model = fuse(adapted(quantize_(random_model(name).requires_grad_(False)), method), join=join).train()
    before = backends.ROUTES.copy()
    loss = checkpoint(loss_sum, model, BATCH, use_reentrant=False) if again else loss_sum(model, BATCH)
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients, backends.routes(since=before)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])  # shared keys; with biases; with norms of q and k
def test_joined_layers_compute_what_each_does(name, method):
    expected, gradients, _ = trained(name, method, join=False)
    found, joined, ran = trained(name, method, join=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert joined.keys() == gradients.keys() and "joined_gradients" in ran
    for key, gradient in gradients.items():
        assert joined[key].is_contiguous() and relative(joined[key], gradient) < 1e-5, key
    assert torch.equal(trained(name, method, join=True, again=True)[0], found)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without and with biases
def test_layers_one_by_one_in_one_function(name, method):
    """Outputs and gradients to the bit, but for dx, whose parts are summed in another order; a layer that nobody asks
    for has none.
    """
    torch.manual_seed(0)
    attention = (
        fuse(adapted(quantize_(random_model(name).requires_grad_(False)), method)).train().model.layers[0].self_attn
    )
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    x = torch.randn(2, 7, 64, requires_grad=True)
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    assert joinable(layers)
    found, expected = attention.projected(x), [layer(x) for layer in layers]
    node = found[0].grad_fn
    while "_OneByOne" not in node.name():  # below a view, and a bias
        node = node.next_functions[0][0]
    assert all(map(torch.equal, found, expected))
    dys = [torch.randn_like(y) for y in expected]
    dx, *gradients = torch.autograd.grad(found, [x, *parameters], dys)
    other, *others = torch.autograd.grad(expected, [x, *parameters], dys)
    assert all(map(torch.equal, gradients, others)) and relative(dx, other) < 1e-6
    of_k = torch.autograd.grad(attention.projected(x)[1], [x, *parameters], dys[1], allow_unused=True)
    one = torch.autograd.grad(layers[1](x), [x, *parameters], dys[1], allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(of_k, one, strict=True))


def test_a_model_joins_two_times_a_layer():
    """q, k, v and gate, up; the others are products of their own."""
    *_, ran = trained("llama", "dora", join=True)
    calls = {name: sum(counts.values()) for name, counts in ran.items()}
    assert calls["adapted_operands"] == calls["joined_gradients"] == calls["swiglu_joined"] * 2 == 4
    assert calls["dequantize_4bit_joined"] == 3  # backward; the first q, k and v make no dx
    assert "swiglu_backward_dots" not in calls


def test_gradients_are_right_in_float64():
    """Against autograd through the layer's own equation."""
    torch.manual_seed(0)
    model = adapted(quantize_(random_model("llama").requires_grad_(False)), "dora")
    attention = fuse(model, join=True).model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    x = torch.randn(2, 7, 64, requires_grad=True)
    weights = [torch.randn(2, 7, layer.base.out_features) for layer in layers]
    parameters = [x, *(p for layer in layers for p in layer.parameters(recurse=False))]
    assert joinable(layers)
    outputs = attention.projected(x)
    found = torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), parameters)
    total = torch.zeros((), dtype=torch.float64)
    wide = [p.detach().double().requires_grad_() for p in parameters]
    for i, (layer, w) in enumerate(zip(layers, weights, strict=True)):
        A, B, m = wide[1 + 3 * i : 4 + 3 * i]
        W = layer.base.frozen.dense(torch.float32).double()
        n = (W + layer.scaling * B @ A).norm(dim=1).detach()
        total = total + ((m / n * (wide[0] @ (W + layer.scaling * B @ A).t())) * w).sum()
    for got, exact in zip(found, torch.autograd.grad(total, wide), strict=True):
        assert relative(got.double(), exact) < 1e-5


@pytest.mark.parametrize(
    "change", ["eval", "dropout", "a hook", "disabled", "frozen", "a base", "a copy", "another rank"]
)
def test_what_is_not_joined(change):
    """Then each layer runs by itself, with the result of one that was never joined."""
    model = fuse(adapted(quantize_(random_model("llama").requires_grad_(False)), "dora"), join=True).train()
    attention = model.model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    x = torch.randn(2, 7, 64)
    assert joinable(layers)
    if change == "dropout":
        layers[1].dropout_p = 0.1
    if change == "a hook":
        layers[1].register_forward_hook(lambda module, inputs, y: y + 1)
    if change == "disabled":
        layers[1].enabled = False
    if change == "frozen":
        layers[1].magnitude.requires_grad_(False)
    if change == "a base":
        attention.k_proj = layers[1].base
    if change == "a copy":
        layers[1].copies_output = True
    if change == "another rank":
        layers[1].lora_A = torch.nn.Parameter(torch.randn(2, 64))
        layers[1].lora_B = torch.nn.Parameter(torch.randn(len(layers[1].lora_B), 2))
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    with torch.set_grad_enabled(change != "eval"):
        assert not joinable(layers)
        torch.manual_seed(1)
        found = attention.projected(x)
        torch.manual_seed(1)
        assert all(torch.equal(y, layer(x)) for y, layer in zip(found, layers, strict=True))

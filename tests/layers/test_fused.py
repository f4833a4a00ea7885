"""Fused modules compute what transformers' own do: which are replaced, their results and every gradient."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from helpers import relative
from tiny import adapted, build, random_model
from torch.utils.checkpoint import checkpoint

from qlora.layers import fused as fused_layers
from qlora.layers.fused import GatedMLP, ResidualLayer, RMSNorm, RotaryAttention, fuse
from qlora_kernels import backends

# (norms, gated products, attentions, decoder layers) that are replaced: Gemma's norm, Cohere's rotation and the single
# product that makes q, k and v in Phi are other functions, Phi's layers drop out, Cohere's sum once
FUSED = {
    "llama": (5, 2, 2, 2),
    "qwen2": (5, 2, 2, 2),
    "qwen3": (9, 2, 2, 2),
    "mistral": (5, 2, 2, 2),
    "phi3": (5, 0, 0, 0),
    "gemma": (0, 2, 2, 2),
    "cohere": (0, 2, 0, 0),
    "gpt2": (0, 0, 0, 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused(name):
    model = build(name)
    fuse(model)
    kinds = [type(module) for module in model.modules()]
    rotating, summing = (
        sum(isinstance(module, kind) for module in model.modules()) for kind in (RotaryAttention, ResidualLayer)
    )
    assert (kinds.count(RMSNorm), kinds.count(GatedMLP), rotating, summing) == FUSED[name]
    assert set(model.state_dict()) == set(build(name).state_dict())
    count = len(kinds)
    assert len(list(fuse(model).modules())) == count  # once is enough


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_modules_round_as_transformers_does(dtype):
    torch.manual_seed(0)
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(576, eps=1e-5).to(dtype)
    norm.weight.data.uniform_(0.5, 2)
    norm.requires_grad_(False)
    mlp = random_model("llama").model.layers[0].mlp.to(dtype).requires_grad_(False)
    for module, width in ((norm, 576), (mlp, 64)):
        x = (3 * torch.randn(4, 7, width)).to(dtype).requires_grad_()
        dy = torch.randn(4, 7, width).to(dtype)
        fused = fuse(torch.nn.Sequential(module))
        assert type(fused[0]) in (RMSNorm, GatedMLP)
        expected, found = module(x), fused(x)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=2 * eps, atol=4 * eps)
        # The gradient is rounded once here, several times there: compare with the one in float64.
        exact = (
            torch.autograd.grad(module.double()(x.double()), x, dy.double())[0]
            if module is norm
            else torch.autograd.grad(expected, x, dy)[0]
        )
        assert relative(torch.autograd.grad(found, x, dy)[0], exact) < 8 * eps
        module.to(dtype)


@pytest.mark.parametrize("change", ["nothing", "a hook", "a frozen magnitude", "a bias", "checkpointing"])
def test_magnitude_gradients_of_a_gated_product(monkeypatch, change):
    """Summed beside the gradient of the product where both layers' outputs are their products, by each layer itself
    where not: the same either way.
    """
    model = adapted(random_model("llama"), "dora")
    mlp = model.model.layers[0].mlp
    if change == "a bias":
        mlp.up_proj.base.bias = torch.nn.Parameter(torch.randn(mlp.up_proj.base.out_features), requires_grad=False)
    if change == "a frozen magnitude":
        mlp.gate_proj.magnitude.requires_grad_(False)
    if change == "a hook":
        mlp.gate_proj.register_forward_hook(lambda module, inputs, y: y + 1)
    x, dy = torch.randn(2, 7, 64, requires_grad=True), torch.randn(2, 7, 64)
    parameters = [p for p in (x, *mlp.parameters()) if p.requires_grad]
    expected = torch.autograd.grad(mlp(x), parameters, dy)
    fused = fuse(torch.nn.Sequential(mlp))
    assert type(fused[0]) is GatedMLP
    joined, gated_layers = [], fused_layers.gated_layers
    monkeypatch.setattr(fused_layers, "gated_layers", lambda *given: joined.append(1) or gated_layers(*given))
    y = checkpoint(fused, x, use_reentrant=False) if change == "checkpointing" else fused(x)
    found = torch.autograd.grad(y, parameters, dy)
    assert bool(joined) == (change in ("nothing", "checkpointing"))
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("pair", ["lora", "dora", "lora and dora"])
def test_gate_and_up_are_one_function_where_they_are_alike(monkeypatch, pair):
    """To the bit what two layers and a product make, but for dx, whose two parts are summed in another place, and
    magnitudes, whose gradients are made beside the product's.
    """
    model = fuse(adapted(random_model("llama"), "lora" if pair == "lora" else "dora").train())
    mlp = model.model.layers[0].mlp
    if pair == "lora and dora":
        mlp.gate_proj.magnitude = None
    x, dy = torch.randn(2, 7, 64, requires_grad=True), torch.randn(2, 7, 64)
    named = {name: p for name, p in mlp.named_parameters() if p.requires_grad}
    parameters, exact = [x, *named.values()], ["", "", *named]
    together, gated_layers = [], fused_layers.gated_layers
    monkeypatch.setattr(fused_layers, "gated_layers", lambda *given: together.append(1) or gated_layers(*given))
    found = [mlp(x), *torch.autograd.grad(mlp(x), parameters, dy)]
    assert bool(together) == (pair != "lora and dora")
    monkeypatch.setattr(fused_layers, "_gateable", lambda layer: False)
    expected = [mlp(x), *torch.autograd.grad(mlp(x), parameters, dy)]
    assert torch.equal(found[0], expected[0])
    for name, one, other in zip(exact, found, expected, strict=True):
        assert relative(one, other) < 1e-5
        assert torch.equal(one, other) or not name or "magnitude" in name, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_gated_product_is_not_kept(method, name, dropout):
    """Of its size only gate(x) and up(x) are (and what dropout makes); to the bit the gradients are those with it."""
    model = fuse(adapted(random_model(name), method, dropout=dropout).train())
    mlp = model.model.layers[0].mlp
    x, dy = torch.randn(2, 7, 64, requires_grad=True), torch.randn(2, 7, 64)
    parameters = [x, *(p for p in mlp.parameters() if p.requires_grad)]

    def kept_and_found() -> tuple[int, list[torch.Tensor]]:
        places = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (places.update({t.data_ptr(): t.numel()}), t)[1], lambda t: t
        ):
            torch.manual_seed(3)
            y = mlp(x)
        size = 14 * mlp.down_proj.base.in_features
        return list(places.values()).count(size), [y, *torch.autograd.grad(y, parameters, dy)]

    kept, found = kept_and_found()
    mlp.down_proj.register_forward_pre_hook(lambda module, inputs: None)  # it might change what it gets
    more, expected = kept_and_found()
    assert (kept, more) == ((4, 4) if dropout else (2, 3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rotation_is_that_of_transformers():
    """Nearer to float64 in bf16, as it rounds once less."""
    layer = fuse(build("llama")).model.layers[0].self_attn
    theirs = layer.home().apply_rotary_pos_emb
    angles = 3 * torch.randn(2, 70, 16)
    tensors = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 70, 16), angles.cos(), angles.sin()
    for got, expected in zip(turned(layer.rotated, *tensors), turned(theirs, *tensors), strict=True):
        torch.testing.assert_close(got, expected)
    low = [x.bfloat16() for x in tensors]
    results = (turned(*case) for case in ((layer.rotated, *low), (theirs, *low), (theirs, *(x.double() for x in low))))
    for got, other, exact in zip(*results, strict=True):
        assert got.dtype == torch.bfloat16 and (got - exact).norm() <= (other - exact).norm()


def turned(rotate, q, k, cos, sin) -> list[torch.Tensor]:
    """Both turned, and the gradients of the sum of their squares."""
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    results = rotate(q, k, cos, sin)
    return [*results, *torch.autograd.grad(sum(x.square().sum() for x in results), (q, k))]


def test_what_is_fused_is_of_its_class_and_can_be_copied():
    """In this model alone: the class of transformers stays as it was."""
    model = fuse(build("llama")).eval()
    layer, other = model.model.layers[0], build("llama").model.layers[0]
    for ours, theirs in ((layer, other), (layer.self_attn, other.self_attn)):
        assert isinstance(ours, type(theirs)) and type(ours) is not type(theirs) and "forward" not in vars(ours)
    ids = torch.arange(20)[None]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = copied.model.layers[0]
        assert type(found) is type(layer) and type(found.self_attn) is type(layer.self_attn)
        assert found.self_attn.q_proj is not layer.self_attn.q_proj
        assert torch.equal(copied(ids).logits, model(ids).logits)


@pytest.mark.parametrize("change", ["nothing", "a hook", "a norm that learns", "checkpointing", "another type"])
def test_a_layer_sums_and_normalizes_in_one_pass(change):
    """The hidden states and every gradient of transformers' own layer; where somebody looks at a norm or trains it, by
    itself.
    """
    model = random_model("llama").requires_grad_(False)
    layer, plain = model.model.layers[0], copy.deepcopy(model.model.layers[0])
    norm = fuse(model).model.layers[0].post_attention_layernorm
    x, dy = torch.randn(2, 7, 64, requires_grad=True), torch.randn(2, 7, 64)
    positions = model.model.rotary_emb(x, torch.arange(7)[None])
    seen = []
    if change == "a hook":
        norm.register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    if change == "a norm that learns":
        norm.weight.requires_grad_(True)
    if change == "another type":
        for one in (norm, plain.post_attention_layernorm):
            one.weight.data = one.weight.data.bfloat16()

    def run(layer):
        if change == "checkpointing":
            return checkpoint(layer, x, position_embeddings=positions, use_reentrant=False)
        return layer(x, position_embeddings=positions)

    before = backends.ROUTES.copy()
    y = run(layer)
    sums = sum(backends.routes(since=before).get("add_rms_norm", {}).values())
    assert sums == (change in ("nothing", "checkpointing")) and len(seen) == (change == "a hook")
    theirs, expected = plain.post_attention_layernorm.weight, run(plain)
    theirs.requires_grad_(norm.weight.requires_grad)
    found = torch.autograd.grad(y, [p for p in (x, norm.weight) if p.requires_grad], dy.to(y.dtype))
    exact = torch.autograd.grad(run(plain), [p for p in (x, theirs) if p.requires_grad], dy)
    torch.testing.assert_close(y.float(), expected, rtol=1e-5, atol=1e-5)
    assert len(found) == 1 + (change == "a norm that learns")
    assert all(relative(one, other) < 1e-5 for one, other in zip(found, exact, strict=True))


def test_a_norm_that_learns_keeps_its_gradient():
    norm = fuse(torch.nn.Sequential(transformers.models.llama.modeling_llama.LlamaRMSNorm(8)))
    assert type(norm[0]) is RMSNorm and norm[0].weight.requires_grad
    norm(torch.randn(3, 8)).square().sum().backward()
    assert norm[0].weight.grad.abs().sum() > 0

"""Gemma's gated MLP in one kernel: which activations are known, and the models' logits and gradients against
transformers' own.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import TOLERANCE, relative
from tiny import adapted, random_model
from transformers.activations import ACT2FN

from qlora.layers.attach import adapter_parameters
from qlora.layers.fused import GatedMLP, RMSNorm, fuse
from qlora.layers.transformers_code import activation_of
from qlora_kernels import backends

GEMMAS = ["gemma", "gemma2", "gemma3"]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("silu", "silu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", None),  # a chain of operations, each of which rounds
        ("gelu_new", None),  # likewise
        ("gelu", None),  # x Phi(x)
        ("relu", None),
    ],
)
def test_which_activations_are_known(name, known):
    assert activation_of(ACT2FN[name]) == known


def test_activations_of_torch():
    assert activation_of(torch.nn.SiLU()) == "silu"
    assert activation_of(torch.nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_of(torch.nn.GELU()) is None


def logits_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Of random tokens, for a random gradient of the logits."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 320, (2, 19), generator=generator)
    logits = model(input_ids=tokens, use_cache=False).logits
    dy = torch.randn(logits.shape, generator=generator).to(logits.dtype)
    return logits.detach(), torch.autograd.grad(logits, adapter_parameters(model), dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", GEMMAS)
def test_logits_and_gradients_are_those_of_transformers(name, method, dtype):
    model = adapted(random_model(name).to(dtype), method)
    expected, gradients = logits_and_gradients(model)
    fuse(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(GatedMLP) == 2 and RMSNorm not in kinds
    before = backends.ROUTES.copy()
    found, ours = logits_and_gradients(model)
    counted = backends.ROUTES - before
    assert (counted[("geglu", "native")], counted[("geglu_backward", "native")]) == (
        4,
        2,
    )  # and again in the backward pass
    assert relative(found, expected) < TOLERANCE[dtype]
    for got, want in zip(ours, gradients, strict=True):
        assert relative(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("change", ["nothing", "a hook", "a frozen magnitude"])
def test_magnitude_gradients(change):
    """In the function that owns gate and up where that is possible, by each layer itself where not: the same either
    way.
    """
    mlp = adapted(random_model("gemma"), "dora").model.layers[0].mlp
    if change == "a frozen magnitude":
        mlp.gate_proj.magnitude.requires_grad_(False)
    if change == "a hook":
        mlp.gate_proj.register_forward_hook(lambda module, inputs, y: y + 1)
    x, dy = torch.randn(2, 7, 64, requires_grad=True), torch.randn(2, 7, 64)
    parameters = [p for p in (x, *mlp.parameters()) if p.requires_grad]
    expected = torch.autograd.grad(mlp(x), parameters, dy)
    fused = fuse(torch.nn.Sequential(mlp))
    assert type(fused[0]) is GatedMLP and fused[0].activation == "gelu_tanh"
    owned = "GatedLayers" in functions_of(fused(x))
    assert owned == (change == "nothing")
    found = torch.autograd.grad(fused(x), parameters, dy)
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def functions_of(y: torch.Tensor) -> str:
    """The names of the autograd functions behind `y`."""
    names, todo = [], [y.grad_fn]
    while todo:
        function = todo.pop()
        names.append(function.name())
        todo += [before for before, _ in function.next_functions if before is not None]
    return " ".join(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_round_as_those_of_transformers(dtype):
    """And so do gradients, with respect to the input."""
    mlp = random_model("gemma").model.layers[0].mlp.to(dtype).requires_grad_(False)
    x, dy = (3 * torch.randn(4, 7, 64)).to(dtype).requires_grad_(), torch.randn(4, 7, 64).to(dtype)
    fused, eps = fuse(torch.nn.Sequential(copy.deepcopy(mlp))), torch.finfo(dtype).eps
    expected, found = mlp(x), fused(x)
    torch.testing.assert_close(found, expected, rtol=2 * eps, atol=4 * eps)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, dy) for y in (found, expected))
    assert relative(ours, theirs) < 8 * eps


def test_a_model_of_another_device_type_is_shaped():
    """On meta tensors, as the plan of memory runs it."""
    with torch.device("meta"):
        fused = fuse(torch.nn.Sequential(random_model("gemma").model.layers[0].mlp))
    x = torch.empty(3, 64, device="meta", requires_grad=True)
    y = fused.to("meta")(x)
    assert y.shape == (3, 64) and torch.autograd.grad(y.sum(), x)[0].shape == (3, 64)

"""A decoder layer as one Function: what its modules make, to the bit, and keep; and where it is not one."""

from __future__ import annotations

import pytest
import torch
from helpers import ISAS, relative
from tiny import CONFIGS, MORE, adapted, random_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora.data.batch import Example, pack
from qlora.layers import fused
from qlora.layers.adapters import AdaptedLinear, row_norms
from qlora.layers.attention import borders
from qlora.layers.decoder import DecoderLayer
from qlora.layers.fused import ResidualLayer, fuse
from qlora.layers.linear import quantize_
from qlora.layers.loss import loss_sum
from qlora_kernels import backends

BATCH = pack([Example(tuple(range(3, 3 + n)), (False,) + (True,) * (n - 1)) for n in (9, 4)])
native = pytest.mark.skipif(backends.NATIVE is None, reason="QLORA_BACKEND switches the native kernels off")


def wide(name: str, **options):
    """A tiny model of CONFIGS of which all weights are whole tiles."""
    config = CONFIGS[name]()
    return lambda: type(config)(**config.to_diff_dict() | {"intermediate_size": 192} | options)


@pytest.fixture(autouse=True)
def models(monkeypatch):
    for name in ("mistral", "qwen2", "qwen3"):  # keys that heads share; biases; norms of heads
        monkeypatch.setitem(CONFIGS, name, wide(name))


def model_of(name: str = "llama", method: str = "dora", dtype: torch.dtype = torch.float32, **options):
    """A quantized model in training, with adapters that have learned."""
    base = quantize_(random_model(name).to(dtype).requires_grad_(False))
    return fuse(adapted(base, method, **options)).train()


def counted(monkeypatch) -> list[int]:
    """Grows with every layer that is one Function."""
    calls: list[int] = []
    apply = DecoderLayer.apply
    monkeypatch.setattr(DecoderLayer, "apply", lambda *given: calls.append(1) or apply(*given))
    return calls


def step(model, again: bool = False) -> tuple[list, int]:
    """Loss and every gradient, and the bytes that the forward pass kept."""
    model.zero_grad()
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = checkpoint(loss_sum, model, BATCH, use_reentrant=False) if again else loss_sum(model, BATCH)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)], sum(kept.values())


@pytest.fixture(params=["", *ISAS], ids=["best", *ISAS])
def isa(request):
    """The library by the best that the processor has, and by each instruction set."""
    if backends.NATIVE is None:
        pytest.skip("QLORA_BACKEND switches the native kernels off")
    backends.NATIVE.select(request.param)
    yield request.param
    backends.NATIVE.select()


@pytest.fixture(params=["highest", "high"])
def precision(request):
    """By float32, and by integers where there are any."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


def layers_in_one(dtype: torch.dtype) -> int:
    """How many of the model's two layers one call makes here."""
    by = backends.NATIVE
    on_amx = by.bf16_unit == "AMX" and dtype == torch.bfloat16
    return 2 if by.layers and by.attends_in_float32 and not on_amx else 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_the_modules_make(monkeypatch, isa, precision, name, method, dtype):
    """Loss and every gradient to the bit, also where they are made again, and no more is kept."""
    model, calls = model_of(name, method, dtype, rank=5), counted(monkeypatch)
    found, kept = step(model)
    assert len(calls) == layers_in_one(dtype)
    assert all(map(torch.equal, step(model, again=True)[0], found))
    assert len(calls) == 3 * layers_in_one(dtype)
    monkeypatch.setattr(ResidualLayer, "as_a_whole", lambda *given: None)
    expected, others = step(model)
    assert len(calls) == 3 * layers_in_one(dtype) and len(found) == len(expected) and kept <= 1.02 * others
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and one.abs().max() > 0


@native
def test_any_number_of_threads_makes_the_same(threads):
    threads(1)
    model = model_of()
    expected, _ = step(model)
    for count in (2, 3):
        threads(count)
        assert all(map(torch.equal, step(model)[0], expected))


@native
def test_n_is_kept_for_the_next_pass(monkeypatch):
    """Until a factor changes; a layer by its modules finds it too."""
    model = model_of()
    step(model)
    layers = [one for one in model.modules() if isinstance(one, AdaptedLinear)]
    kept = [one.row_norms.get(one.version()) for one in layers]
    for one, n in zip(layers, kept, strict=True):
        assert n is not None and torch.equal(n, row_norms(one.base.frozen, one.lora_A, one.lora_B, one.scaling))
    step(model)
    assert all(one.row_norms.get(one.version()) is n for one, n in zip(layers, kept, strict=True))
    with torch.no_grad():
        layers[0].lora_B.mul_(2)
    before = kept[0].clone()
    step(model)
    assert not torch.equal(layers[0].current_row_norms(), before) and torch.equal(kept[0], before)


@native
def test_gradient_of_what_comes_in(monkeypatch):
    """Also where the layer below learns: dx of a layer by itself."""
    model, calls = model_of(), counted(monkeypatch)
    x, dy = torch.randn(1, 13, 64, requires_grad=True), torch.randn(1, 13, 64)
    options = {
        "position_embeddings": model.model.rotary_emb(x, BATCH.position_ids),
        **borders(BATCH.cu_seqlens, x.device),
    }
    model.set_attn_implementation("qlora")
    layer = model.model.layers[1]
    y = layer(x, **options)
    (found,) = torch.autograd.grad(y, x, dy)
    assert len(calls) == 1
    monkeypatch.setattr(ResidualLayer, "as_a_whole", lambda *given: None)
    expected = layer(x, **options)
    assert torch.equal(y, expected) and relative(found, torch.autograd.grad(expected, x, dy)[0]) == 0


def hook(module) -> None:
    module.register_forward_hook(lambda *given: None)


CHANGES = {
    "a hook on an attention": lambda layer: hook(layer.self_attn),
    "a hook on a norm": lambda layer: hook(layer.post_attention_layernorm),
    "a hook on a projection": lambda layer: hook(layer.mlp.down_proj),
    "a hook on its gradient": lambda layer: layer.mlp.register_full_backward_hook(lambda *given: None),
    "another forward": lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward),
    "a norm that learns": lambda layer: layer.input_layernorm.weight.requires_grad_(True),
    "a bias elsewhere": lambda layer: setattr(layer.mlp.down_proj.base, "bias", nn.Parameter(torch.randn(64), False)),
    "a frozen factor": lambda layer: layer.self_attn.o_proj.lora_A.requires_grad_(False),
    "no magnitude of one": lambda layer: setattr(layer.mlp.gate_proj, "magnitude", None),
    "an adapter switched off": lambda layer: setattr(layer.self_attn.q_proj, "enabled", False),
    "dropout of a projection": lambda layer: setattr(layer.self_attn.v_proj, "dropout_p", 0.5),
    "dropout of the attention": lambda layer: setattr(layer.self_attn, "attention_dropout", 0.5),
    "a layer without an adapter": lambda layer: setattr(layer.mlp, "up_proj", layer.mlp.up_proj.base),
}


@native
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_with_something_else_is_its_modules(monkeypatch, change):
    """That layer alone; where nothing is random, with the gradients of the modules."""
    model, calls = model_of(), counted(monkeypatch)
    CHANGES[change](model.model.layers[0])
    found, _ = step(model)
    assert len(calls) == 1
    monkeypatch.setattr(ResidualLayer, "as_a_whole", lambda *given: None)
    if "dropout" not in change:
        for one, other in zip(found, step(model)[0], strict=True):
            assert one is other is None or torch.equal(one, other)


@native
def test_a_bias_that_learns_gets_its_gradient(monkeypatch):
    model, calls = model_of("qwen2"), counted(monkeypatch)
    bias = model.model.layers[1].self_attn.v_proj.base.bias.requires_grad_(True)
    step(model)
    assert len(calls) == 1 and bias.grad.abs().max() > 0


@native
def test_a_window_cuts_only_longer_examples(monkeypatch):
    monkeypatch.setitem(CONFIGS, "mistral", wide("mistral", sliding_window=9))
    model, calls = model_of("mistral"), counted(monkeypatch)
    step(model)
    assert len(calls) == 2
    model.config.sliding_window = 8
    step(model)
    assert len(calls) == 2


@native
def test_hooks_on_all_modules_are_called(monkeypatch):
    model, calls, seen = model_of(), counted(monkeypatch), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *given: seen.append(type(module)))
    try:
        step(model)
    finally:
        handle.remove()
    assert not calls and fused.GatedMLP in seen


@pytest.mark.parametrize("name", ["gemma", "cohere", "gpt2"])
def test_other_layers_are_their_modules(monkeypatch, name):
    monkeypatch.setattr("tiny.CONFIGS", CONFIGS | MORE)
    model, calls = model_of(name), counted(monkeypatch)
    step(model)
    assert not calls


def test_nothing_to_learn_is_the_modules(monkeypatch):
    model, calls = model_of(), counted(monkeypatch)
    with torch.no_grad():
        loss_sum(model, BATCH)
    assert not calls

"""Frozen linear layers: values and gradients, what they save, and what casting must not touch."""

from __future__ import annotations

import pytest
import torch
from helpers import TOLERANCE, relative
from layers_for_tests import one_layer
from tiny import random_model, tokenizer

from qlora.layers import nf4
from qlora.layers.linear import NF4Linear, frozen_weight, linear_names, quantize_
from qlora.layers.weight import matmul
from qlora.specs import Quantization


def layer(columns: int, out: int, bias: bool = True, **options) -> NF4Linear:
    made = NF4Linear(columns, out, bias, **options)
    made.quantized = nf4.quantize(torch.randn(out, columns), made.blocksize, made.nested_absmax is not None)
    if bias:
        made.bias.data = torch.randn(out)
    return made


@pytest.mark.parametrize("columns,out", [(64, 48), (37, 19), (130, 7)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_product_and_gradient(columns, out, dtype):
    linear = layer(columns, out)
    W = nf4.dequantize(linear.quantized, torch.float64)
    x = torch.randn(2, 5, columns).to(dtype).requires_grad_()
    y = linear(x)
    expected = x.detach().double() @ W.t() + linear.bias.double()
    dy = torch.randn_like(y)
    y.backward(dy)
    assert y.dtype == dtype and relative(y.detach(), expected) < TOLERANCE[dtype]
    assert relative(x.grad, dy.double() @ W) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [447, 448, 701, 895, 896])
def test_a_product_in_halves_is_the_product(rows):
    x, w, y = torch.randn(rows, 80).bfloat16(), torch.randn(80, 448).bfloat16(), torch.randn(rows, 448).bfloat16()
    exact, sum_ = x.double() @ w.double(), y.double()
    assert relative(matmul(x, w), exact) < TOLERANCE[torch.bfloat16]
    assert matmul(x, w, onto=y) is y and relative(y, sum_ + exact) < TOLERANCE[torch.bfloat16]


def test_saves_no_dense_weight():
    linear, saved = layer(256, 512), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear(torch.randn(3, 256, requires_grad=True))
    assert saved == []


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casting_a_model_keeps_the_constants(cast):
    """`model.to(bfloat16)` casts floating buffers; the float32 scales must survive it to the bit."""
    linear = layer(64, 48)
    before = nf4.dequantize(linear.quantized)
    cast(linear)
    assert linear.nested_absmax.dtype == torch.float32 and linear.nested_offset.shape == ()
    assert torch.equal(nf4.dequantize(linear.quantized), before)


def test_state_dict_round_trip():
    first, second = layer(64, 48), layer(64, 48)
    second.load_state_dict(first.state_dict())
    assert torch.equal(nf4.dequantize(first.quantized), nf4.dequantize(second.quantized))


def test_autocast():
    linear = layer(64, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("double_quant", [True, False])
def test_chunks_cover_the_weight(double_quant):
    linear = layer(96, 1000, double_quant=double_quant)
    parts = list(frozen_weight(linear).chunks(elements=10_000))
    assert len(parts) > 1
    assert torch.equal(torch.cat([W for _, W in parts]), nf4.dequantize(linear.quantized))


def test_layers_share_one_buffer_and_threads_do_not():
    """Two layers of different sizes in turn, forward and backward, and the same from two threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    layers = [layer(96, 1000), layer(64, 48)]
    xs = [torch.randn(7, 96), torch.randn(7, 64)]
    expected = [x @ nf4.dequantize(linear.quantized).t() + linear.bias for linear, x in zip(layers, xs, strict=True)]

    def work(i: int) -> bool:
        return all(torch.allclose(layers[i](xs[i]), expected[i], atol=1e-4) for _ in range(100))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, [0, 1]))
    assert work(0) and work(1)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_from_linear_is_the_quantized_layer(kind):
    """Codes, values and bias of `nf4.quantize`; the bias is the layer's own."""
    made, W = one_layer(kind, 96, 40, dtype=torch.float32)
    dense = made.layer
    quantization = Quantization(4, blocksize=32, double_quant=False, scales="mse")
    ours = NF4Linear.from_linear(dense, quantization)
    expected = nf4.quantize(W.float(), 32, False, scales="mse")
    assert torch.equal(nf4.dequantize(ours.quantized), nf4.dequantize(expected)) and ours.bias is dense.bias
    x = torch.randn(3, 96)
    assert torch.allclose(ours(x), x @ nf4.dequantize(expected).t() + dense.bias, atol=1e-5)


def test_quantize_in_memory_is_what_loading_makes(tmp_path):
    """Every linear layer but the head, the same bytes; a second time changes nothing."""
    import qlora

    random_model("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = qlora.load_base(str(tmp_path), dtype="fp32")
    model = quantize_(random_model("llama"))
    names = [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    assert names == linear_names(loaded) and len(names) == 14 and isinstance(model.lm_head, torch.nn.Linear)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(torch.equal(v, before[k]) for k, v in quantize_(model).state_dict().items())


def test_the_view_of_a_weight_is_made_once():
    """Not in every forward pass; anew where a buffer is replaced, and not kept by a pickle or a copy."""
    import copy
    import pickle

    linear = layer(64, 48)
    view = linear.frozen
    linear(torch.randn(2, 64))
    assert linear.frozen is view
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert twin.frozen is not view and twin.frozen.quantized.packed is twin.weight
    linear.to(torch.bfloat16)
    assert linear.frozen is not view and linear.frozen.quantized.absmax is linear.absmax
    other = nf4.quantize(torch.randn(48, 64))
    linear.quantized = other
    assert torch.equal(nf4.dequantize(linear.quantized), nf4.dequantize(other))

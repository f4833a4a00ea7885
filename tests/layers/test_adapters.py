"""LoRA and DoRA against their dense definition, and everything that must not be stored, stale or silent."""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest
import torch
from helpers import TOLERANCE, relative
from layers_for_tests import OneLayer, in_float64, one_layer
from tiny import adapted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora import adapter_parameters, attach_adapters
from qlora.layers.adapters import (
    AdaptedProduct,
    Constants,
    backward_product,
    forward_product,
    merged_weight,
    one_token,
    product_of_operands,
    row_norms,
)
from qlora.layers.attach import forget_row_norms
from qlora.layers.linear import frozen_weight
from qlora.layers.weight import FrozenWeight
from qlora.specs import AdapterSpec
from qlora_kernels import backends

SIZES = [(64, 33), (128, 70), (37, 19)]  # blocks inside rows, whole rows of blocks, blocks across rows


def dense_definition(model: OneLayer, W: torch.Tensor, x: torch.Tensor):
    """y of the papers' formulas on fresh copies of the parameters, and the copies."""
    adapter = model.layer
    copies = {n: p.detach().double().clone().requires_grad_() for n, p in adapter.named_parameters(recurse=False)}
    V = W + adapter.scaling * copies["lora_B"] @ copies["lora_A"]
    if adapter.magnitude is not None:
        V = (copies["magnitude"] / V.norm(dim=1).detach()).unsqueeze(1) * V
    bias = 0 if adapter.base.bias is None else adapter.base.bias.double()
    return x @ V.t() + bias, copies


@pytest.mark.parametrize(
    "method,kind,size,bias", [*itertools.product(("lora", "dora"), ("nf4", "linear", "conv1d"), SIZES, (True, False))]
)
def test_equals_the_dense_definition(method, kind, size, bias):
    """Forward and the gradients of A, B, m and x, in float64."""
    columns, out = size
    model, W = one_layer(kind, columns, out, bias)
    in_float64(adapted(model, method))
    x = torch.randn(2, 11, columns, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y = model(x)
    expected, copies = dense_definition(model, W, x2)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert relative(y.detach(), expected.detach()) < TOLERANCE[torch.float64]
    assert relative(x.grad, x2.grad) < TOLERANCE[torch.float64]
    for name, copy in copies.items():
        assert relative(getattr(model.layer, name).grad, copy.grad) < TOLERANCE[torch.float64], name


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_one_token_equals_the_dense_definition(method):
    """The product of generation, in float64; a layer takes it only where a kernel multiplies as it decodes: not on a
    CPU.
    """
    for columns, out in SIZES:
        model, W = one_layer("nf4", columns, out, bias=False)
        adapter = in_float64(adapted(model, method)).layer
        x = torch.randn(columns, dtype=torch.float64)
        norm = None if adapter.magnitude is None else adapter.current_row_norms()
        with torch.no_grad():
            weight = frozen_weight(adapter.base)
            constants = Constants(weight, adapter.scaling, norm)
            y = one_token(x, *adapter.factors(), constants)
            assert relative(y, dense_definition(model, W, x)[0].detach()) < TOLERANCE[torch.float64]
            assert not weight.uses_gemv(x)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("size", SIZES[:2])
def test_a_product_of_operands_has_the_bits_of_the_plain_one(method, size):
    """What a card takes, forward and backward."""
    columns, out = size
    layer = adapted(one_layer("nf4", columns, out, dtype=torch.float32)[0], method).layer
    norm = None if layer.magnitude is None else layer.current_row_norms()
    constants, (A, B, m) = Constants(frozen_weight(layer.base), layer.scaling, norm), layer.factors()
    x, other, dy = torch.randn(11, columns), torch.randn(11, columns), torch.randn(11, out)
    with torch.no_grad():
        ends = []
        for product in (forward_product, product_of_operands):  # too few tokens for the CPU's own kernel
            y, saved = product(x, other, A, B, m, constants)
            kept = None if m is None else y
            ends.append([y, *saved[:3], *backward_product(dy, other, saved, kept, constants, (True,) * 5, False)])
    for plain, found in zip(*ends, strict=True):
        assert found is plain is None or torch.equal(found, plain)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(method, dtype):
    model, W = one_layer("nf4", 128, 70, dtype=torch.float32)
    adapted(model, method)
    x = torch.randn(40, 128).to(dtype).requires_grad_()
    x2 = x.detach().double().requires_grad_()
    expected, copies = dense_definition(model, W, x2)
    y = model(x)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    expected.backward(dy.double())
    assert relative(y.detach(), expected.detach()) < TOLERANCE[dtype]
    for name, copy in copies.items():
        gradient = getattr(model.layer, name).grad
        assert gradient.dtype == torch.float32 and relative(gradient, copy.grad) < TOLERANCE[dtype], name


@pytest.mark.parametrize(
    "kind,size,dora,shared", [*itertools.product(("nf4", "linear"), SIZES[::2], (True, False), (True, False))]
)
def test_gradcheck(kind, size, dora, shared):
    """n is an argument, since it is a constant in DoRA's graph."""
    columns, out = size
    model, _ = one_layer(kind, columns, out)
    weight = frozen_weight(model.layer)
    x = torch.randn(3, columns, dtype=torch.float64, requires_grad=True)
    other = torch.randn(3, columns, dtype=torch.float64, requires_grad=True)
    A = torch.randn(2, columns, dtype=torch.float64, requires_grad=True)
    B = torch.randn(out, 2, dtype=torch.float64, requires_grad=True)
    m = (torch.rand(out, dtype=torch.float64) + 0.5).requires_grad_() if dora else None
    n = row_norms(weight, A.detach(), B.detach(), 0.7) if dora else None

    def product(x, other, A, B, *m):
        constants = Constants(weight, 0.7, n)
        y = AdaptedProduct.apply(x, x if shared else other, A, B, m[0] if m else None, constants)
        return y + model.layer.bias

    inputs = (x, other, A, B) + ((m,) if dora else ())
    assert torch.autograd.gradcheck(product, inputs, check_undefined_grad=False)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_adapter_is_the_base(method, kind, dtype, bias):
    """To the bit, but for a bias: the base adds it before the one rounding, an adapter after it."""
    model, _ = one_layer(kind, 128, 70, bias, dtype=torch.float32)
    if kind == "linear":
        model.to(dtype)
    x = torch.randn(5, 128, dtype=dtype)
    before = model(x)
    after = attach_adapters(model, method=method, rank=4)(x)
    assert relative(after, before) < TOLERANCE[dtype] if bias else torch.equal(after, before)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_small_updates_arrive_in_bf16(method):
    """An update a tenth of a bf16 step of y moves y by its full size in the mean, forward and backward: it is not
    rounded away because the large product was rounded before.
    """
    torch.manual_seed(0)
    model, W = one_layer("nf4", 1024, 512, False, dtype=torch.float32)
    attach_adapters(model, method=method, rank=4, alpha=4.0)
    x = torch.randn(256, 1024).bfloat16().requires_grad_()
    dy = torch.randn(256, 512).bfloat16()
    adapter = model.layer

    def passes():
        x.grad = None
        y = model(x)
        y.backward(dy)
        return y.detach().double(), x.grad.double()

    fresh = passes()
    with torch.no_grad():
        adapter.lora_B.normal_(0, 2e-3)
    moved = passes()
    norm = row_norms(frozen_weight(adapter.base), adapter.lora_A.detach(), adapter.lora_B.detach(), 1.0).double()
    V = W + adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    if method == "dora":
        V = (adapter.magnitude.detach().double() / norm).unsqueeze(1) * V
    for now, before, exact in zip(
        moved, fresh, (x.detach().double() @ (V - W).t(), dy.double() @ (V - W)), strict=True
    ):
        arrived = ((now - before) * exact).sum() / exact.square().sum()  # 1: all of it
        assert exact.abs().mean() < 0.25 * 2**-8 * before.abs().mean()
        assert 0.9 < arrived < 1.1


@pytest.mark.parametrize("size", SIZES)
def test_row_norms_never_cancel(size):
    """Rows where s B A nearly undoes W lose their digits in the three sums and are computed densely."""
    columns, out = size
    W = torch.randn(out, columns)
    A = torch.linalg.qr(torch.randn(columns, out if out < columns else columns))[0].t().contiguous()
    B = -(W @ A.t()) * (1 - 1e-4)  # W + B A is what lies outside the rows of A, and a ten-thousandth of the rest
    expected = (W.double() + B.double() @ A.double()).norm(dim=1)
    assert relative(row_norms(FrozenWeight(W), A, B, 1.0), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_rows_and_zero_magnitudes(dtype):
    """No NaN or inf forward or backward; m = 0 gives a row of the size 1e-6, with a gradient that can move it."""
    model, _ = one_layer("linear", 64, 9)
    model.layer.weight.data[2] = 0
    in_float64(attach_adapters(model, method="dora", rank=2))
    model.layer.magnitude.data[4] = 0
    model.layer.magnitude.data[5] *= -1
    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    plain = x.detach() @ model.layer.base.weight.t()
    assert torch.allclose(y[:, 5] - model.layer.base.bias[5], -plain[:, 5])
    assert (y[:, 4] - model.layer.base.bias[4]).abs().max() < 1e-4
    for tensor in (y, x.grad, *(p.grad for p in adapter_parameters(model))):
        assert torch.isfinite(tensor).all()
    assert model.layer.magnitude.grad[4] != 0


def test_bias_is_outside_the_scaling():
    model, _ = one_layer("linear", 64, 9)
    in_float64(attach_adapters(model, method="dora", rank=2))
    y = model(x := torch.randn(3, 64, dtype=torch.float64))
    model.layer.magnitude.data *= 2
    forget_row_norms(model)
    bias = model.layer.base.bias
    assert torch.allclose(model(x) - bias, 2 * (y - bias))


def test_scaling():
    spec = {"method": "lora", "rank": 9, "alpha": 6.0, "dropout": 0.0, "modules": ()}
    assert AdapterSpec(rslora=False, **spec).scaling == pytest.approx(6 / 9)
    assert AdapterSpec(rslora=True, **spec).scaling == pytest.approx(6 / 3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_acts_on_the_low_rank_path_in_training_only(method):
    model, _W = one_layer("nf4", 64, 9, dtype=torch.float32)
    adapted(model, method, dropout=0.5).train()
    x = torch.randn(1000, 64)
    assert not torch.equal(model(x), model(x))
    # in the mean over many draws the low-rank path is what it is without dropout
    mean = torch.stack([model(x) for _ in range(200)]).mean(0)
    model.eval()
    assert torch.equal(model(x), model(x))
    assert relative(mean, model(x)) < 0.05
    with torch.no_grad():
        model.layer.lora_B.zero_()
    model.train()
    assert torch.equal(model(x), model(x))


# ---------------------------------------------------------------- memory


class SizeWatch(TorchDispatchMode):
    """Names every operation whose result has as many elements as the watched weight."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements, self.seen = elements, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() == self.elements:
                self.seen.append(str(function))
        return out


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_nothing_dense_is_saved_or_built(method):
    """Saved for backward: x, u, the parameters and for DoRA y. Of the size of W there is only W itself, decoded."""
    columns, out, tokens, rank = 224, 192, 10, 3  # columns that no kernel multiplies as it decodes them
    model, _ = one_layer("nf4", columns, out, dtype=torch.float32)
    adapted(model, method)
    x = torch.randn(tokens, columns, requires_grad=True)
    saved: dict[int, int] = {}

    def note(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with SizeWatch(columns * out) as watch, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x).sum().backward()
    parameters = rank * (columns + out) + (2 * out if method == "dora" else 0)  # m and g
    activations = tokens * (columns + rank) + (tokens * out if method == "dora" else 0)
    assert sum(saved.values()) == parameters + activations
    allowed = (
        "dequantize_4bit",
        "aten.empty",
        "aten.t.",
        "aten.detach",
        "aten.slice",
        "aten.view",
        "aten.transpose",
        "aten.alias",
    )
    assert [name for name in watch.seen if not any(a in name for a in allowed)] == []


@pytest.fixture
def in_use():
    """The kernels that the operators run, the best again after the test."""
    yield backends.NATIVE
    backends.NATIVE.select()


def test_a_layer_in_one_operator_equals_the_plain_route(in_use):
    """In bf16 where a kernel multiplies as it decodes and, by the same module on other instruction sets, where it does
    not: results, gradients, and an n that is made once an optimizer's step, by whichever; with dropout, bias, frozen
    inputs, recomputation.
    """
    for method, bias, dropout, needs_x in itertools.product(("lora", "dora"), (False, True), (0.0, 0.3), (False, True)):
        found = []
        for isa in ("", "portable"):
            in_use.select(isa)
            torch.manual_seed(1)
            model, _ = one_layer("nf4", 128, 96, bias, dtype=torch.float32)
            layer = adapted(model, method, dropout=dropout).layer
            optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.001)  # AdamW's sign of what is near 0 is noise
            for step in range(2):
                drawn = torch.Generator().manual_seed(step)
                x = torch.randn(70, 128, generator=drawn).bfloat16().requires_grad_(needs_x)
                optimizer.zero_grad()
                torch.manual_seed(step)
                y = checkpoint(model, x, use_reentrant=False) if step else model(x)
                norms = layer.row_norms.n
                y.backward(torch.randn(y.shape, generator=drawn).bfloat16())
                assert layer.row_norms.n is norms
                optimizer.step()
            found.append(
                [
                    y.detach(),
                    *(p.grad for p in adapter_parameters(model)),
                    *([x.grad] if needs_x else []),
                    *([layer.current_row_norms()] if method == "dora" else []),
                ]
            )
        for ours, plain in zip(*found, strict=True):
            assert relative(ours, plain) < TOLERANCE[torch.bfloat16], (method, bias, dropout)


@pytest.mark.parametrize("kind", ["nf4", "linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_no_unit_multiplies_is_widened(in_use, kind, dtype):
    """A CPU with AVX2 alone, few tokens and odd sizes, dropout or not: rounded once, where 16 bits in between would be
    rounded at each product. What is kept for the backward pass is not wide.
    """
    in_use.select("avx2")
    for tokens, dropout in itertools.product((5, 40), (0.0, 0.3)):
        torch.manual_seed(2)
        model, _ = one_layer(kind, 77, 33, dtype=torch.float32)
        layer = adapted(model, "dora", dropout=dropout).layer
        layer.base.to(dtype)
        exact = in_float64(deepcopy(model))
        x = torch.randn(tokens, 77).to(dtype).requires_grad_()
        wide = x.detach().double().requires_grad_()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            torch.manual_seed(3)
            y = model(x)
        torch.manual_seed(3)
        expected = exact(wide)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        y.backward(dy)
        expected.backward(dy.double())
        large = [t for t in kept if t.numel() >= tokens * 33]
        assert y.dtype == x.grad.dtype == dtype and {t.dtype for t in large if t.shape[0] == tokens} == {dtype}
        assert relative(y, expected) < TOLERANCE[dtype] / 4 and relative(x.grad, wide.grad) < TOLERANCE[dtype] / 4
        for ours, theirs in zip(adapter_parameters(model), adapter_parameters(exact), strict=True):
            assert relative(ours.grad, theirs.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged_weight(method):
    model, _W = one_layer("nf4", 96, 40, bias=False, dtype=torch.float32)
    adapted(model, method)
    adapter = model.layer
    merged = merged_weight(
        frozen_weight(adapter.base),
        adapter.lora_A.detach(),
        adapter.lora_B.detach(),
        None if adapter.magnitude is None else adapter.magnitude.detach(),
        adapter.scaling,
        torch.float32,
    )
    x = torch.randn(4, 96)
    assert relative(x @ merged.t(), model(x).detach()) < TOLERANCE[torch.float32]

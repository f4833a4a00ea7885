"""Attention over packed examples: the kernels against the definition, and against torch's own in bf16."""

from __future__ import annotations

import copy
import os
import warnings
from itertools import accumulate, pairwise

import pytest
import torch
from helpers import ISAS, relative, routed, wait
from tiny import adapted, random_model
from torch.nn.functional import scaled_dot_product_attention

from qlora.data.batch import Example, pack
from qlora.layers.attach import adapter_parameters
from qlora.layers.forward_mode import forward_mode
from qlora.layers.loss import loss_sum
from qlora_kernels import backends, reference
from qlora_kernels.cpu import native

CASES = [  # lengths, heads, groups, size of a head
    ((1, 2, 17, 255, 257), 4, 2, 64),
    ((1,), 3, 3, 80),
    ((33, 300), 6, 2, 96),
    ((40, 0, 520), 4, 1, 128),
    ((31, 32), 2, 1, 5),
]


@pytest.fixture(params=["", "avx512"] if torch.backends.cpu.get_cpu_capability() == "AVX512" else [""])
def kernels(request):
    """The native kernels: attention by AMX, by AVX512-BF16, or, where the processor has neither, through float32."""
    loaded, words = native.load()
    assert loaded is not None, words
    loaded.select(request.param)
    yield loaded
    loaded.select()


pytestmark = pytest.mark.usefixtures("poisoned")


def drawn(lengths, heads, groups, D, dtype=torch.bfloat16):
    """(bounds, [q, k, v, gradient of the result]): scores with a spread of 4, so that a few keys have most of the
    probability.
    """
    tokens = sum(lengths)
    return [0, *accumulate(lengths)], [
        (2 * torch.randn(tokens, n, D)).to(dtype) for n in (heads, groups, groups, heads)
    ]


def as_run(kernels):
    """These kernels' operators, or, where they have none for bf16, those that run instead."""
    return routed(kernels) if isinstance(kernels, native.Native) and not has_kernel(kernels) else kernels


def has_kernel(kernels) -> bool:
    """Whether attention in bf16 is ours: with a unit for it, or through float32 with AVX2 and AVX-512."""
    return kernels.supports_attention(*[torch.empty(1, 1, 64, dtype=torch.bfloat16)] * 3)


def both(kernels, bounds, tensors, scale):
    kernels, (q, k, v, dout) = as_run(kernels), tensors
    out, lse = kernels.attention(q, k, v, bounds, scale)
    return [out, *kernels.attention_backward(dout, q, k, v, out, lse, bounds, scale)]


def by_torch(bounds, tensors, scale):
    """[out, dq, dk, dv] by torch's own function, example by example, in the dtype of the tensors."""
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    parts = [
        scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v)), is_causal=True, scale=scale, enable_gqa=True
        )
        for a, b in pairwise(bounds)
        if b > a
    ]
    out = torch.cat([part[0].transpose(0, 1) for part in parts])
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_definition(case):
    bounds, tensors = drawn(*case, dtype=torch.float64)
    for got, expected in zip(both(reference, bounds, tensors, 0.3), by_torch(bounds, tensors, 0.3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_what_the_kernels_lack_goes_to_the_reference(kernels):
    """Other types than bf16, and a processor without these units."""
    bounds, tensors = drawn((5, 40), 4, 2, 16, dtype=torch.float64)
    exact, with_reference = both(reference, bounds, tensors, 0.25), routed(kernels)
    for got, expected in zip(both(with_reference, bounds, tensors, 0.25), exact, strict=True):
        assert torch.equal(got, expected)
    kernels.select("portable")
    low = [x.bfloat16() for x in tensors]
    assert not has_kernel(kernels) and not kernels.supports_attention(*low[:3])
    for got, expected in zip(both(with_reference, bounds, low, 0.25), exact, strict=True):
        assert relative(got, expected) < 0.05


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_less_exact_than_torch(kernels, case):
    """Against the definition in float64, of the same bf16 values. Both round P and dS to bf16; no product is rounded on
    the way.
    """
    bounds, tensors = drawn(*case)
    scale = case[3] ** -0.5
    exact = both(reference, bounds, [x.double() for x in tensors], scale)
    got = both(kernels, bounds, tensors, scale)
    for mine, theirs, expected in zip(got, by_torch(bounds, tensors, scale), exact, strict=True):
        error, other = ((x.double() - expected).norm() for x in (mine, theirs))
        assert mine.dtype == torch.bfloat16 and error <= 1.1 * other + 1e-5 * tensors[3].double().norm()


def test_the_sums_that_backward_needs(kernels):
    bounds, (q, k, v, _) = drawn((200, 33), 4, 2, 64)
    exact = reference.attention(q.double(), k.double(), v.double(), bounds, 0.125)[1]
    torch.testing.assert_close(
        as_run(kernels).attention(q, k, v, bounds, 0.125)[1].double(), exact, rtol=1e-5, atol=1e-5
    )


def test_large_scores(kernels):
    """Scores of some hundreds: e^score overflows, and all but one probability of most queries is zero."""
    bounds, tensors = drawn((70, 40), 2, 2, 64)
    tensors[0] *= 30
    exact = both(reference, bounds, [x.double() for x in tensors], 0.125)
    for got, expected in zip(both(kernels, bounds, tensors, 0.125), exact, strict=True):
        assert relative(got.double(), expected) < 0.01


def test_views(kernels):
    """Queries, keys and values as slices of one product, and tensors whose last dimension is not contiguous."""
    bounds, tensors = drawn((20, 45), 4, 2, 64)
    expected = both(kernels, bounds, tensors, 0.125)
    whole = torch.cat(tensors[:3], dim=1)
    parts = [*whole.split((4, 2, 2), dim=1), tensors[3].transpose(0, 2).contiguous().transpose(0, 2)]
    for got, same in zip(both(kernels, bounds, parts, 0.125), expected, strict=True):
        assert relative(got, same) < 0.01


def test_bits_do_not_depend_on_threads_nor_on_other_examples(kernels):
    bounds, tensors = drawn((100, 3, 290), 6, 3, 64)
    before, x = torch.get_num_threads(), torch.randn(256, 256).bfloat16()
    product = x @ x
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(both(kernels, bounds, tensors, 0.125))
    torch.set_num_threads(before)
    alone = both(kernels, [0, 290], [x[103:] for x in tensors], 0.125)
    for one, two, three, last in zip(*results, alone, strict=True):
        if has_kernel(kernels):  # torch, which computes the reference, promises no such thing
            assert torch.equal(one, two) and torch.equal(one, three) and torch.equal(one[103:], last)
    assert torch.equal(x @ x, product)  # torch's products use the same unit, and find it as they left it


def test_wrong_shapes_are_refused(kernels):
    bounds, (q, k, v, dout) = drawn((8, 8), 4, 2, 64)
    if has_kernel(kernels):  # the reference has torch's own errors
        with pytest.raises(ValueError, match=r"examples at \[0, 9, 17\] of 16 tokens"):
            kernels.attention(q, k, v, [0, 9, 17], 1.0)
        with pytest.raises(ValueError, match="queries"):
            kernels.attention(q, k[:8], v[:8], bounds, 1.0)
        with pytest.raises(ValueError, match="lse"):
            kernels.attention_backward(dout, q, k, v, dout, torch.ones(4, 15), bounds, 1.0)


def test_a_forked_child_does_not_hang(kernels):
    bounds, tensors = drawn((40, 40), 4, 2, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = [x.view(torch.int16).numpy() for x in both(kernels, bounds, tensors, 0.125)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        torch.use_deterministic_algorithms(False)
        if not has_kernel(kernels):
            os._exit(0)  # the reference is torch's, whose threads are not ours to care for
        same = [
            (x.view(torch.int16).numpy() == y).all()
            for x, y in zip(both(kernels, bounds, tensors, 0.125), expected, strict=True)
        ]
        os._exit(0 if all(same) else 1)
    torch.set_num_threads(before)
    assert wait(child, 20) == 0


# ---------------------------------------------------------------- in a model


@pytest.mark.parametrize("isa", ["", *ISAS[1:]], ids=["best", *ISAS[1:]])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral"])
def test_a_model_in_bf16(name, isa, monkeypatch):
    """Gradients with our attention are as near to those of the model in float64 as the gradients with torch's are, all
    else alike.
    """
    batch = pack([Example(tuple(range(7, 7 + n)), (False,) + (True,) * (n - 1)) for n in (70, 33, 2, 40)])
    model = adapted(random_model(name).bfloat16(), "lora")
    assert forward_mode(model).packed

    def gradients(model) -> torch.Tensor:
        loss_sum(model, batch).backward()
        return torch.cat([p.grad.double().flatten() for p in adapter_parameters(model)])

    exact = gradients(copy.deepcopy(model).double())
    backends.NATIVE.select(isa)
    ours = gradients(copy.deepcopy(model))
    has_ours = has_kernel(backends.NATIVE)
    monkeypatch.setitem(backends.AVOIDED, ("attention", "native"), "torch's is the oracle")
    theirs = gradients(model)
    backends.NATIVE.select()
    assert torch.equal(ours, theirs) == (not has_ours)  # that it is used at all
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_in_float32(name):
    """The kernels of float32 are used, and its gradients stay those of the model in float64."""
    batch = pack([Example(tuple(range(7, 7 + n)), (False,) + (True,) * (n - 1)) for n in (70, 33, 2, 40)])
    model = adapted(random_model(name), "lora")
    assert forward_mode(model).packed

    def gradients(model) -> torch.Tensor:
        loss_sum(model, batch).backward()
        return torch.cat([p.grad.double().flatten() for p in adapter_parameters(model)])

    exact, routes = gradients(copy.deepcopy(model).double()), backends.ROUTES.copy()
    ours = gradients(model)
    ran = {operator: counts.get("native", 0) for operator, counts in backends.routes(routes).items()}
    assert (ran.get("attention", 0) == ran.get("attention_backward", 0) > 0) == backends.NATIVE.attends_in_float32
    assert (ours - exact).norm() < 1e-5 * exact.norm()

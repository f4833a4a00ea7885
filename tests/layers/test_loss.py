"""The loss of every architecture against transformers' own, however it runs; chunks, packing, fused modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import Largest, relative
from tiny import CONFIGS, MORE, PADDED, SMALL, adapted, build, by_transformers, examples

from qlora.data.batch import Example, pack
from qlora.layers import attention, forward, loss
from qlora.layers.attach import adapter_parameters
from qlora.layers.forward import ForwardMode
from qlora.layers.forward_mode import forward_mode
from qlora.layers.fused import fuse
from qlora.layers.loss import HeadLoss, loss_sum
from qlora_kernels import backends


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_loss_and_gradients_are_those_of_transformers(name, fused):
    model = adapted(build(name), "dora")
    batch = pack(examples((12, 6), (5, 3), (9, 8), (9, 2)))
    parameters = adapter_parameters(model)
    expected = by_transformers(model, batch)
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    if fused:
        fuse(model)
    found = loss_sum(model, batch)
    assert forward_mode(model) == ForwardMode(True, name not in PADDED)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    scale = max(g.abs().max() for g in gradients if g is not None)
    for got, want in zip(torch.autograd.grad(found, parameters, allow_unused=True), gradients, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["llama", "gpt2", "windowed", "gemma3"])
def test_a_packed_batch_is_its_examples_alone(name):
    model = adapted(build(name), "lora")
    data = examples((12, 11), (5, 3), (9, 8), (9, 2), (1, 0))
    alone = [loss_sum(model, pack([example])) for example in data]
    together = loss_sum(model, pack(data))
    assert forward_mode(model).packed
    assert together.item() == pytest.approx(sum(alone).item(), rel=1e-6)
    parameters = adapter_parameters(model)
    for got, want in zip(
        torch.autograd.grad(together, parameters), torch.autograd.grad(sum(alone), parameters), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in (*CONFIGS, *MORE) if n not in PADDED])
def test_examples_do_not_see_each_other(name):
    """No gradient of one example's loss reaches the tokens of another, whatever stands beside it."""
    model = build(name)
    data = examples((12, 0), (7, 6), (10, 0))
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda m, i, out: seen.append(out.requires_grad_()) or out
    )
    forward_mode(model)
    seen.clear()
    (gradient,) = torch.autograd.grad(loss_sum(model, pack(data)), seen)
    handle.remove()
    reached = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
    assert gradient.shape[1] == 29 and reached == list(range(12, 18))  # its last token predicts nothing


def test_no_padding_is_computed():
    model, sizes = build("llama"), []
    forward_mode(model)
    model.model.layers[0].register_forward_hook(lambda m, i, out: sizes.append(i[0].shape[1]))
    loss_sum(model, pack(examples((50, 3), (4, 3))))
    assert sizes == [54]


@pytest.mark.parametrize("name", sorted({*CONFIGS, *MORE} - PADDED))
def test_a_row_is_filled_up_without_a_trace(monkeypatch, name):
    monkeypatch.setattr(forward, "ROUND", 4)
    model, batch, sizes = adapted(build(name), "lora"), pack(examples((20, 3), (13, 12))), []
    parameters = adapter_parameters(model)
    expected = by_transformers(model, batch)
    gradients = torch.autograd.grad(expected, parameters)
    forward_mode(model)
    model.get_decoder().register_forward_hook(lambda m, i, out: sizes.append(out.last_hidden_state.shape[1]))
    found = loss_sum(model, batch)
    assert sizes == [36]  # 33 and 3 more
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, parameters), gradients, strict=True):
        assert relative(ours, theirs) < 1e-4


def test_another_attention_mask_is_still_a_mask():
    """A packed model that somebody calls himself, with padding or to generate, is an ordinary model."""
    model = build("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected, padded = model(ids).logits, torch.tensor([[1, 1, 1, 0, 0]])
    masked = model(ids, attention_mask=padded).logits
    assert forward_mode(model).packed and model.config._attn_implementation == attention.NAME
    torch.testing.assert_close(model(ids).logits, expected)
    torch.testing.assert_close(model(ids, attention_mask=padded).logits, masked)
    out = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    again = build("llama").generate(ids, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    assert out.tolist() == again.tolist()


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("scale, cap", [(1.0, None), (0.25, None), (1.0, 5.0), (0.5, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_head_loss_is_the_definition(monkeypatch, scale, cap, bias):
    monkeypatch.setattr(loss, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(23, 33, dtype=torch.float64, generator=generator, requires_grad=True)
    weight, tokens = (
        torch.randn(101, 33, dtype=torch.float64, generator=generator),
        torch.randint(0, 101, (23,), generator=generator),
    )
    b = torch.randn(101, dtype=torch.float64, generator=generator) if bias else None
    logits = F.linear(states, weight, b) * scale
    expected = F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), tokens, reduction="sum")
    found = HeadLoss.apply(states, weight, b, tokens, scale, cap)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(3.5 * expected, states)
    torch.testing.assert_close(torch.autograd.grad(3.5 * found, states), want, rtol=1e-10, atol=1e-12)
    single = HeadLoss.apply(
        states.detach().float().requires_grad_(), weight.float(), None if b is None else b.float(), tokens, scale, cap
    )
    assert single.dtype == torch.float32 and single.item() == pytest.approx(expected.item(), rel=1e-5)


def test_head_loss_in_bf16_rounds_once():
    """Logits and their gradient are bf16, as in the plain way: the same numbers but for a last place."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 64, generator=generator).bfloat16().requires_grad_()
    weight, tokens = (
        torch.randn(500, 64, generator=generator).bfloat16() / 4,
        torch.randint(0, 500, (40,), generator=generator),
    )
    expected = F.cross_entropy(F.linear(states, weight).float(), tokens, reduction="sum")
    found = HeadLoss.apply(states, weight, None, tokens, 1.0, None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (got,), (want,) = torch.autograd.grad(found, states), torch.autograd.grad(expected, states)
    assert relative(got, want) < 0.01


def test_a_frozen_heads_products_are_by_integers_where_torch_allows_less_than_float32(monkeypatch):
    """Over 20 steps of what lies below the head the loss stays beside float32's; both chunks of labels, a bias."""
    monkeypatch.setattr(loss, "CHUNK", 70)
    weight, bias, x, start = torch.randn(331, 64) / 8, torch.randn(331), torch.randn(145, 24), torch.randn(24, 64) / 5
    labels = torch.randint(0, 331, (145,))

    def losses() -> list[float]:
        found, below = [], start.clone().requires_grad_()
        for _ in range(20):
            found.append(HeadLoss.apply(x @ below, weight, bias, labels, 1.0, None))
            (gradient,) = torch.autograd.grad(found[-1], below)
            below = (below - 0.005 * gradient).detach().requires_grad_()
        return torch.stack(found).tolist()

    exact, before, routes = losses(), torch.get_float32_matmul_precision(), backends.ROUTES.copy()
    try:
        torch.set_float32_matmul_precision("high")
        found = losses()
    finally:
        torch.set_float32_matmul_precision(before)
    ours = backends.routes(routes).get("matmul_dense_into", {})
    integers, floats = backends.multiplies_by_integers(), backends.NATIVE and backends.NATIVE.dense_in_float32
    assert ours == ({"native": 120} if integers or floats else {})  # three chunks, forward and backward
    assert exact[-1] < 0.75 * exact[0]
    assert found == pytest.approx(exact, rel=2e-4)
    assert (found == exact) != integers


@pytest.mark.parametrize("adapted_head", [False, True])
def test_no_tensor_of_all_logits_lives(monkeypatch, adapted_head):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SMALL, "vocab_size": 4000}, intermediate_size=160)
    )
    adapted(model, "dora", targets=["q_proj", "lm_head"] if adapted_head else ["q_proj"])
    batch = pack(examples((120, 119), (100, 99)))
    expected = by_transformers(model, batch)
    want = torch.autograd.grad(expected, adapter_parameters(model))
    forward_mode(model)
    monkeypatch.setattr(loss, "CHUNK", 20)
    with Largest() as largest:
        found = loss_sum(model, batch)
        got = torch.autograd.grad(found, adapter_parameters(model))
    assert 20 * 4000 <= largest.elements <= 4000 * 64  # the head's own weight; the logits would be 218 * 4000
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_a_batch_without_targets():
    model = adapted(build("llama"), "lora")
    assert loss_sum(model, pack([Example((1, 2, 3), (False,) * 3)])).item() == 0


def test_a_model_that_is_no_transformers_model_runs_as_it_is():
    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, use_cache):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = build("llama")
    batch = pack(examples((12, 6), (5, 3)))
    wrapped = Wrapped(model)
    assert loss_sum(wrapped, batch).item() == pytest.approx(by_transformers(model, batch).item(), rel=1e-5)
    assert forward_mode(wrapped) == ForwardMode(False, False)


def test_finding_the_layout_changes_nothing():
    """Training mode and the random state stay: a resumed run finds the same."""
    model = adapted(build("llama"), "dora", dropout=0.5).train()
    before = torch.get_rng_state()
    forward_mode(model)
    assert (
        model.training
        and all(module.training for module in model.modules())
        and torch.equal(before, torch.get_rng_state())
    )


def test_a_card_takes_more_labels_at_a_time():
    """So that it does not wait for the head; of a large vocabulary fewer, so that the logits stay 270 MB."""
    assert [loss.chunk_size("cuda", n) for n in (32000, 128256, 262144, 1 << 21)] == [1024, 1024, 512, 288]
    assert loss.chunk_size("cpu", 32000) == 288
    states = torch.empty(3000, 8, device="meta", requires_grad=True)
    head, labels = torch.empty(262144, 8, device="meta"), torch.zeros(3000, dtype=torch.long, device="meta")
    for kind, rows in (("cuda", 512), ("cpu", 288)):
        with backends.planned_for(kind), Largest() as largest:
            loss.HeadLoss.apply(states, head, None, labels, 1.0, None)
        assert largest.elements == rows * 262144

"""Which attention kernel runs where, what each launches and moves, and that all compute the same: without a card."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from launches import Launches, of_a_step
from transformers import LlamaConfig

from qlora.config.commands import FinetuneConfig
from qlora.layers import attention
from qlora.layers.attention_kernels import Need, Offer, by_length, by_varlen, choose, torch_varlen
from qlora.optim.flat import GradientSums, lay_out
from qlora.optim.moments import pages_of
from qlora.plan.meta import MetaRun
from qlora.run.inputs import find_model
from qlora_kernels import backends

ALL, NO_VARLEN, NO_FLASH = Offer(False, True, True), Offer(False, True, False), Offer(False, False, False)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    "expected, offer, capability, dtype, head, value_head, cut, dropout",
    [
        ("varlen", ALL, (8, 0), BF16, 128, 128, False, False),
        ("varlen", ALL, (8, 9), FP16, 64, 64, True, False),  # Gemma 3, Mistral 0.1: a window costs no mask
        ("varlen", ALL, (12, 0), BF16, 80, 80, False, False),
        ("varlen", ALL, (9, 0), BF16, 200, 200, False, False),
        ("efficient", ALL, (8, 6), BF16, 200, 200, False, False),  # too little shared memory for its gradient
        ("varlen", ALL, (8, 6), BF16, 256, 256, False, False),
        ("efficient", ALL, (8, 6), BF16, 256, 256, False, True),
        ("efficient", ALL, (9, 0), BF16, 512, 512, False, False),  # Gemma 4
        ("efficient", ALL, (9, 0), BF16, 192, 128, False, False),  # DeepSeek
        ("efficient", ALL, (9, 0), FP32, 64, 64, False, False),
        ("efficient", ALL, (7, 5), FP16, 64, 64, False, False),  # Turing
        ("flash", ALL, (8, 0), BF16, 64, 64, False, True),  # varlen has no dropout
        ("flash", NO_VARLEN, (8, 0), BF16, 64, 64, False, False),  # an older torch
        ("efficient", NO_VARLEN, (8, 0), BF16, 64, 64, True, False),
        ("efficient", NO_FLASH, (8, 0), BF16, 64, 64, False, False),
    ],
)
def test_what_a_card_runs(expected, offer, capability, dtype, head, value_head, cut, dropout):
    assert choose(Need("cuda", capability, dtype, head, value_head, cut, dropout), offer) == expected


def test_what_a_cpu_runs():
    """Our kernel, but for what it lacks."""
    ours = Offer(True, False, True)
    for cut, dropout in ((False, False), (True, False), (False, True)):
        need = Need("cpu", None, BF16, 64, 64, cut, dropout)
        assert choose(need, ours) == ("torch" if cut or dropout else "native")
        assert choose(need, ALL) == "torch"  # what a card has, a CPU has not
    assert choose(Need("xpu", None, BF16, 64, 64, False, False), ALL) == "torch"


# ---------------------------------------------------------------- what they compute


@pytest.fixture(scope="module")
def varlen_on_a_cpu():
    """torch's operator, which has only a card's kernels, by its documentation on a CPU."""
    from torch.nn.attention import varlen

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window=None, enable_gqa=False, *rest):
        assert max_q == max_k == cu_q.diff().max() and torch.equal(cu_q, cu_k) and cu_k.dtype == torch.int32
        assert q.shape[2] % 8 == 0 and q.stride(2) == k.stride(2) == v.stride(2) == 1
        assert enable_gqa == (q.shape[1] != k.shape[1]) and is_causal == (window == [-1, 0]) and window[1] == 0
        out = torch.empty_like(q)
        for a, b in pairwise(cu_q.tolist()):
            keys, values = (x[a:b].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
            distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
            seen = (distance >= 0) & ((distance <= window[0]) | torch.tensor(window[0] < 0))
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(2), values)
        return out, q.new_empty(q.shape[1], q.shape[0]).float(), torch.zeros(2, dtype=torch.uint64)

    varlen._varlen_attn.register_kernel("cpu", forward)


def drawn(lengths, heads, groups, head):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, sum(lengths), head, dtype=torch.float64) for n in (heads, groups, groups))
    return q, k, v, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups, head", [(4, 16), (2, 16), (1, 5)])
def test_all_compute_the_same(varlen_on_a_cpu, window, groups, head):
    q, k, v, cu_seqlens = drawn((7, 7, 1, 19), 4, groups, head)
    lengths, options = cu_seqlens.diff().tolist(), {"window": window, "scale": 0.3}
    plain = by_length(q, k, v, lengths, "torch", dropout=0.0, **options)
    repeated = by_length(q, k, v, lengths, "efficient", dropout=0.0, **options)
    torch.testing.assert_close(repeated, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(by_varlen(q, k, v, cu_seqlens, 19, **options), plain, rtol=1e-10, atol=1e-10)
    masked = torch.ones(34, 34, dtype=torch.bool).tril()
    masked &= torch.block_diag(*(torch.ones(n, n, dtype=torch.bool) for n in lengths)).bool()
    masked &= torch.ones(34, 34, dtype=torch.bool).triu(1 - window) if window else True
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=masked, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(plain, expected, rtol=1e-10, atol=1e-10)


def test_attend_hands_the_borders_to_the_card():
    """Those of the queries stay on the CPU, those of the keys lie where the tensors do."""
    q, k, v, cu_seqlens = drawn((3, 8), 4, 2, 16)
    with backends.planned_for("cuda"), Launches() as launches:
        borders = attention.borders(cu_seqlens, torch.device("meta"))
        assert borders["cu_seq_lens_q"].device.type == "cpu" and borders["cu_seq_lens_k"].is_meta
        low = (x.to("meta", torch.bfloat16) for x in (q, k, v))
        out, _ = attention.attend(None, *low, attention.NO_MASK, **borders, sliding_window=4)
    assert launches.found["_varlen_attn"] == 1 and out.shape == (1, 11, 4, 16)


@pytest.mark.parametrize("window", [None, 4])
def test_shared_keys_in_float32_stay_off_the_last_resort_of_torch(window):
    """Each head is given its keys: told that they are shared, a card would hold [heads, T, T] without a word."""
    q, k, v, cu_seqlens = drawn((3, 8), 4, 2, 16)
    with backends.planned_for("cuda"), Launches() as launches:
        borders = attention.borders(cu_seqlens, torch.device("meta"))
        q, k, v = (x.to("meta", FP32) for x in (q, k, v))
        attention.attend(None, q, k, v, attention.NO_MASK, **borders, sliding_window=window)
    ran = {name: count for name, count in launches.found.items() if "attention" in name}
    assert ran == {"_scaled_dot_product_efficient_attention": 2}


# ---------------------------------------------------------------- what they cost

MANY = {1: (64,), 4: (10, 20, 30, 4), 8: (4, 5, 6, 7, 8, 9, 10, 15)}


@pytest.mark.parametrize("kernel", ["torch", "efficient"])
def test_lengths_cost_no_gradient_bytes(kernel):
    """A gradient is made once, however many lengths there are: 8 of them once cost 16 times the bytes."""
    for lengths in MANY.values():
        q, k, v = (x.requires_grad_() for x in drawn(lengths, 4, 4, 16)[:3])
        out = by_length(q * 1, k * 1, v * 1, list(lengths), kernel, window=None, dropout=0.0, scale=0.25)
        with Launches() as backward:
            out.sum().backward()
        assert backward.moved <= 3 * q.numel() * q.element_size(), lengths


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ).save_pretrained(folder)

    def run(**options) -> MetaRun:
        config = FinetuneConfig(model=str(folder), data="-", output="-", device="cuda", **{"dtype": "bf16"} | options)
        return MetaRun(config, find_model(config, weights=False))

    return run


@pytest.mark.parametrize("method, most", [("lora", (28, 38)), ("dora", (27, 38))])
def test_a_layer_costs_the_same_launches_for_any_examples(planned, method, most):
    """Two micro-batches of as many tokens, of one example and of eight, with recomputation and without."""
    run = planned(method=method)
    for again in (False, True):
        layers = [
            [of_a_step(run.model(n, again), lengths) for lengths in MANY.values()] for n in (3, 2)
        ]  # of three layers and of two: the difference is a layer's
        one, four, eight = ((a[0] - b[0], a[1] - b[1]) for a, b in zip(*layers, strict=True))
        assert one == four == eight
        assert one[0] <= most[0] and one[1] <= most[1] + again * most[0], one
    assert torch_varlen() is not None


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_further_micro_batch_costs_one_launch_more_a_page(planned, method):
    """Its gradients are added to those before by one; without pages by one for each parameter, 14 and 21 a layer."""
    model = planned(method=method).model(2, False)
    made = pages_of((p for p in model.parameters() if p.requires_grad), 1)
    for page in made:
        lay_out(page)
    alone = [sum(of_a_step(model, (5, 6))) for _ in range(2)][-1]  # the first takes DoRA's norms
    sums = GradientSums(made)
    with sums.collecting():
        found = [sum(of_a_step(model, (5, 6), sums.end_micro_batch)) - alone for _ in range(3)]
    assert found == [2 * len(made), len(made), len(made)]
    sums.finish()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

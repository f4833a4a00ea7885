"""Parameters and gradients of a page in one piece: the same bits, fewer launches, nothing of it left over.

A CPU stands for the card: `pages.FLAT` names where pages are laid out.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import tiny
import torch
import transformers
from launches import Launches
from optimizers import OPTIONS, groups, parameters, same, same_state
from safetensors.torch import load_file, save_file

import qlora
from qlora.data.batch import pack
from qlora.layers.loss import loss_sum
from qlora.optim import pages
from qlora.train.step import optimizer_step


@pytest.fixture
def flat(monkeypatch):
    monkeypatch.setattr(pages, "FLAT", ("cpu",))


def even(count: int = 14, elements: int = 64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(elements // 8, 8, generator=generator)) for _ in range(count)]


def backward(params: list[torch.nn.Parameter], seed: int, left_out: tuple[int, ...] = ()) -> None:
    """A micro-batch: a gradient for each parameter but some."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for number, p in enumerate(params):
        weights = torch.randn(p.shape, generator=generator)
        if number not in left_out:
            total = total + (p.to(torch.float32) * weights).sum()
    total.backward()


def steps(params: list, made, count: int = 4, **options) -> qlora.PagedAdamW:
    """Of three micro-batches each. Now and then a parameter has no gradient, in all of them or in the first."""
    optimizer = qlora.PagedAdamW(made, **OPTIONS, **options)
    for step in range(count):
        optimizer.zero_grad()
        with optimizer.summing() as after:
            for i in range(3):
                backward(params, 3 * step + i, () if step == 0 else (step, 7) if i == 0 else (step,))
                after()
        optimizer.step(prepared=optimizer.prepare(), scale=0.3)
    return optimizer


@pytest.mark.parametrize("state", ["float32", "8bit"])
@pytest.mark.parametrize("kind", ["odd", "even", "large"])
def test_the_bits_are_those_of_parameters_by_themselves(monkeypatch, kind, state):
    """Odd ones, of which some pages are left as they are, and a transposed one; larger ones than a page."""
    monkeypatch.setattr(pages, "PAGE", 600 if kind == "large" else 1 << 20)
    ends = []
    for there in ((), ("cpu",)):
        monkeypatch.setattr(pages, "FLAT", there)
        params = parameters() if kind == "odd" else even(elements=1024 if kind == "large" else 256)
        optimizer = steps(params, groups(params), state=state)
        ends.append((params, optimizer))
    (params, expected), (others, found) = ends
    assert same(params, others) and same_state(expected.state_dict(), found.state_dict())
    assert any(p.data_ptr() - others[0].data_ptr() == others[0].nbytes for p in others) == (kind == "even")


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_a_page_is_one_launch(flat, state):
    """To update; and a micro-batch's gradients are added to the sums by one, however many parameters there are."""
    params = even()
    optimizer = qlora.PagedAdamW(params, state=state)
    for micro_batches in (1, 4):
        optimizer.zero_grad()
        with optimizer.summing() as after:
            for i in range(micro_batches):
                with Launches() as launches:
                    backward(params, i)
                    alone = launches.found.total()
                    after()
                taken = launches.found["_foreach_copy_"], launches.found["_foreach_add_"]
                assert taken == ((1, 0) if i == 0 else (0, 1)) and launches.found.total() - alone <= 1
                assert launches.found["add_"] == 0
        ((_, (run,)),) = optimizer.prepare().work
        assert [p.shape for p in run.parameters] == [g.shape for g in run.gradients] == [(run.stop - run.start,)]
        assert run.stop >= 14 * 64
        assert run.parameters[0].data_ptr() == params[0].data_ptr()
        assert run.gradients[0].data_ptr() == params[0].grad.data_ptr()
        optimizer.step()


def test_gradients_of_a_page_go_when_they_are_all_there(flat, monkeypatch):
    """In the backward pass, not behind it: two pages of new ones at most are there at once."""
    monkeypatch.setattr(pages, "PAGE", 128)
    params, held, most = even(), set(), []
    optimizer = qlora.PagedAdamW(params)

    def came(p):
        held.add(p)
        most.append(sum(q.grad is not None for q in held))

    hooks = [p.register_post_accumulate_grad_hook(came) for p in params]
    with optimizer.summing() as after:
        for _ in range(2):
            chain = torch.ones(8, 8)
            for p in params:
                chain = torch.tanh(chain @ p.view(8, 8))
            chain.sum().backward()
            after()
    for hook in hooks:
        hook.remove()
    assert max(most) <= 4 and all(p.grad is not None for p in params)


def test_what_is_in_one_piece_is_saved_and_moved_as_ever(flat, tmp_path):
    """A file holds the tensors; a parameter that is put elsewhere is updated there; sums go with the gradients."""
    params = even()
    optimizer = steps(params, params, count=1)
    sums = weakref.ref(params[0].grad._base)
    tensors = {str(i): p.detach() for i, p in enumerate(params)}
    save_file(tensors, tmp_path / "p.safetensors")
    saved = load_file(tmp_path / "p.safetensors")
    assert same([saved[name] for name in tensors], params)
    optimizer.zero_grad()
    gc.collect()
    assert sums() is None
    params[3].data = params[3].data.clone()
    before, version = params[3].detach().clone(), params[0]._version
    with optimizer.summing() as after:
        backward(params, 1)
        after()
    optimizer.step()
    assert not torch.equal(params[3], before)
    assert params[0]._version > version  # or autograd would not see that it was written


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_steps_of_a_model_are_the_same(monkeypatch, method):
    """Its losses too, and so DoRA's norms."""
    batches, ends = [pack([example]) for example in tiny.examples(*tiny.UNEVEN)], []
    for there in ((), ("cpu",)):
        monkeypatch.setattr(pages, "FLAT", there)
        model = tiny.adapted(tiny.llama(), method).train()
        optimizer = qlora.PagedAdamW(qlora.adapter_parameters(model))
        metrics = [optimizer_step(model, optimizer, batches, rate=0.05, clip=1.0) for _ in range(3)]
        ends.append((metrics, tiny.tensors(model)))
    (expected, before), (found, after) = ends
    assert found == expected and same(before.values(), after.values())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_beside_their_sums_take_what_a_plan_counts(flat, monkeypatch, method):
    """Looked at whenever a gradient comes, in the first micro-batch and in the next."""
    monkeypatch.setattr(pages, "PAGE", 1200)
    shape = tiny.SMALL | {"num_hidden_layers": 6, "intermediate_size": 192}
    model = tiny.adapted(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)), method).train()
    params = qlora.adapter_parameters(model)
    optimizer, most = qlora.PagedAdamW(params, **OPTIONS), [0, 0]
    batches = [pack([example]) for example in tiny.examples(*tiny.UNEVEN)][:2]
    for number in range(2):
        hooks = [
            p.register_post_accumulate_grad_hook(
                lambda _, number=number: most.__setitem__(
                    number, max(most[number], sum(q.grad.nbytes for q in params if q.grad is not None))
                )
            )
            for p in params
        ]
        optimizer.zero_grad()
        with optimizer.summing() as after:
            for batch in batches[: number + 1]:
                loss_sum(model, batch).backward()
                after()
        for hook in hooks:
            hook.remove()
    counted = pages.waiting_bytes([p.numel() for p in params], "float32", 6, method == "dora")
    assert counted < sum(p.nbytes for p in params) / 2
    assert len(optimizer._moments.pages) > 4 and all(page.flat is not None for page in optimizer._moments.pages)
    assert counted / 4 < max(most) <= counted


@pytest.mark.parametrize("fails_at", [1, 3, 7, 20])
def test_memory_that_runs_out_amid_summing_loses_and_doubles_no_gradient(flat, monkeypatch, fails_at):
    """Where a page's sums are made, in the first micro-batch, and anywhere in the second: the step is taken again."""
    monkeypatch.setattr(pages, "PAGE", 1200)
    batches, ends, made = [pack([example]) for example in tiny.examples(*tiny.UNEVEN)], [], []

    def counted(function):
        def call(*arguments, **options):
            made.append(function.__name__)
            if len(made) == fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(*arguments, **options)

        return call

    for fails in (False, True):
        model = tiny.adapted(tiny.llama(), "dora").train()
        optimizer = qlora.PagedAdamW(qlora.adapter_parameters(model))
        with monkeypatch.context() as patch:
            if fails:  # what allocates for sums, and what adds to them
                patch.setattr(torch, "zeros_like", counted(torch.zeros_like))
                patch.setattr(torch, "_foreach_add_", counted(torch._foreach_add_))
            metrics = [optimizer_step(model, optimizer, batches, rate=0.05, clip=1.0) for _ in range(2)]
        ends.append((metrics, tiny.tensors(model), [p.grad.clone() for p in qlora.adapter_parameters(model)]))
    (expected, before, gradients), (found, after, again) = ends
    assert len(made) > fails_at and optimizer.pager.spilled > 0
    assert ("_foreach_add_" in made[:fails_at]) == (fails_at == 20)
    assert found == expected and same(before.values(), after.values()) and same(gradients, again)


def test_memory_that_runs_out_for_good_amid_summing_changes_nothing(flat, monkeypatch):
    """Nothing to give back: one line, no half-summed gradient, and nothing that listens to the next backward pass."""
    batches = [pack([example]) for example in tiny.examples(*tiny.UNEVEN)]
    model = tiny.adapted(tiny.llama(), "lora").train()
    params = qlora.adapter_parameters(model)
    optimizer = qlora.PagedAdamW(params, memory="all")
    before = [p.detach().clone() for p in params]

    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_add_", fails)  # the second micro-batch's
        with pytest.raises(qlora.UserError, match="an allocation failed at step 1: CUDA out of memory"):
            optimizer_step(model, optimizer, batches, rate=0.05, clip=1.0)
    assert same(before, params) and all(p.grad is None and not p._post_accumulate_grad_hooks for p in params)
    other = tiny.adapted(tiny.llama(), "lora").train()
    steps = [
        optimizer_step(m, o, batches, rate=0.05, clip=1.0)
        for m, o in ((model, optimizer), (other, qlora.PagedAdamW(qlora.adapter_parameters(other))))
    ]
    assert steps[0] == steps[1] and same(tiny.tensors(model).values(), tiny.tensors(other).values())

"""PagedAdamW: torch's AdamW to the bit under any budget, 8-bit state, what it refuses, and its place in training. Its
memory: test_optim_memory.py.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from optimizers import OPTIONS, gradients, groups, parameters, same, same_state
from tiny import UNEVEN, examples
from torch.optim.lr_scheduler import LambdaLR

import qlora
from qlora.data.batch import pack
from qlora.errors import UserError
from qlora.layers.attach import adapter_parameters
from qlora.optim.adamw import PagedAdamW
from qlora.optim.pages import BLOCK, state_bytes
from qlora.train.step import optimizer_step


def torch_adamw(params) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(params), foreach=False, fused=False, **OPTIONS)


def share_of_state(share: float) -> int:
    return int(share * sum(state_bytes([p.numel() for p in parameters()])))


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_torch_to_the_bit_over_200_steps(small_pages, tmp_path, share):
    """With clipping, a schedule, decay and groups, through saving, loading, and a change of budget in between."""
    theirs, ours = parameters(), parameters()
    reference = torch_adamw(theirs)
    optimizer = PagedAdamW(groups(ours), memory=share_of_state(share), folder=tmp_path, **OPTIONS)
    assert (optimizer.pager.spilled == 0) == (share == 1) and (optimizer.pager.resident == 0) == (share == 0)

    def schedule(o):
        return LambdaLR(o, lambda step: 0.5 * (1 + math.cos(math.pi * step / 200)))

    schedules = [schedule(reference), schedule(optimizer)]
    for step in range(200):
        if step in (60, 120):  # stop, save, and go on with another budget
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            kept = schedules[1].state_dict()
            optimizer.close()
            ours = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in ours]
            memory = {60: "none" if share else "all", 120: share_of_state(0.3)}[step]
            optimizer = PagedAdamW(groups(ours), memory=memory, folder=tmp_path, **OPTIONS)
            split = optimizer.pager.resident, optimizer.pager.spilled
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
            assert (optimizer.pager.resident, optimizer.pager.spilled) == split
            schedules[1] = schedule(optimizer)
            schedules[1].load_state_dict(kept)
            for group in optimizer.param_groups:  # making a schedule sets its first rate
                group["lr"] = reference.param_groups[optimizer.param_groups.index(group)]["lr"]
        for params, o, s in ((theirs, reference, schedules[0]), (ours, optimizer, schedules[1])):
            o.zero_grad(set_to_none=step % 2 == 0)
            gradients(params, step)
            o.step()
            s.step()
        assert same(theirs, ours), step
    assert same_state(reference.state_dict(), optimizer.state_dict())
    optimizer.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torch_to_the_bit_too(small_pages, tmp_path, dtype):
    theirs, ours = parameters(dtype), parameters(dtype)
    reference, optimizer = torch_adamw(theirs), PagedAdamW(groups(ours), memory=9000, folder=tmp_path, **OPTIONS)
    for step in range(20):
        for params, o in ((theirs, reference), (ours, optimizer)):
            gradients(params, step)
            o.step()
    assert same(theirs, ours) and same_state(reference.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_a_factor_is_a_multiplication_of_the_gradients(small_pages, tmp_path, state):
    """With the same bits, and the gradients stay as they are."""
    one, two = parameters(), parameters()
    a, b = (PagedAdamW(groups(params), state=state, memory=9000, folder=tmp_path, **OPTIONS) for params in (one, two))
    for step in range(5):
        gradients(one, step), gradients(two, step)
        given = [p.grad for p in two if p.grad is not None]
        before = [g.clone() for g in given]
        torch._foreach_mul_(given, 0.37)
        a.step(scale=0.37)
        b.step()
        assert same(before, [p.grad for p in one if p.grad is not None])
    assert same(one, two) and same_state(a.state_dict(), b.state_dict())


def test_optimizer_step_is_that_of_torch(tmp_path):
    """Our optimizer takes the factor, torch's gets the gradients multiplied: loss, norm and weights are the same, to
    the bit.
    """
    ends = []
    for make in (
        lambda p: PagedAdamW(p, memory="none", folder=tmp_path),
        lambda p: torch.optim.AdamW(p, foreach=False, fused=False),
    ):
        model = tiny.adapted(tiny.llama()).train()
        optimizer = make(adapter_parameters(model))
        batches = [pack(examples(*UNEVEN[:2])), pack(examples(*UNEVEN[2:]))]
        metrics = [optimizer_step(model, optimizer, batches, 1e-2, clip) for clip in (0.0, 1e-3, 1.0)]
        ends.append((metrics, [p.detach() for p in adapter_parameters(model)]))
    assert ends[0][0] == ends[1][0] and same(ends[0][1], ends[1][1])


WITHOUT_FMA = """
import torch
from qlora.optim.adamw import PagedAdamW
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
def values(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))
made = [[torch.nn.Parameter(values(n, n)) for n in (1, 100, 5000)] for _ in "ab"]
optimizers = torch.optim.AdamW(made[0], foreach=False, fused=False), PagedAdamW(made[1])
for step in range(5):
    for params, optimizer in zip(made, optimizers):
        for p in params:
            p.grad = values(p.shape, step)
        optimizer.step()
print(all(torch.equal(p, q) for p, q in zip(*made)))
"""


def test_torch_to_the_bit_where_it_rounds_twice():
    """On a processor without AVX2, torch's own kernels round products before they are added."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FMA],
        capture_output=True,
        text=True,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
    )
    assert done.stdout.split() == ["True"], done.stderr


def test_pages_of_the_real_size(tmp_path):
    """A matrix over several pages between small tensors, with the threads that torch takes."""
    for threads in (1, torch.get_num_threads()):
        made = [
            [
                torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
                for shape in ((5,), (1100, 1000), (99, 99))
            ]
            for _ in "ab"
        ]
        reference = torch.optim.AdamW(made[0], foreach=False, fused=False)
        optimizer = PagedAdamW(made[1], memory="none", folder=tmp_path)
        before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
        for step in range(4):
            for params, o in zip(made, (reference, optimizer), strict=True):
                gradients(params, step)
                o.step()
        torch.set_num_threads(before)
        assert same(*made)


def test_a_group_added_later_and_a_parameter_thawed_later(small_pages, tmp_path):
    theirs, ours = parameters(), parameters()
    optimizers = []
    for params, make in (
        (theirs, lambda p: torch.optim.AdamW(p, foreach=False, fused=False)),
        (ours, lambda p: PagedAdamW(p, memory="none", folder=tmp_path)),
    ):
        params[0].requires_grad_(False)
        o = make(params[:5])
        for step in range(9):
            if step == 3:
                o.add_param_group({"params": params[5:], "lr": 0.1})
            if step == 6:
                params[0].requires_grad_(True)
            gradients(params, step)
            params[0].grad = params[0].grad if step >= 6 else None
            o.step()
        optimizers.append(o)
    assert same(theirs, ours) and same_state(*(o.state_dict() for o in optimizers))


def test_states_are_exchanged_with_torch(small_pages, tmp_path):
    """Either way, and the steps after that are the same."""
    theirs, ours = parameters(), parameters()
    one, two = torch_adamw(theirs), PagedAdamW(groups(ours), memory=20_000, folder=tmp_path, **OPTIONS)

    def go(steps: range) -> None:
        for step in steps:
            for params, o in ((theirs, one), (ours, two)):
                gradients(params, step)
                o.step()

    go(range(5))
    a, b = copy.deepcopy(one.state_dict()), copy.deepcopy(two.state_dict())
    one, two = torch_adamw(theirs), PagedAdamW(groups(ours), memory="none", folder=tmp_path, **OPTIONS)
    one.load_state_dict(b), two.load_state_dict(a)
    go(range(5, 10))
    assert same(theirs, ours) and same_state(one.state_dict(), two.state_dict())


def test_a_state_loads_into_where_it_came_from(small_pages, tmp_path):
    """A state_dict is the state itself, so this copies everything onto itself. accelerate does it."""
    params = parameters()
    optimizer = PagedAdamW(params, memory=20_000, folder=tmp_path)
    gradients(params, 1)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert same_state(before, optimizer.state_dict())


def test_a_closure(tmp_path):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = PagedAdamW([p], lr=0.1)

    def loss():
        optimizer.zero_grad()
        value = (p**2).sum()
        value.backward()
        return value

    assert optimizer.step(loss).item() == 3 and optimizer.step(loss).item() < 3


# ---------------------------------------------------------------- 8 bits


def test_8bit_is_near_and_saves_to_the_bit(small_pages, tmp_path):
    full, eight = parameters(), parameters()
    reference = PagedAdamW(groups(full), **OPTIONS)
    optimizer = PagedAdamW(groups(eight), memory="none", state="8bit", folder=tmp_path, **OPTIONS)
    start = [p.detach().clone() for p in full]

    def go(steps: range) -> None:
        for step in steps:
            for params, o in ((full, reference), (eight, optimizer)):
                gradients(params, step)
                o.step()

    go(range(30))
    for p, q, s in zip(full, eight, start, strict=True):
        assert (p - q).norm() <= 0.1 * (p - s).norm()
    packed = copy.deepcopy(optimizer.state_dict())
    assert packed["state"][0]["exp_avg"].dtype == torch.uint8 and packed["state"][4]["exp_avg_absmax"].shape == (
        -(-11000 // BLOCK),
    )
    other = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in eight]
    resumed = PagedAdamW(groups(other), memory=12_000, state="8bit", folder=tmp_path, **OPTIONS)
    resumed.load_state_dict(packed)
    assert same_state(packed, resumed.state_dict())
    go(range(30, 40))
    for step in range(30, 40):
        gradients(other, step)
        resumed.step()
    assert same(eight, other) and same_state(optimizer.state_dict(), resumed.state_dict())


def test_8bit_codes_are_the_nearest(tmp_path):
    """One step from zero: m = (1 - b1) g and v = (1 - b2) g^2, each at the nearest value of its map times its block's
    largest.
    """
    from bitsandbytes.functional import create_dynamic_map

    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = PagedAdamW([p], state="8bit", betas=(0.9, 0.99))
    p.grad = torch.randn(1000) * 10.0 ** torch.randint(-6, 2, (1000,))
    p.grad[:300] = 0
    optimizer.step()
    entry = optimizer.state_dict()["state"][0]
    for name, moment, signed in (("exp_avg", 0.1 * p.grad, True), ("exp_avg_sq", 0.01 * p.grad**2, False)):
        blocks = torch.nn.functional.pad(moment.double(), (0, 24)).view(4, BLOCK)
        largest = blocks.abs().amax(1)
        torch.testing.assert_close(entry[f"{name}_absmax"].double(), largest, rtol=1e-5, atol=0)
        levels = create_dynamic_map(signed).double()
        codes = torch.nn.functional.pad(entry[name].long(), (0, 24)).view(4, BLOCK)
        scaled = blocks / largest.clamp_min(1e-300).unsqueeze(1)
        distance = (levels[codes] - scaled).abs()
        least = (levels - scaled.unsqueeze(2)).abs().amin(2)
        known = (distance <= least + 1e-6) | (codes == 1) & (scaled > 0) & (not signed)
        assert known.view(-1)[:1000].all()
    assert (entry["exp_avg_sq"][300:] > 0).all() and (entry["exp_avg_sq"][:256] == 0).all()
    assert p[300:].abs().max() < 0.01 and (p[:300] == 0).all()


def test_8bit_of_16_bit_parameters(small_pages):
    wide, narrow = parameters(), parameters(torch.bfloat16)
    optimizers = [PagedAdamW(params, state="8bit", lr=1e-2) for params in (wide, narrow)]
    for step in range(5):
        for params, o in zip((wide, narrow), optimizers, strict=True):
            gradients(params, step)
            o.step()
    for p, q in zip(wide, narrow, strict=True):
        torch.testing.assert_close(p.bfloat16(), q, rtol=0.03, atol=0.03)


# ---------------------------------------------------------------- what is refused


def test_wrong_arguments_are_told_at_once(tmp_path):
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError) as error:
        PagedAdamW([p], lr=-1, betas=(0.9, 1.0), eps=-1, weight_decay=-1, memory="lots", state="4bit")
    assert [line.split("=")[0] for line in error.value.problems] == [
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "state",
        "memory",
    ]
    with pytest.raises(UserError, match="dense tensors of floating-point"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(UserError, match="lies on"):
        PagedAdamW([p, torch.nn.Parameter(torch.zeros(3, device="meta"))])
    with pytest.raises(ValueError, match="empty parameter list"):
        PagedAdamW([])


def test_it_cannot_be_copied():
    optimizer = PagedAdamW([torch.nn.Parameter(torch.zeros(3))])
    for act in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(UserError, match="no copy"):
            act(optimizer)


def test_states_that_do_not_fit():
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]

    def stepped(make):
        o = make(params)
        for p in params:
            p.grad = torch.ones_like(p)
        o.step()
        return o

    ours, eight = stepped(PagedAdamW), stepped(lambda p: PagedAdamW(p, state="8bit"))
    before = copy.deepcopy(ours.state_dict())

    def refused(optimizer, state: dict) -> list[str]:
        with pytest.raises(UserError) as error:
            optimizer.load_state_dict(state)
        return error.value.problems

    assert len(refused(ours, eight.state_dict())) == len(refused(eight, ours.state_dict())) == 2
    assert "groups of [1]" in refused(ours, stepped(lambda p: torch.optim.AdamW(p[:1])).state_dict())[0]
    assert "amsgrad" in refused(ours, stepped(lambda p: torch.optim.AdamW(p, amsgrad=True)).state_dict())[0]
    assert len(refused(ours, stepped(torch.optim.SGD).state_dict() | {"state": {0: {"momentum": torch.ones(3)}}})) == 1
    turned = copy.deepcopy(before)
    turned["state"][1]["exp_avg"] = torch.zeros(4)
    assert "parameter 1" in refused(ours, turned)[0]
    assert same_state(before, ours.state_dict())


# ---------------------------------------------------------------- in its places


def test_the_default_optimizer_of_finetune(tmp_path):
    assert qlora.PagedAdamW is PagedAdamW
    tiny.write_model(tmp_path / "model")
    tiny.write_data(tmp_path / "data.jsonl")
    from qlora.run.optimizer import adapter_optimizer

    config = qlora.FinetuneConfig(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "data.jsonl"),
        output=str(tmp_path),
        optimizer_memory="none",
        optimizer_state="8bit",
    )
    optimizer = adapter_optimizer(tiny.adapted(tiny.llama()), config.optimizer(), tmp_path)
    assert type(optimizer) is PagedAdamW and optimizer.pager.resident == 0 < optimizer.pager.spilled
    assert optimizer.pager.spilled == sum(
        state_bytes([p.numel() for g in optimizer.param_groups for p in g["params"]], "8bit")
    )


def test_8bit_trains_the_real_model_as_well(tmp_path):
    """SmolLM2 on the tickets: after the same steps on the same batches, the loss with 8-bit state is within 2 % of the
    one with float32.
    """
    data = Path(__file__).parents[2] / "scripts/data"
    held_out = (data / "tickets_test.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "held_out.jsonl").write_text("".join(held_out))
    losses = []
    for state in ("float32", "8bit"):
        result = qlora.finetune(
            qlora.FinetuneConfig(
                model="smollm2-135m",
                data=str(data / "tickets_train.jsonl"),
                eval_data=str(tmp_path / "held_out.jsonl"),
                output=str(tmp_path / state),
                steps=8,
                batch_size=2,
                learning_rate=1e-3,
                warmup=2,
                max_tokens=160,
                optimizer_state=state,
                adapter_init="zero",
            )
        )
        losses.append(result.eval_loss_after)
        assert result.eval_loss_after < 0.8 * result.eval_loss_before
    assert losses[1] == pytest.approx(losses[0], rel=0.02)

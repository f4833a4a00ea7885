"""The loop: one step is one step however it is cut, schedules in closed form, metrics, interruption."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import UNEVEN, by_transformers, examples
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from qlora.data.batch import Example, pack
from qlora.errors import UserError
from qlora.evaluate import evaluate
from qlora.layers.attach import adapter_parameters
from qlora.layers.forward import target_logits
from qlora.layers.forward_mode import choose_forward_mode
from qlora.layers.loss import loss_sum
from qlora.train.loop import Schedule, train
from qlora.train.memory import PeakMemory, anonymous_memory
from qlora.train.metrics import MetricsLog, Totals, cut_back, duration
from qlora.train.signals import Interrupted, exit_code
from qlora.train.step import accumulate, checkpoint_activations, learning_rate, optimizer_step
from qlora_kernels import backends


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in adapter_parameters(model)]


def sgd(model: torch.nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(adapter_parameters(model), lr=0.1, **options)


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("cut", [(1, 1, 1, 1), (2, 2), (3, 1)])
def test_accumulated_micro_batches_are_the_whole_batch(cut):
    model = tiny.adapted(tiny.llama())
    data = examples(*UNEVEN)
    whole = accumulate(model, [pack(data)])
    expected = gradients(model)
    model.zero_grad()
    rest = iter(data)
    parts = [pack([next(rest) for _ in range(size)]) for size in cut]
    assert accumulate(model, parts).item() == pytest.approx(whole.item(), rel=1e-6)
    for got, want in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_a_mean_of_means_would_be_another_gradient():
    """The data of the test above tells the two apart."""
    model = tiny.adapted(tiny.llama())
    data = examples(*UNEVEN)
    batch = pack(data)
    accumulate(model, [batch])
    right = torch.cat([g.flatten() for g in gradients(model)]) / batch.target_tokens
    model.zero_grad()
    for example in data:
        (loss_sum(model, pack([example])) / sum(example.loss_mask) / len(data)).backward()
    wrong = torch.cat([g.flatten() for g in gradients(model)])
    assert (right - wrong).norm() > 0.2 * right.norm()


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_loss_is_that_of_transformers(build):
    model = tiny.adapted(build()).eval()
    batch = pack(examples(*UNEVEN))
    expected = by_transformers(model, batch) / batch.target_tokens
    assert batch.target_tokens == 30
    torch.testing.assert_close(loss_sum(model, batch) / batch.target_tokens, expected, rtol=1e-6, atol=1e-6)


def test_the_head_runs_only_where_there_are_targets():
    model = tiny.llama()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    logits, tokens = target_logits(model, pack(examples((40, 3), (40, 2))))
    assert seen == [3] and logits.shape == (5, 320) and tokens.shape == (5,)


@pytest.mark.parametrize("packing", ["on", "off"])
def test_padding_does_not_matter(packing):
    model = tiny.adapted(tiny.llama())
    choose_forward_mode(model, packing)
    data = examples(*UNEVEN)
    data.append(dataclasses.replace(data[0], input_ids=(0,) * 30))  # what fills the rectangle is a token like others
    one = torch.stack([loss_sum(model, pack([example])) for example in data]).sum()
    torch.testing.assert_close(loss_sum(model, pack(data)), one, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory():
    """Dropout included: a recomputed layer draws the same mask."""
    found = []
    for checkpointing in (False, True):
        model = tiny.adapted(tiny.llama(), dropout=0.3).train()
        if checkpointing:
            checkpoint_activations(model)
        torch.manual_seed(5)
        accumulate(model, [pack(examples(*UNEVEN))])
        found.append(gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_clipping():
    model = tiny.adapted(tiny.llama())
    batches = [pack(examples(*UNEVEN))]
    before = tiny.tensors(model)
    free = optimizer_step(model, sgd(model), batches, rate=1.0, clip=0.0)
    moved = math.sqrt(sum((p - before[n]).square().sum().item() for n, p in tiny.tensors(model).items()))
    assert moved == pytest.approx(free["grad_norm"], rel=1e-4)

    model = tiny.adapted(tiny.llama())
    clipped = optimizer_step(model, sgd(model), batches, rate=1.0, clip=0.01)
    moved = math.sqrt(sum((p - before[n]).square().sum().item() for n, p in tiny.tensors(model).items()))
    assert moved == pytest.approx(0.01, rel=1e-2)
    assert clipped["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-6)  # the norm before clipping


@pytest.mark.parametrize("spoiled", ["loss", "grad_norm"])
def test_a_step_that_is_no_number_is_not_taken(spoiled):
    model = tiny.adapted(tiny.llama())
    if spoiled == "loss":
        model.model.norm.weight.data[3] = math.nan
    else:  # a finite loss whose gradient overflows
        parameter = adapter_parameters(model)[0]
        parameter.register_hook(lambda gradient: gradient * math.inf)
    before = tiny.tensors(model)
    with pytest.raises(UserError, match=rf"{spoiled}=(nan|inf): is no finite number at step 13\."):
        optimizer_step(model, sgd(model), [pack(examples(*UNEVEN))], rate=0.1, clip=1.0, step=12)
    assert all(torch.equal(p, before[n]) for n, p in tiny.tensors(model).items())


@pytest.mark.parametrize("warmup", [0, 1, 7, 30])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_are_those_of_transformers(schedule, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    theirs = {
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, 30),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, 30),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
    }[schedule]()
    for step in range(30):
        assert learning_rate(step, 30, 3e-3, warmup, schedule) == pytest.approx(
            theirs.get_last_lr()[0], rel=1e-12, abs=1e-18
        )
        optimizer.step()
        theirs.step()


def test_unknown_schedule():
    with pytest.raises(UserError, match="schedule=square: must be cosine, linear or constant"):
        learning_rate(0, 10, 1.0, 0, "square")


# ---------------------------------------------------------------- the loop


NINE = Schedule(9, lambda step: 0.1)


def run(model, tmp_path, steps=4, eval_every=0, save_every=0, **hooks) -> list[dict]:
    """Train on one uneven batch a step and return the lines of metrics.jsonl."""
    schedule = Schedule(steps, lambda step: 0.1 / (step + 1), eval_every=eval_every, save_every=save_every)
    data = examples(*UNEVEN)
    with MetricsLog(tmp_path / "metrics.jsonl", steps=steps) as log:
        train(model, sgd(model), lambda step: [pack(data[:2]), pack(data[2:])], schedule, log=log, **hooks)
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_metrics(tmp_path):
    model = tiny.adapted(tiny.llama())
    data = examples(*UNEVEN, seed=9)
    lines = run(
        model, tmp_path, steps=5, evaluate=lambda check: evaluate(model, data, before_batch=check).loss, eval_every=2
    )
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 5]
    assert lines[-1]["eval_loss"] == pytest.approx(evaluate(model, data).loss, rel=1e-6)
    for line in lines[1:]:
        assert {"step", "loss", "tokens", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes"} == set(
            line
        ) - {"eval_loss"}
        assert line["tokens"] == 30 + 9 + 17 + 25
        assert line["learning_rate"] == 0.1 / line["step"]
        assert 50e6 < line["memory_bytes"] < 50e9
    assert lines[-1]["loss"] < lines[1]["loss"]


def test_evaluation_is_not_felt(tmp_path):
    """With dropout: a run that evaluates after every step ends in the same bits as one that never does."""
    ends = []
    for every in (0, 1):
        (tmp_path / str(every)).mkdir()
        model = tiny.adapted(tiny.llama(), dropout=0.2)
        torch.manual_seed(3)
        look = functools.partial(evaluate, model, examples(*UNEVEN, seed=9))
        run(
            model,
            tmp_path / str(every),
            evaluate=(lambda check, look=look: look().loss) if every else None,
            eval_every=every,
        )
        assert model.training
        ends.append(tiny.tensors(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(("every", "saved"), [(0, [5]), (2, [2, 4, 5]), (5, [5])])
def test_when_checkpoints_are_saved(tmp_path, every, saved):
    steps = []
    run(tiny.adapted(tiny.llama()), tmp_path, steps=5, save=steps.append, save_every=every)
    assert steps == saved


def test_checkpoints_by_time(tmp_path):
    """As soon as time has passed since the last one, whoever asked for that; 0 is never."""
    model, saved = tiny.adapted(tiny.llama()), []
    schedule = dataclasses.replace(NINE, save_every=4)
    for seconds, expected in ((1e-9, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (3600.0, [4, 8, 9]), (0.0, [4, 8, 9])):
        saved.clear()
        timed = dataclasses.replace(schedule, save_seconds=seconds)
        train(model, sgd(model), lambda step: [pack(examples((9, 2)))], timed, log=lambda line: None, save=saved.append)
        assert saved == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    model, saved = tiny.adapted(tiny.llama()), []

    def batches(step):
        if step == 2:
            os.kill(os.getpid(), number)
        return [pack(examples(*UNEVEN))]

    before = signal.getsignal(number)
    lines = []
    with pytest.raises(Interrupted) as stop:
        train(model, sgd(model), batches, NINE, log=lines.append, save=saved.append)
    assert stop.value.step == 3 and saved == [3] and [line["step"] for line in lines] == [1, 2, 3]
    assert isinstance(stop.value, KeyboardInterrupt) and exit_code(stop.value) == 128 + number
    assert signal.getsignal(number) == before


def test_a_second_signal_stops_at_once(tmp_path):
    model, saved = tiny.adapted(tiny.llama()), []

    def batches(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return [pack(examples(*UNEVEN))]

    with pytest.raises(KeyboardInterrupt) as stop:
        train(model, sgd(model), batches, NINE, log=saved.append, save=saved.append)
    assert not isinstance(stop.value, Interrupted) and saved == []


def test_an_ignored_signal_stays_ignored():
    """As of a run behind a shell, whose Ctrl-C is not meant for it; SIGTERM stops it as ever."""
    model, saved = tiny.adapted(tiny.llama()), []

    def batches(step):
        signal.raise_signal(signal.SIGINT)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return [pack(examples(*UNEVEN))]

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(Interrupted) as stop:
            train(model, sgd(model), batches, NINE, log=lambda line: None, save=saved.append)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.step == 5 and saved == [5]


def test_a_limit_gives_freed_memory_back():
    """Freed blocks below one that stays, which glibc keeps: a process that comes near its limit returns them."""
    blocks = [torch.empty(100_000, dtype=torch.uint8).fill_(1) for _ in range(1000)]
    stays, full = blocks.pop(), anonymous_memory()
    blocks.clear()
    before = anonymous_memory()
    with PeakMemory(torch.device("cpu"), limit=10**12):  # far away
        time.sleep(0.2)
        assert before - anonymous_memory() < 30e6
    with PeakMemory(torch.device("cpu"), limit=before) as memory:
        for _ in range(100):
            time.sleep(0.05)
            if full - anonymous_memory() > 80e6:
                break
        assert full - anonymous_memory() > 80e6 and memory.peak() <= full + 10e6
    assert stays.sum() == 100_000


def test_memory_kept_for_the_next_step_goes_back_after_the_last():
    like = torch.empty(0)
    kept = [backends.empty(1 << 22, like=like).fill_(1) for _ in range(5)]
    full = anonymous_memory()
    kept.clear()
    assert full - anonymous_memory() < 30e6
    model = tiny.adapted(tiny.llama())
    train(
        model, sgd(model), lambda step: [pack(examples(*UNEVEN))], Schedule(1, lambda step: 0.1), log=lambda line: None
    )
    assert full - anonymous_memory() > 50e6


FREED = """
import mmap, torch
from qlora.train.memory import PeakMemory
with PeakMemory(torch.device("cpu")) as memory:
    before = memory.peak()
    with mmap.mmap(-1, 200_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:  # of no allocator
        block.write(b"1" * 200_000_000)
        memory._end.wait(0.3)
    assert memory.peak() > before + 150_000_000
"""


def test_peak_memory_sees_what_was_freed():
    """In a process of its own: this one may give back in the meantime what earlier tests freed."""
    subprocess.run([sys.executable, "-c", FREED], check=True)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path / "metrics.jsonl", steps=2, tensorboard=True) as log:
        log({"step": 1, "loss": 1.5, "memory_bytes": 1})
        log({"step": 2, "loss": 1.25, "memory_bytes": 1, "eval_loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.5), (2, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("eval_loss")] == [(2, 2.0)]


def test_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cut_back(path, 3) == Totals() and not path.exists()
    path.write_text("".join(json.dumps({"step": step, "tokens": 2}) + "\n" for step in range(6)) + '{"step": 6, "lo')
    assert cut_back(path, 5) == Totals(tokens=10)
    assert path.read_text().count("\n") == 6 and path.read_text().endswith("\n")
    assert cut_back(path, 2) == Totals(tokens=4) and path.read_text().count("\n") == 3
    assert cut_back(path, -1) == Totals() and path.read_text() == ""


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "lo{"step": 3}', "[]", "7", '{"step": true}', '{"loss": 1.0}', "[" * 9999]
)
def test_a_torn_line_in_the_middle_is_put_aside_and_said(tmp_path, capsys, torn):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "tokens": 2, "loss": float(step)}) for step in range(6)]
    path.write_text("\n".join([*lines[:2], torn, *lines[3:]]) + "\n")
    assert cut_back(path, 4) == Totals(tokens=6, loss=4.0)
    assert path.read_text().splitlines() == [*lines[:2], *lines[3:5]]
    assert (tmp_path / "metrics.torn").read_text() == torn + "\n"
    assert "1 of 6 lines could not be read" in capsys.readouterr().err


def test_metrics_never_follow_a_link(tmp_path):
    foreign, path = tmp_path / "foreign.txt", tmp_path / "metrics.jsonl"
    foreign.write_text("mine\n")
    for target in (foreign, tmp_path / "nowhere"):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        cut_back(path, -1)
        with MetricsLog(path, steps=2) as log:
            log({"step": 1, "memory_bytes": 1})
            path.unlink()
            path.symlink_to(target)  # in mid-run
            log({"step": 2, "memory_bytes": 1})
    assert foreign.read_text() == "mine\n" and not (tmp_path / "nowhere").exists()


def test_metrics_have_no_nan(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", steps=1) as log:
        log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "memory_bytes": 1})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "memory_bytes": 1}


def test_duration():
    assert [duration(seconds) for seconds in (0, 59.6, 61, 3600, 86399)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "23:59:59",
    ]


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("size", [1, 3, 100])
def test_evaluate_is_the_plain_definition(size):
    model = tiny.adapted(tiny.llama()).train()
    data = examples(*UNEVEN, (12, 12), (40, 3))
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for example in data:
            scores = F.log_softmax(model(torch.tensor([list(example.input_ids)])).logits[0].double(), dim=-1)
            for i in range(1, len(example.input_ids)):
                if example.loss_mask[i]:
                    total -= scores[i - 1, example.input_ids[i]].item()
                    right += scores[i - 1].argmax().item() == example.input_ids[i]
                    count += 1
    result = evaluate(model, data, batch_size=size)
    assert result.target_tokens == count
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result.token_accuracy == right / count
    assert model.training


def test_evaluate_needs_targets():
    with pytest.raises(UserError, match="no token counts in the loss"):
        evaluate(tiny.llama(), [Example((1, 2), (False, False))])


def test_an_evaluation_that_is_no_number_is_said():
    model = tiny.adapted(tiny.llama())
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(UserError, match="loss=nan: is no finite number over the data to evaluate on"):
        evaluate(model, examples(*UNEVEN))
    assert not model.training

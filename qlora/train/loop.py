"""The training loop: micro-batches in, optimizer steps out. It knows nn.Module, Optimizer and Batch, and no options.

    for each step:   batches(step) -> optimizer_step (step.py) -> log, now and then evaluate and save

What a step sees is a function of its number (`batches(step)`, `Schedule.rate(step)`), so a resumed run needs no
iterator state. The alternative, a loader with a state of its own, has to be saved, or drawn forward again. Evaluation,
files and terminals are the caller's: `evaluate`, `save` and `log` are functions.

`log` gets one object per step, a line of metrics.jsonl. `tokens` are those of the step, without padding;
`tokens_per_second` leaves evaluation and saving out; `memory_bytes` is the peak so far (`PeakMemory`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora.data.batch import Batch
from qlora.train.memory import PeakMemory
from qlora.train.metrics import Metrics
from qlora.train.signals import Interrupted, StopRequest
from qlora.train.step import optimizer_step


@dataclass(frozen=True)
class Schedule:
    """When a run does what. Steps are counted from 0, and `first` is the one to begin with.

    `rate(step)` is the learning rate of a step; gradients are clipped to norm `clip` (0: not). The model is evaluated
    after every `eval_every` steps and saved after every `save_every` (0: only after the last).
    """

    steps: int
    rate: Callable[[int], float]
    first: int = 0
    clip: float = 1.0
    eval_every: int = 0
    save_every: int = 0

    def evaluates_after(self, done: int) -> bool:
        """Whether an evaluation follows when `done` steps have been taken."""
        return done == self.steps or bool(self.eval_every and done % self.eval_every == 0)

    def saves_after(self, done: int) -> bool:
        """Whether a checkpoint follows when `done` steps have been taken."""
        return done == self.steps or bool(self.save_every and done % self.save_every == 0)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Sequence[Batch]],
    schedule: Schedule,
    *,
    log: Callable[[Metrics], None],
    evaluate: Callable[[], float] | None = None,
    save: Callable[[int], Any] | None = None,
    memory: PeakMemory | None = None,
) -> None:
    """Take steps `first` to `steps` - 1 of the schedule. On Ctrl-C the step is finished and saved.

    Args:
        batches: the micro-batches of a step.
        log: gets one object per step, and one for step 0 if there is an evaluation before the first step.
        evaluate: the held-out loss.
        save: gets the number of steps taken.
        memory: a peak that is being taken already; None to take it from here on.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, when the checkpoint is written.
        UserError: a loss or gradient that is not finite, or memory ran out.
    """
    watched = nullcontext(memory) if memory else PeakMemory(next(model.parameters()).device)
    with StopRequest() as stop, watched as peak:
        if evaluate is not None and schedule.first == 0:
            log({"step": 0, "tokens": 0, "eval_loss": evaluate(), "memory_bytes": peak.peak()})
        model.train()
        for done in range(schedule.first + 1, schedule.steps + 1):
            if stop.requested:  # during the first evaluation, or before any step
                raise Interrupted(done - 1)
            line = {"step": done, **_timed_step(model, optimizer, batches, schedule, done - 1)}
            line["memory_bytes"] = peak.peak()
            if evaluate is not None and schedule.evaluates_after(done):
                line["eval_loss"] = evaluate()
            log(line)
            interrupted = stop.requested and done < schedule.steps
            if save is not None and (interrupted or schedule.saves_after(done)):
                save(done)
            if interrupted:
                raise Interrupted(done)


def _timed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Sequence[Batch]],
    schedule: Schedule,
    step: int,
) -> Metrics:
    began, rate = time.perf_counter(), schedule.rate(step)
    micro = batches(step)
    found = optimizer_step(model, optimizer, micro, rate, schedule.clip, step)
    tokens = sum(batch.tokens for batch in micro)
    line = {"loss": found["loss"], "tokens": tokens, "learning_rate": rate, "grad_norm": found["grad_norm"]}
    return {**line, "tokens_per_second": tokens / (time.perf_counter() - began)}

"""The training loop: micro-batches in, optimizer steps out. It knows nn.Module, Optimizer and Batch, and no options.

    for each step:   batches(step) -> optimizer_step (step.py) -> log, now and then evaluate and save

What a step sees is a function of its number (`batches(step)`, `Schedule.rate(step)`), so a resumed run needs no
iterator state. The alternative, a loader with a state of its own, has to be saved, or drawn forward again. Evaluation,
files and terminals are the caller's: `evaluate`, `save` and `log` are functions.

`log` gets one object per step, a line of metrics.jsonl. `tokens` are those of the step, without padding;
`tokens_per_second` leaves evaluation and saving out; `memory_bytes` is the peak so far (`PeakMemory`). A step whose
update was left out (`Schedule.skips`) has `skipped: true` and no loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qlora.data.batch import Batch
from qlora.errors import UserError
from qlora.train.memory import PeakMemory, return_freed_memory
from qlora.train.metrics import Metrics, Totals
from qlora.train.signals import Interrupted, Stopped, StopRequest
from qlora.train.step import NotFinite, optimizer_step

MOST_SKIPPED = 10  # steps in a row: more of them are no accident


@dataclass(frozen=True)
class Schedule:
    """When a run does what. Steps are counted from 0, and `first` is the one to begin with.

    `rate(step)` is the learning rate of a step; gradients are clipped to norm `clip` (0: not). The model is evaluated
    after every `eval_every` steps and saved after every `save_every` (0: only after the last), and whenever
    `save_seconds` have passed since it was last saved (0: not by time).

    `skips`: a step whose loss or gradient is not finite is left out, unless more than `MOST_SKIPPED` come in a row
    (`skipped` of them before step `first`). Otherwise it ends the run. `owed`: the line of step `first`, whose
    evaluation a signal stopped.
    """

    steps: int
    rate: Callable[[int], float]
    first: int = 0
    clip: float = 1.0
    eval_every: int = 0
    save_every: int = 0
    save_seconds: float = 0.0
    skips: bool = False
    skipped: int = 0
    owed: Metrics | None = None

    def after(self, first: int, totals: Totals) -> Schedule:
        """The rest of the schedule, when `first` steps have been taken and their lines come to `totals`."""
        return replace(self, first=first, skipped=totals.skipped_in_a_row, owed=totals.owed)

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
    evaluate: Callable[[Callable[[], None]], float] | None = None,
    save: Callable[[int], Any] | None = None,
    memory: PeakMemory | None = None,
) -> None:
    """Take steps `first` to `steps` - 1 of the schedule. On Ctrl-C the step is finished and saved.

    Args:
        batches: the micro-batches of a step.
        log: gets one object per step, and one for step 0 if there is an evaluation before the first step.
        evaluate: the held-out loss; it calls what it gets now and then, and lets through what that raises.
        save: gets the number of steps taken.
        memory: a peak that is being taken already; None to take it from here on.

    Raises:
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, when the checkpoint is written.
        NotFinite: a loss or gradient is not finite and may not be skipped.
        UserError: memory ran out, or the evaluation failed; the steps before it are saved then.
    """
    watched = nullcontext(memory) if memory else PeakMemory(next(model.parameters()).device)
    skipped = schedule.skipped
    with StopRequest() as stop, watched as peak, _returning_memory():
        before = {"step": 0, "tokens": 0} if schedule.first == 0 else schedule.owed
        if evaluate is not None and before is not None:
            try:
                log(before | {"eval_loss": evaluate(stop.check), "memory_bytes": peak.peak()})
            except Stopped:  # nothing was saved yet, or the line that owes it stands
                raise Interrupted(schedule.first, stop.number) from None
        model.train()
        saved_at = time.monotonic()
        for done in range(schedule.first + 1, schedule.steps + 1):
            if stop.requested:  # during the first evaluation, or before any step
                raise Interrupted(done - 1, stop.number)
            line = {"step": done, **_timed_step(model, optimizer, batches, schedule, done - 1)}
            skipped = skipped + 1 if "skipped" in line else 0
            if skipped > MOST_SKIPPED:
                raise NotFinite("loss", math.nan, done, skippable=False)
            line["memory_bytes"] = peak.peak()
            failed = None
            if evaluate is not None and schedule.evaluates_after(done):
                try:
                    line["eval_loss"] = evaluate(stop.check)
                except Stopped:  # a scheduler waits 30 s and an evaluation may be long: it is made up for on resuming
                    line["eval_loss"] = None
                except UserError as error:
                    failed = error
            log(line)
            interrupted = stop.requested and (done < schedule.steps or line.get("eval_loss", 0.0) is None)
            by_time = bool(schedule.save_seconds) and time.monotonic() - saved_at >= schedule.save_seconds
            if save is not None and (failed or interrupted or by_time or schedule.saves_after(done)):
                save(done)
                saved_at = time.monotonic()
            if failed is not None:
                raise failed
            if interrupted:
                raise Interrupted(done, stop.number)


@contextmanager
def _returning_memory() -> Iterator[None]:
    """A step keeps what it frees for the next one; when there is no next one, it goes back to the system."""
    try:
        yield
    finally:
        return_freed_memory()


def _timed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Sequence[Batch]],
    schedule: Schedule,
    step: int,
) -> Metrics:
    began, rate = time.perf_counter(), schedule.rate(step)
    micro = batches(step)
    tokens = sum(batch.tokens for batch in micro)
    line: Metrics = {"loss": None, "tokens": tokens, "learning_rate": rate, "grad_norm": None}
    try:
        line |= optimizer_step(model, optimizer, micro, rate, schedule.clip, step)
    except NotFinite:
        if not schedule.skips:
            raise
        optimizer.zero_grad(set_to_none=True)
        line["skipped"] = True
    return {**line, "tokens_per_second": tokens / (time.perf_counter() - began)}

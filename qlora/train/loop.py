"""The training loop: micro-batches in, optimizer steps out. It knows nn.Module, Optimizer and Batch, and no options.

    one step:  gradient = sum over micro-batches of d(loss sum) / (target tokens of the whole step)

The loss is summed and divided once, so 4 micro-batches of 1 and 1 of 4 are the same step (the alternative, a mean of
means, weighs a token by the size of its micro-batch). The division is applied to the float32 gradients rather than to
the loss: the numbers that flow back through a 16-bit model are then larger by the number of tokens, which is the loss
scaling that float16 needs. Division and clipping are one factor, which PagedAdamW applies as it reads the gradients: on
a CPU two passes over them took as long as the update.

What a step sees is a function of its number (`batches(step)`, `rate(step)`), so a resumed run needs no iterator state.
A step asks the device for a number once, when loss and norm decide whether it counts: between micro-batches a GPU never
waits. metrics.jsonl: one object per line and step. `tokens` are those of the step, without padding; `tokens_per_second`
leaves evaluation and saving out; `memory_bytes` is the peak so far (`PeakMemory`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from qlora.train.memory import PeakMemory
from qlora.train.metrics import Metrics
from qlora.train.signals import Interrupted, StopRequest
from qlora.train.step import optimizer_step


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Sequence],
    *,
    steps: int,
    rate: Callable[[int], float],
    log: Callable[[Metrics], None],
    first: int = 0,
    clip: float = 1.0,
    evaluate: Callable[[], float] | None = None,
    eval_every: int = 0,
    save: Callable[[int], Any] | None = None,
    save_every: int = 0,
    memory: PeakMemory | None = None,
) -> None:
    """Take steps `first` to `steps` - 1. `batches(step)` gives a step's micro-batches, `rate(step)` its learning rate.

    `log` gets one object per step, and one for step 0 if there is an evaluation. `evaluate()` runs before the first
    step, after every `eval_every` and after the last; `save(steps done)` after every `save_every` and after the last.
    On Ctrl-C the step is finished and saved. `memory` is a peak that is being taken already (None: from here on).

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, when the checkpoint is written.
        UserError: a loss or gradient that is not finite.
    """
    with (
        StopRequest() as stop,
        nullcontext(memory) if memory else PeakMemory(next(model.parameters()).device) as memory,
    ):
        if evaluate is not None and first == 0:
            log({"step": 0, "tokens": 0, "eval_loss": evaluate(), "memory_bytes": memory.peak()})
        model.train()
        for done in range(first + 1, steps + 1):
            if stop.asked:  # during the first evaluation, or before any step
                raise Interrupted(done - 1)
            step, began = done - 1, time.perf_counter()
            micro = batches(step)
            metrics = optimizer_step(model, optimizer, micro, rate(step), clip, step)
            tokens = sum(batch.tokens for batch in micro)
            speed = tokens / (time.perf_counter() - began)
            line = {
                "step": done,
                "loss": metrics["loss"],
                "tokens": tokens,
                "learning_rate": rate(step),
                "grad_norm": metrics["grad_norm"],
            }
            line |= {"tokens_per_second": speed, "memory_bytes": memory.peak()}
            if evaluate is not None and (done == steps or (eval_every and done % eval_every == 0)):
                line["eval_loss"] = evaluate()
            log(line)
            interrupted = stop.asked and done < steps
            if save is not None and (done == steps or interrupted or (save_every and done % save_every == 0)):
                save(done)
            if interrupted:
                raise Interrupted(done)

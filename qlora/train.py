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

import ctypes
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.checkpoint import random_states, set_random_states
from qlora.errors import UserError, problem
from qlora.loss import loss_sum
from qlora.paging import ALLOCATION_ERRORS, out_of_memory
from qlora_kernels import ops

Metrics = dict[str, Any]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (or SIGTERM) came and the run stopped after `step` steps, with a checkpoint if it saves any."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"interrupted after step {step}")


# ---------------------------------------------------------------- the mathematics


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear from 0 over `warmup` steps, then by cosine or
    linearly to 0, or constant.

    The same values as transformers' `get_cosine_schedule_with_warmup` and its siblings.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    if schedule == "constant":
        return peak
    raise UserError(problem("schedule", schedule, "must be cosine, linear or constant", "cosine is the default"))


def accumulate(model: nn.Module, batches: Sequence) -> Tensor:
    """Add the gradient of the token loss summed over all `batches` to `.grad`; return that sum, a scalar on the device.

    Every target token weighs the same, however many its batch has: without dropout the result does not depend on how
    the examples were cut into batches (up to rounding).
    """
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch)
        loss.backward()
        total = total + loss.detach()
    return total


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence, rate: float, clip: float, step: int = 0
) -> Metrics:
    """One step over `batches` at learning rate `rate`, gradients clipped to norm `clip` (0: not); returns loss and
    grad_norm (before clipping).

    Where an allocation fails, an optimizer that can (`make_room`) gives memory back, and the whole step is taken again
    from
    the same random states: the result is that of an undisturbed step.

    Raises:
        UserError: the loss or the norm of the gradient is not finite, or memory ran out; nothing has been updated then.
    """
    while True:
        before = random_states()
        try:
            return _optimizer_step(model, optimizer, batches, rate, clip, step)
        except ALLOCATION_ERRORS as error:
            if not out_of_memory(error):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
        # The exception is gone here, and with it the tensors of the failed step.
        optimizer.zero_grad(set_to_none=True)
        if not getattr(optimizer, "make_room", lambda: False)():
            remedy = "Give a smaller --batch-size (with more --accumulate) or --max-tokens, or --gradient-checkpointing"
            if getattr(optimizer, "memory", None) == "all":
                remedy += ", or --optimizer-memory auto"
            raise UserError(problem("memory", "(all used)", f"an allocation failed at step {step + 1}: {said}", remedy))
        set_random_states(before)


def _optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence, rate: float, clip: float, step: int
) -> Metrics:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    total = accumulate(model, batches)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = ops.total_norm(gradients)
    for group in optimizer.param_groups:
        group["lr"] = rate
    prepared = optimizer.prepare() if hasattr(optimizer, "prepare") else None  # while a GPU still computes
    targets = sum(batch.target_tokens for batch in batches)
    loss, norm = (torch.stack([total.to(norm.device), norm]) / targets).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        name, value = ("loss", loss) if not math.isfinite(loss) else ("grad_norm", norm)
        remedy = "Begin again with a smaller --learning-rate, or with --dtype bf16 or fp32 if this is fp16"
        raise UserError(problem(name, value, f"is no finite number at step {step + 1}", remedy))
    scale = (min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0) / targets  # as torch.nn.utils.clip_grad_norm_ clips
    if prepared is not None:
        optimizer.step(prepared=prepared, scale=scale)
    else:
        torch._foreach_mul_(gradients, scale)
        optimizer.step()
    return {"loss": loss, "grad_norm": norm}


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each layer in the backward pass instead of keeping what is in it (arXiv:1604.06174). Non-reentrant: the
    inputs of the layers need no gradient of their own, and dropout draws the same mask again."""
    # transformers is renaming it; the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# ---------------------------------------------------------------- the loop


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


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM sets `asked`; a second one stops at once, as without this. One
    that the
    process was told to ignore stays ignored: a shell starts what runs behind it (`&`) so that its Ctrl-C is not meant
    for it.
    """

    def __init__(self):
        self.asked = False
        self._before: dict[int, Any] = {}

    def _note(self, number, frame) -> None:
        self.asked = True
        self._restore()
        print("\nStopping after this step; once more stops at once and loses it.", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error) -> None:
        self._restore()


# ---------------------------------------------------------------- memory


def anonymous_memory() -> int:
    """Bytes of anonymous memory of this process now: RssAnon, which leaves mapped model files out. Without /proc, the
    peak of all resident memory."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:  # macOS, where ru_maxrss is in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def return_freed_memory() -> None:
    """Give freed memory back to the system. glibc keeps it for the next that asks, holes between what is used included.
    Nothing without glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


NEAR = 0.98  # of a limit: from here on freed memory is given back
GROWTH = 4e9  # bytes that a process may grow by in a second: fresh pages cost time


class PeakMemory:
    """The most memory used since it was entered. On a GPU what torch's allocator has reserved: with CUDA's own few
    hundred MB it is what a card must have; `allocated` is what tensors took of it. On a CPU anonymous memory, RssAnon:
    Linux keeps no peak of it, so a thread looks every `every` seconds.

    With a `limit` in bytes the thread looks more often the nearer memory comes to it, and gives back there what is
    freed but kept: of a run of SmolLM2 18 % over what it uses. That costs a step about a tenth where it is needed, and
    nothing where it is not; a process that keeps nothing (M_MMAP_THRESHOLD at 256 kB, the alternative) pays a third of
    every step for fresh pages.
    """

    def __init__(self, device: torch.device, every: float = 0.05, limit: int | None = None):
        self.device, self.every, self.limit = device, every, limit
        self._peak = 0
        self._end = threading.Event()

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        self._look()
        return self._peak

    def allocated(self) -> int:
        """The peak of what tensors took; on a CPU the same as `peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self.peak()

    def _look(self) -> int:
        now = anonymous_memory()
        self._peak = max(self._peak, now)
        return now

    def _watch(self) -> None:
        pause = self.every
        while not self._end.wait(pause):
            now = self._look()
            if self.limit is not None:
                if now > NEAR * self.limit:
                    return_freed_memory()
                    now = self._look()
                pause = min(self.every, max(0.002, (NEAR * self.limit - now) / GROWTH))

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what was freed before is not needed now
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._end.set()


# ---------------------------------------------------------------- metrics and progress


def cut_back(path: Path, step: int) -> list[Metrics]:
    """Cut metrics.jsonl off after the line of `step`, as a run that was killed wrote more than its checkpoint; returns
    what is left."""
    kept: list[Metrics] = []
    if not path.exists():
        return kept
    end = 0
    with path.open("rb+") as file:
        for line in file:
            try:
                metrics = json.loads(line)
            except ValueError:  # the torn last line of a killed run
                break
            if metrics["step"] > step or not line.endswith(b"\n"):
                break
            kept.append(metrics)
            end += len(line)
        file.truncate(end)
    return kept


class MetricsLog:
    """Appends to metrics.jsonl, line by line; shows progress; writes TensorBoard events on request. Call it with the
    metrics of a step.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """

    def __init__(self, path: Path, *, steps: int, first: int = 0, tensorboard: bool = False):
        if tensorboard:
            require_tensorboard()
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(path.parent / "tensorboard"), purge_step=first + 1)
        self._progress = Progress(steps, first)

    def __call__(self, metrics: Metrics) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in metrics.items():
                if name != "step":
                    self._writer.add_scalar(name, value, metrics["step"])
        self._progress.show(metrics)

    def sync(self) -> None:
        """Make sure that the lines so far survive a power cut: called before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._progress.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def require_tensorboard() -> None:
    """Raises: UserError if the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            problem(
                "tensorboard",
                True,
                "the package tensorboard is not installed",
                "Run `pip install tensorboard`, or leave it out",
            )
        )


class Progress:
    """A live line on a terminal; elsewhere a plain line for the first and last step, each evaluation, and every 10
    seconds."""

    def __init__(self, steps: int, first: int = 0):
        self.steps, self.first = steps, first
        self._began = self._shown = time.monotonic()
        self._live = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Live

            self._live = Live(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self._task = self._live.add_task("training", total=steps, completed=first, text="")
            self._live.start()

    def show(self, metrics: Metrics) -> None:
        now, text = time.monotonic(), self.line(metrics)
        if self._live is not None:
            self._live.update(self._task, completed=metrics["step"], text=text)
            if "eval_loss" in metrics:
                self._live.console.print(text, highlight=False)
        elif metrics["step"] in (self.first + 1, self.steps) or "eval_loss" in metrics or now - self._shown >= 10:
            print(text, file=sys.stderr, flush=True)
            self._shown = now

    def line(self, metrics: Metrics) -> str:
        """step 12/60  loss 1.2345  eval 1.3456  1234 tokens/s  0.91 GB  1:23 left"""
        done = metrics["step"]
        words = [f"step {done}/{self.steps}"]
        words += [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
        words += [f"eval {metrics['eval_loss']:.4f}"] if "eval_loss" in metrics else []
        words += [f"{metrics['tokens_per_second']:.0f} tokens/s"] if "tokens_per_second" in metrics else []
        words += [f"{metrics['memory_bytes'] / 1e9:.2f} GB"]
        if done > self.first:
            words += [f"{duration((time.monotonic() - self._began) / (done - self.first) * (self.steps - done))} left"]
        return "  ".join(words)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

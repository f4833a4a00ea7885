"""What the parts of gpu_suite.py share: a device, how to measure on it, and how to tell what was found."""

from __future__ import annotations

import gc
import importlib.util
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from random_models import random_batch
from torch import nn


@dataclass
class Row:
    """One figure. `wanted` is what issue and README ask for; `met` says whether it is so; `must`: if not, something is
    wrong.
    """

    part: str
    name: str
    value: float | str
    unit: str = ""
    wanted: str = ""
    met: bool | None = None
    must: bool = False

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        verdict = "" if self.met is None else "ok" if self.met else "WRONG" if self.must else "short"
        return f"{self.part:9} {self.name:70} {value:>10} {self.unit:14} {self.wanted:14} {verdict}".rstrip()


@dataclass
class Bench:
    """A device, and what is found on it."""

    device: torch.device
    small: bool
    tell: Callable[[Row], None]
    part: str = ""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def row(
        self,
        name: str,
        value: float | str,
        unit: str = "",
        *,
        most: float | None = None,
        least: float | None = None,
        must: bool = False,
        met: bool | None = None,
    ) -> None:
        """Tell a figure, which has to be at most or at least something. Times of small shapes are held to nothing."""
        wanted = "" if most is None and least is None else f"<= {most:g}" if most is not None else f">= {least:g}"
        if wanted and not isinstance(value, str) and (must or not self.small):
            met = value <= most if most is not None else value >= least
        self.tell(Row(self.part, name, value, unit, wanted, met, must))

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails inside is told, and the part goes on."""
        try:
            yield
        # of any kind: a lent card's minutes must cost a row, not the rows behind it; the row counts as wrong
        except Exception as error:
            if self.cuda:
                torch.cuda.synchronize()  # raises where the card is past saving
            traceback.print_exc()
            said = (str(error).splitlines() or [""])[0]
            self.row(name, f"failed: {type(error).__name__}: {said}"[:300], met=False, must=True)
        finally:
            self.clean()

    def installed(self, package: str) -> bool:
        """Whether a package is there; if not, that is told."""
        there = importlib.util.find_spec(package) is not None
        if not there:
            self.row(package, "not installed")
        return there

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any], rounds: int = 20) -> float:
        """The median time of a call. On a card of its kernels alone, with cold caches: it is kept busy while they are
        launched.
        """
        function()
        times = []
        flushed = torch.empty(1 << 27, device=self.device) if self.cuda else None  # ten times the second-level cache
        for _ in range(2 if self.small else rounds):
            if self.cuda:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flushed.zero_()
                torch.cuda._sleep(2_000_000)
                begin.record()
                function()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                function()
                times.append(time.perf_counter() - begin)
        return median(times)

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def peers() -> bool:
    return all(importlib.util.find_spec(name) for name in ("peft", "bitsandbytes"))


# ---------------------------------------------------------------- training steps, measured


def measure_steps(
    bench: Bench, model: nn.Module, length: int, optimizer: torch.optim.Optimizer, count: int = 1
) -> dict[str, float] | None:
    """Seconds of a step of `count` micro-batches (median), its first loss, and the peak of memory; None if it does not
    fit.
    """
    from qlora.train.memory import PeakMemory
    from qlora.train.step import optimizer_step

    trained = [p for p in model.parameters() if p.requires_grad]
    batches = [random_batch(length, model.config.vocab_size, seed=i) for i in range(count)]
    model.train()
    times, losses = [], []
    bench.clean()
    try:
        with PeakMemory(bench.device) as memory:
            for step in range(3 if bench.small else 6):
                bench.wait()
                began = time.perf_counter()
                losses.append(optimizer_step(model, optimizer, batches, 1e-4, 1.0, step)["loss"])
                bench.wait()
                times.append(time.perf_counter() - began)
            return {
                "seconds": median(times[2:]),
                "loss": losses[0],
                "peak": memory.allocated(),
                "reserved": memory.peak(),
            }
    except (RuntimeError, ValueError) as error:
        if "out of memory" not in str(error):  # torch's own, or what optimizer_step made of it
            raise
        return None
    finally:
        for parameter in trained:
            parameter.grad = None
        if hasattr(optimizer, "close"):
            optimizer.close()
        bench.clean()


def adamw(bench: Bench, model: nn.Module, side: str) -> torch.optim.Optimizer:
    """What each side trains with: ours by default, PEFT's users with Trainer's default."""
    import qlora

    parameters = [p for p in model.parameters() if p.requires_grad]
    return (
        qlora.PagedAdamW(parameters, lr=1e-4)
        if side == "ours"
        else torch.optim.AdamW(parameters, lr=1e-4, fused=bench.cuda)
    )


def case(shape: str, method: str, length: int, again: bool) -> str:
    return f"{shape} {method} {length} tokens{', recomputing' if again else ''}"

"""What the parts of gpu_suite.py share: a device, how to measure on it, and how to tell what was found."""

from __future__ import annotations

import gc
import importlib.util
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    compiling: Callable[[float], None] = lambda seconds: None  # told of seconds for which a part is not to blame
    compiled: list[float] = field(default_factory=list)  # seconds of each kernel that Triton compiled for this part

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

    def listen(self) -> None:
        """Note each kernel that Triton compiles in this process from now on, and tell `compiling` of it."""
        if importlib.util.find_spec("triton") is None:
            return
        from triton import knobs

        def compiled(*, times: Any, cache_hit: bool, **_: Any) -> None:
            if not cache_hit:
                self.compiled.append(times.total / 1e6)
                self.compiling(self.compiled[-1])

        knobs.compilation.listener = compiled

    def synchronizations(self, call: Callable[[], Any]) -> list[str]:
        """Where a call makes the host wait for the card, a place for each time."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if self.cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                if self.cuda:
                    torch.cuda.set_sync_debug_mode("default")
        return [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]

    def kernels(self, call: Callable[[], Any]) -> tuple[list[tuple[str, float, int]], list[tuple[str, float, int]]]:
        """(name, ms, count) of what ran on the device, and of what the host asked of CUDA; the dearest first."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.cuda]) as found:
            call()
            self.wait()
        averages = found.key_averages()
        there = [e for e in averages if str(e.device_type).endswith("CUDA" if self.cuda else "CPU")]
        cost = [
            (e.key, (e.self_device_time_total if self.cuda else e.self_cpu_time_total) / 1e3, e.count) for e in there
        ]
        asked = [(e.key, e.self_cpu_time_total / 1e3, e.count) for e in averages if e.key.startswith("cuda")]
        return sorted(cost, key=lambda one: -one[1]), sorted(asked, key=lambda one: -one[1])

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def peers() -> bool:
    return all(importlib.util.find_spec(name) for name in ("peft", "bitsandbytes"))


# ---------------------------------------------------------------- training steps, measured


def measure_steps(
    bench: Bench, model: nn.Module, length: int, optimizer: torch.optim.Optimizer, count: int = 1, steps: int = 6
) -> dict[str, float] | None:
    """Seconds of a step of `count` micro-batches (median, but for the first two), its first loss, and the peak of
    memory; None if it does not fit.
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
            for step in range(3 if bench.small else steps):
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

"""What a run tells while it trains: metrics.jsonl, a line of progress, TensorBoard events.

    {"step": 12, "loss": ..., "tokens": ..., "learning_rate": ..., "grad_norm": ..., "tokens_per_second": ...,
     "memory_bytes": ..., "eval_loss": ... (where the model was evaluated)}         one object a line, step 0 first

A text file is the record: it survives a kill but for its last line, and everything can read it. The alternative, a
tracking service, is left to TensorBoard and to readers of this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from qlora.errors import UserError, problem

Metrics = dict[str, Any]


def cut_back(path: Path, step: int) -> list[Metrics]:
    """Cut metrics.jsonl off after the line of `step`; returns what is left.

    A run that was killed wrote more than its checkpoint knows.
    """
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
    """Appends to metrics.jsonl, shows progress, writes TensorBoard events on request; call it with a step's metrics.

    Args:
        steps: how many the run takes.
        first: the step (from 0) that it begins with.

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

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def require_tensorboard() -> None:
    """Check that TensorBoard can be written.

    Raises:
        UserError: the package is missing.
    """
    if importlib.util.find_spec("tensorboard") is None:
        rule, remedy = "the package tensorboard is not installed", "Run `pip install tensorboard`, or leave it out"
        raise UserError(problem("tensorboard", True, rule, remedy))


class Progress:
    """Progress on stderr: a live line on a terminal, plain lines elsewhere.

    Plain lines are those of the first and last step, of each evaluation, and one every 10 seconds.
    """

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
        """Show a step's metrics, if it is time to."""
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
        """End the live line."""
        if self._live is not None:
            self._live.stop()


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

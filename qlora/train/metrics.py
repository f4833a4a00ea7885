"""What a run tells while it trains: metrics.jsonl, a line of progress, TensorBoard events.

    {"step": 12, "loss": ..., "tokens": ..., "learning_rate": ..., "grad_norm": ..., "tokens_per_second": ...,
     "memory_bytes": ..., "eval_loss": ... (where the model was evaluated)}         one object a line, step 0 first

An `eval_loss` of null is one that a signal stopped: a resumed run evaluates, and writes this line again.

A text file is the record: it survives a kill but for its last line, and everything can read it. It is also the user's:
who removes or rotates it in mid-run gets the following lines in a new one, and the summary counts what was written
(`Totals`), not what is still there. The alternative, a tracking service, is left to TensorBoard and to readers of this
file.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import UserError, problem
from qlora.files import replace_file

Metrics = dict[str, Any]


@dataclass
class Totals:
    """What the lines of a run come to, with those from before a resume. None: not known."""

    tokens: int = 0
    loss: float | None = None  # of the last step
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    memory_bytes: int = 0
    skipped: int = 0  # steps whose update was left out
    skipped_in_a_row: int = 0  # of them, the last ones
    owed: Metrics | None = None  # the last line, not counted, whose evaluation was stopped

    def add(self, metrics: Metrics) -> None:
        """Count a line; a value that is no number there is passed over."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        self.memory_bytes = max(self.memory_bytes, int(numbers.get("memory_bytes", 0)))
        if "eval_loss" in numbers:
            self.eval_loss_after = numbers["eval_loss"]
            if metrics["step"] == 0:
                self.eval_loss_before = numbers["eval_loss"]
        if metrics["step"] > 0:
            self.tokens += int(numbers.get("tokens", 0))
            self.loss = numbers.get("loss", self.loss)
            skipped = bool(metrics.get("skipped"))
            self.skipped += skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


def cut_back(path: Path, step: int) -> Totals:
    """Cut metrics.jsonl off after the line of `step`; returns what is left of it, added up.

    A run that was killed wrote more than its checkpoint knows. A line that cannot be read is moved to metrics.torn
    beside it, and said, unless it is the last one, which a kill tears. The new file is written beside and renamed: on a
    full disk the old one stays, and a symbolic link is replaced, not followed.

    Raises:
        UserError: the file cannot be read or written.
    """
    totals, kept, torn = Totals(), list[bytes](), list[bytes]()
    try:
        lines = path.read_bytes().splitlines(keepends=True) if stat.S_ISREG(path.stat().st_mode) else []
    except FileNotFoundError:
        if not path.is_symlink():
            return totals
        lines = []
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise UserError(problem("output", path, rule, "Move it away, or choose another folder")) from error
    for number, line in enumerate(lines, 1):
        metrics = _parsed(line)
        if metrics is not None and metrics["step"] <= step and line.endswith(b"\n"):
            if metrics["step"] == step and metrics.get("eval_loss", 0.0) is None:
                totals.owed = metrics
            else:
                totals.add(metrics)
            kept.append(line)
        elif metrics is None and number < len(lines) and step >= 0:
            torn.append(line)
    if torn:
        aside = path.with_name("metrics.torn")
        before = aside.read_bytes() if aside.is_file() and not aside.is_symlink() else b""
        replace_file(aside, before + b"".join(torn))
        print(f"metrics  {len(torn)} of {len(lines)} lines could not be read and lie in {aside} now", file=sys.stderr)
    replace_file(path, b"".join(kept))
    return totals


def _parsed(line: bytes) -> Metrics | None:
    """The object of a line, or None if it is none of ours."""
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = metrics.get("step") if isinstance(metrics, dict) else None
    return metrics if isinstance(step, int) and not isinstance(step, bool) else None


class MetricsLog:
    """Appends to metrics.jsonl, shows progress, writes TensorBoard events on request; call it with a step's metrics.

    `totals` counts all lines, those of `kept` too.

    Args:
        steps: how many the run takes.
        first: the step (from 0) that it begins with.
        kept: of the lines that are there already.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self, path: Path, *, steps: int, first: int = 0, tensorboard: bool = False, kept: Totals | None = None
    ):
        if tensorboard:
            require_tensorboard()
        self.totals = kept or Totals()
        self._path, self._file = path, _append_to(path)
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(path.parent / "tensorboard"), purge_step=first + 1)
        self._progress = Progress(steps, first)

    def __call__(self, metrics: Metrics) -> None:
        # JSON has no NaN and no infinity.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self.totals.add(finite)
        self._write(json.dumps(finite).encode() + b"\n", metrics["step"])
        if self._writer is not None:
            for name, value in finite.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(name, value, metrics["step"])
        self._progress.show(finite)

    def _write(self, line: bytes, step: int) -> None:
        """Append a line, or put it in place of the last one, whose evaluation was stopped."""
        owed, self.totals.owed = self.totals.owed, None
        there = self._path.read_bytes().splitlines(keepends=True) if owed is not None and self._path.is_file() else []
        if owed is not None and there and _parsed(there[-1]) == owed and owed["step"] == step:
            replace_file(self._path, b"".join([*there[:-1], line]))
            return
        self._follow()
        self._file.write(line)
        self._file.flush()

    def _follow(self) -> None:
        """Open the file anew where it was removed or rotated; go on with the old one where there is no place for it."""
        here = os.fstat(self._file.fileno())
        try:
            there = os.lstat(self._path)
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                return
        except OSError:
            pass
        try:
            anew = _append_to(self._path)
        except OSError:
            return
        self._file.close()
        self._file = anew

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


def _append_to(path: Path) -> Any:
    """The file, open for appending, and never through a symbolic link."""
    return open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "ab")


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
                console=Console(file=sys.stderr),
            )
            self._task = self._live.add_task("training", total=steps, completed=first, text="")
            self._live.start()

    def show(self, metrics: Metrics) -> None:
        """Show a step's metrics, if it is time to."""
        now, text = time.monotonic(), self.line(metrics)
        if metrics["step"] == self.first:  # an evaluation before the steps says nothing of how long they take
            self._began = now
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
        words += [f"loss {metrics['loss']:.4f}"] if metrics.get("loss") is not None else []
        words += ["update left out"] if metrics.get("skipped") else []
        words += [f"eval {metrics['eval_loss']:.4f}"] if metrics.get("eval_loss") is not None else []
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

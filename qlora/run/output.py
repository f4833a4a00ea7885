"""The output folder of a run: locked, looked at before anything is loaded, written to from then on.

    output/ config.yaml   metrics.jsonl   checkpoints/step-000123/   adapter/   (tensorboard/)

A lock of the folder itself goes with the process, however that ends. The alternative, a lock file, stays behind after a
kill and has to be removed by hand.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora.config.commands import FinetuneConfig
from qlora.config.options import to_yaml
from qlora.errors import UserError, problem
from qlora.files import disk_failing, disk_full, disk_problem, remove_partial
from qlora.train.checkpoint import latest_checkpoint
from qlora.train.metrics import cut_back

OWN_FILES = {"adapter", "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"}


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold the output folder for this process alone; made if need be, and removed again if it stays empty.

    Raises:
        UserError: it cannot be had.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(disk_problem(output, error)) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        remedy = "Wait for that run, or choose another folder"
        raise UserError(problem("output", output, "another run is writing to it", remedy)) from None
    try:
        yield
    finally:
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        os.close(handle)


@contextmanager
def disk_full_as_problem(output: Path) -> Iterator[None]:
    """Raise a full disk, wherever it was met, as a UserError of one line."""
    try:
        yield
    except OSError as error:
        if disk_full(error) or disk_failing(error):
            raise UserError(disk_problem(output, error)) from error
        raise


def check_output(resume: bool, output: Path) -> None:
    """Check that the folder is empty, or holds an earlier run that is to be resumed.

    What a run left behind that ended before its first checkpoint is no run: it may be written over.

    Raises:
        UserError: neither.
    """
    if not os.access(output, os.W_OK):
        raise UserError(problem("output", output, "cannot be written", "Choose a folder you may write to"))
    remove_partial(output)
    remove_partial(output / "checkpoints")
    held = sorted(path.name for path in output.iterdir())
    checkpoint = latest_checkpoint(output)
    if resume:
        if checkpoint is None:
            rule = f"{output} holds no checkpoint to go on from"
            raise UserError(problem("resume", True, rule, "Start without `resume`"))
    elif checkpoint is not None or "adapter" in held:
        what = f"its last checkpoint is {checkpoint.name}" if checkpoint is not None else "it has an adapter"
        remedy = "Continue it with `resume`, or choose another folder"
        raise UserError(problem("output", output, f"holds an earlier run; {what}", remedy))
    elif foreign := [name for name in held if name not in OWN_FILES]:
        raise UserError(problem("output", output, f"is not empty ({', '.join(foreign[:5])})", "Choose another folder"))


def begin_output(config: FinetuneConfig, output: Path, first: int) -> None:
    """Write the resolved config, reusable with --config, and cut the metrics back to the checkpoint's step."""
    (output / "config.yaml").write_text(to_yaml(dataclasses.replace(config, resume=False)), encoding="utf-8")
    cut_back(output / "metrics.jsonl", first if first > 0 else -1)

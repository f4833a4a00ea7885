"""The output folder of a run: locked, looked at before anything is loaded, written to from then on.

    output/ config.yaml   metrics.jsonl   checkpoints/step-000123/   adapter/   (tensorboard/)   (base/)

A lock of the folder itself goes with the process, however that ends; where the file system has none, the run says so
and goes on. The alternative, a lock file, stays behind after a kill and has to be removed by hand.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora import posix
from qlora.config.commands import FinetuneConfig
from qlora.config.options import to_yaml
from qlora.errors import UserError, guard, problem
from qlora.files import disk_failing, disk_full, disk_problem, remove_partial, replace_file
from qlora.optim.memory_errors import ALLOCATION_ERRORS, out_of_memory
from qlora.train.checkpoint import latest_checkpoint
from qlora.train.metrics import Totals, cut_back

OWN_FILES = {"adapter", "base", "checkpoints", "config.yaml", "metrics.jsonl", "metrics.torn", "tensorboard"}
FORBIDDEN = {errno.EACCES, errno.EPERM}  # a fault of the output's only for a file in it


class Claim:
    """An output folder that this process holds, wherever it is moved to.

    Attributes:
        path: where it is, as far as is known; `follow` looks again.
    """

    def __init__(self, path: Path):
        self.asked = self.path = path
        self._handle = _locked(path)

    def follow(self) -> Path:
        """Where the folder is now: it may have been renamed in mid-run, and is made anew where it was removed.

        Raises:
            UserError: it cannot be made anew, or another run has its place.
        """
        if not self._is(self.path):
            with suppress(OSError):
                moved = Path(os.readlink(f"/proc/self/fd/{self._handle}"))
                if self._is(moved):
                    print(f"output   {self.path} was moved: this run goes on in {moved}", file=sys.stderr, flush=True)
                    self.path = moved
                    return moved
            handle = _locked(self.asked)
            os.close(self._handle)
            self._handle, self.path = handle, self.asked
            print(f"output   {self.path} was removed, and is made anew", file=sys.stderr, flush=True)
        return self.path

    def _is(self, path: Path) -> bool:
        return _same(self._handle, path)

    def close(self) -> None:
        """Let the folder go; removed again if it stays empty."""
        with suppress(OSError):
            if self._is(self.path) and not any(self.path.iterdir()):
                self.path.rmdir()
        os.close(self._handle)


def _same(handle: int, path: Path) -> bool:
    here = os.fstat(handle)
    try:
        there = os.stat(path)
    except OSError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _locked(output: Path) -> int:
    """A handle of the folder, made if need be, with its lock.

    Raises:
        UserError: it cannot be had.
    """
    while True:
        try:
            with guard("output", repr(str(output)), "is no path", "Choose another folder"):
                if "\0" in str(output):
                    raise ValueError("it holds a zero byte")
            output.mkdir(parents=True, exist_ok=True)
            handle = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(disk_problem(output, error)) from error
        try:
            posix.lock(handle)
        except BlockingIOError:
            os.close(handle)
            remedy = "Wait for that run, or choose another folder"
            raise UserError(problem("output", output, "another run is writing to it", remedy)) from None
        except OSError as error:  # no locks on this file system
            line = f"output   {output} cannot be locked ({error.strerror}): see that no other run writes to it"
            print(line, file=sys.stderr, flush=True)
        if _same(handle, output):  # else its holder removed it before we had the lock
            return handle
        os.close(handle)


@contextmanager
def claimed(output: Path) -> Iterator[Claim]:
    """Hold the output folder for this process alone; made if need be, and removed again if it stays empty.

    Raises:
        UserError: it cannot be had.
    """
    claim = Claim(output)
    try:
        yield claim
    finally:
        claim.close()


@contextmanager
def shortage_as_problem(output: Path) -> Iterator[None]:
    """Raise a full or failing disk, and memory that ran out, wherever it was met, as a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except ALLOCATION_ERRORS as error:
        if out_of_memory(error):
            rule = f"an allocation failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
            remedy = "Use a smaller model, `rank`, `batch_size` or `max_tokens`"
            raise UserError(problem("memory", "(all used)", rule, remedy)) from error
        name = getattr(error, "filename", None) or output
        ours = isinstance(error, OSError) and error.errno in FORBIDDEN and Path(str(name)).is_relative_to(output)
        if ours or disk_full(error) or disk_failing(error):
            raise UserError(disk_problem(Path(str(name)), error)) from error
        raise


def resumes(resume: bool | str, output: Path) -> bool:
    """Whether a run goes on: if it is to, or with "auto" where there is a checkpoint."""
    return latest_checkpoint(output) is not None if resume == "auto" else bool(resume)


def check_output(resume: bool | str, output: Path) -> None:
    """Check that the folder is empty, or holds an earlier run that is to be resumed.

    What a run left behind that ended before its first checkpoint is no run: it may be written over.

    Raises:
        UserError: neither.
    """
    if not os.access(output, os.W_OK):
        raise UserError(problem("output", output, "cannot be written", "Choose a folder you may write to"))
    remove_partial(output)
    for name in ("config.yaml", "metrics.jsonl", "metrics.torn"):  # files, which `remove_partial` leaves
        for part in output.glob(f".{name}.*.part"):
            if re.fullmatch(r"\.\d+\.part", part.name.removeprefix(f".{name}")) and part.is_file():
                part.unlink(missing_ok=True)
    remove_partial(output / "checkpoints")
    held = sorted(path.name for path in output.iterdir())
    checkpoint = latest_checkpoint(output)
    if resumes(resume, output):
        if checkpoint is None:
            rule = f"{output} holds no checkpoint to go on from"
            raise UserError(problem("resume", True, rule, "Start without `resume`, or with `resume=auto`"))
    elif checkpoint is not None or "adapter" in held:
        what = f"its last checkpoint is {checkpoint.name}" if checkpoint is not None else "it has an adapter"
        remedy = "Continue it with `resume`, or choose another folder"
        raise UserError(problem("output", output, f"holds an earlier run; {what}", remedy))
    elif foreign := [name for name in held if name not in OWN_FILES]:
        raise UserError(problem("output", output, f"is not empty ({', '.join(foreign[:5])})", "Choose another folder"))


def begin_output(config: FinetuneConfig, output: Path, first: int) -> Totals:
    """Write the resolved config, reusable with --config, and cut the metrics back to the checkpoint's step.

    Returns:
        What the metrics that are left come to.
    """
    write_config(config, output)
    return cut_back(output / "metrics.jsonl", first if first > 0 else -1)


def write_config(config: FinetuneConfig, output: Path) -> None:
    """Write config.yaml: the run's own, so without `resume`."""
    replace_file(output / "config.yaml", to_yaml(dataclasses.replace(config, resume=False)))

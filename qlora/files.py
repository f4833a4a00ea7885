"""Folders that appear whole or not at all, and what a disk can do to them.

    whole_folder(final)   write into .final.PID.part, sync every file and folder, rename to final, sync the parent

rename is atomic within a file system, and the sync before it keeps a power cut from leaving a name without contents.
The alternative, a marker file that says "complete", leaves every reader to look for it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora.errors import UserError, problem


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final` when the block ends, replacing what was there, or vanishes on error.

    Raises:
        UserError: the place cannot be written, or the disk is full; `final` is then what it was before.
    """
    part = final.parent / f".{final.name}.{os.getpid()}.part"
    old = final.parent / f".{final.name}.{os.getpid()}.old.part"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    except OSError as error:
        raise UserError(disk_problem(final, error)) from error
    try:
        yield part
        for path in sorted(part.rglob("*"), reverse=True):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner may read
            _sync(path)
        _sync(part)
        if final.exists():
            os.rename(final, old)
        try:
            os.rename(part, final)
        except BaseException:
            if old.exists():
                os.rename(old, final)
            raise
        _sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if disk_full(error):
            raise UserError(disk_problem(final, error)) from error
        raise


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half written in `folder`. Only for a folder that no other process writes to."""
    for path in folder.glob(".*.part"):
        shutil.rmtree(path, ignore_errors=True)


def disk_full(error: BaseException) -> bool:
    """Whether `error` says that there is no room: by errno, or by its number in the text of a Rust library's error."""
    codes = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in codes
    number = re.search(r"\(os error (\d+)\)", str(error))
    return number is not None and int(number[1]) in codes


def disk_problem(path: Path, error: BaseException) -> str:
    """The line for a path that could not be written."""
    if disk_full(error):
        rule = "the disk is full; nothing was left half written"
        return problem("output", path, rule, "Free some space and run it again, a finetune with `resume`")
    rule = f"cannot be written ({getattr(error, 'strerror', None) or error})"
    return problem("output", path, rule, "Choose a folder you may write to")


def _umask() -> int:
    mask = os.umask(0o022)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file beside and rename it to `path`: whole or as it was, and a symbolic link is replaced, not followed.

    Raises:
        UserError: it cannot be written, or the disk is full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(disk_problem(path, error)) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object that people can read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that we or PEFT wrote.

    Raises:
        UserError: it is damaged.
    """
    remedy = "The file is damaged: use another copy or an earlier checkpoint"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(problem(path.name, path, f"cannot be read ({error})", remedy)) from error
    if not isinstance(value, dict):
        raise UserError(problem(path.name, path, "must hold a JSON object", remedy))
    return value

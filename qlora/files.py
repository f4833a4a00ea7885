"""Folders that appear whole or not at all, and what a disk can do to them.

    whole_folder(final)   write into .final.part, locked; sync every file and folder; rename to final; sync the parent

rename is atomic within a file system, and the sync before it keeps a power cut from leaving a name without contents.
What is to be replaced changes places with the new folder in one call (renameat2 with RENAME_EXCHANGE), so that a kill
leaves one of the two under the name. What is not ours stays: rename(2) of a folder replaces nothing but an empty
folder. The alternative, a marker file that says "complete", leaves every reader to look for it.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import itertools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora import posix
from qlora.errors import UserError, guard, problem

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FAILING = {errno.EIO, errno.EROFS, errno.ESTALE}


@contextmanager
def whole_folder(final: Path, *, replaces: bool = True) -> Iterator[Path]:
    """A folder to write into that becomes `final` when the block ends, or vanishes on error.

    Args:
        final: where it appears; a symbolic link is followed.
        replaces: whether a folder that is there gives way. Without, only the empty one that was there at the start
            does; for anything else, the result is kept beside it.

    Raises:
        UserError: the place cannot be written, another process writes to it, something that is not replaced is in the
            way, or the disk is full; `final` is then what it was before.
    """
    with guard("output", repr(str(final)), "is no path", "Choose another folder"):
        final = Path(os.path.realpath(final))
    before = _identity(final)
    claimed: tuple[Path, int] | None = None
    try:
        try:
            _make(final.parent)
            _restore(final)
            with _signals_wait():  # one that comes with the new folder is heard when there is something to remove
                claimed = _claimed(final)
        except OSError as error:
            raise UserError(disk_problem(final, error)) from error
        part, _ = claimed
        yield part
        try:
            _sync_tree(part)
            if replaces:
                _replace(part, final)
            else:
                _appear(part, final, before)
            _sync(final.parent)
        except OSError as error:
            raise UserError(disk_problem(final, error)) from error
    except BaseException as error:
        if disk_full(error) or disk_failing(error):
            raise UserError(disk_problem(final, error)) from error
        raise
    finally:
        if claimed is not None:
            _cleared(*claimed)


def _cleared(part: Path, handle: int) -> None:
    """Remove what is left of a claimed folder, and its lock."""
    with _signals_wait():
        if _identity(part) == _identity(handle):  # else it has its name, and another process may use this one
            shutil.rmtree(part, ignore_errors=True)
        os.close(handle)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Within it a signal that would raise an exception waits for the end: a second Ctrl-C leaves nothing half removed.
    Others, such as those that end the process without Python, act at once.
    """
    came: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # Python hears them only there
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
        before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _claimed(final: Path) -> tuple[Path, int]:
    """(an empty folder to write into, the handle that locks it). What a killed process left in it is removed.

    Raises:
        UserError: another process writes to it.
    """
    part = final.parent / f".{final.name}.part"
    while True:
        part.mkdir(exist_ok=True)
        handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            posix.lock(handle)
        except BlockingIOError:
            os.close(handle)
            remedy = "Wait for it, or choose another folder"
            raise UserError(problem("output", final, "another process is writing it", remedy)) from None
        except OSError:  # no locks on this file system: a name of our own
            os.close(handle)
            with suppress(OSError):
                part.rmdir()
            part = final.parent / f".{final.name}.{os.getpid()}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            return part, os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if _identity(part) == _identity(handle):  # else its holder removed it before we had the lock
            break
        os.close(handle)
    for path in part.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return part, handle


def _replace(part: Path, final: Path) -> None:
    """Put `part` in the place of `final`; a folder that was there is removed."""
    if not os.path.lexists(final):
        os.rename(part, final)
    elif not final.is_dir():
        raise UserError(problem("output", final, "is a file", "Give a folder"))
    elif _exchange(part, final):
        dropped = final.parent / f".{final.name}.{os.getpid()}.dropped.part"
        os.rename(part, dropped)
        shutil.rmtree(dropped, ignore_errors=True)
    else:
        old = final.parent / f".{final.name}.old.part"  # `_restore` knows it
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        try:
            os.rename(part, final)
        except BaseException:
            os.rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and not renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(two), exchange)


def _appear(part: Path, final: Path, before: tuple[int, int] | None) -> None:
    """Put `part` where nothing was, or the empty folder `before`.

    Raises:
        UserError: something is there by now. It is left alone, and says where the result is.
    """
    if _identity(final) == before:
        try:
            os.rename(part, final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
    names = (final.with_name(f"{final.name}-{n}") for n in itertools.count(2))
    beside = next(path for path in names if not os.path.lexists(path))
    os.rename(part, beside)
    rule = "something else appeared there in the meantime, and was left alone"
    raise UserError(problem("output", final, rule, f"The result is whole, in {beside}"))


def _identity(place: Path | int) -> tuple[int, int] | None:
    """What lies under a name or handle, whatever it is called; None for nothing."""
    try:
        found = os.lstat(place) if isinstance(place, Path) else os.fstat(place)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _restore(final: Path) -> None:
    """Give a folder back its name if a process was killed in between taking it away and putting the new one there."""
    for old in final.parent.glob(f".{glob.escape(final.name)}.*"):
        ours = re.fullmatch(r"(\d+\.)?old\.part", old.name.removeprefix(f".{final.name}."))  # with its process, once
        if ours and not os.path.lexists(final):
            os.rename(old, final)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half written in `folder`. Only for a folder that no other process writes to.

    A whole folder that was about to be replaced, and is now the only one, gets its name back.
    """
    for path in sorted(folder.glob(".*.part")):
        replaced = re.fullmatch(r"\.(.+?)(\.\d+)?\.old\.part", path.name)
        if replaced:
            _restore(folder / replaced[1])
        shutil.rmtree(path, ignore_errors=True)


def _make(folder: Path) -> None:
    """A folder and those above it; a power cut does not take their names away again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def disk_full(error: BaseException) -> bool:
    """Whether `error` says that there is no room: by errno, or by its number in the text of a Rust library's error."""
    return _errno(error) in FULL


def disk_failing(error: BaseException) -> bool:
    """Whether `error` says that the disk fails, or takes nothing any more."""
    return _errno(error) in FAILING


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else int(number[1])


def disk_problem(path: Path, error: BaseException) -> str:
    """The line for a path that could not be written."""
    if disk_full(error):
        rule = "the disk is full; nothing was left half written"
        return problem("output", path, rule, "Free some space and run it again, a finetune with `resume`")
    rule = f"cannot be written ({getattr(error, 'strerror', None) or error})"
    remedy = "See to the disk, or choose another" if disk_failing(error) else "Choose a folder you may write to"
    return problem("output", path, rule, remedy)


def _umask() -> int:
    mask = os.umask(0o022)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner may read
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk; file systems that cannot sync a folder are left at that."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        unable = error.errno in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
        if not unable and not (path.is_dir() and error.errno in (errno.EACCES, errno.EBADF)):
            raise


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
    with guard(path.name, path, "cannot be read", remedy):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(problem(path.name, path, "must hold a JSON object", remedy))
    return value

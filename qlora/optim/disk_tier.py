"""TODO head of optim.disk_tier."""

from __future__ import annotations

import errno
import mmap
import os
import re
import resource
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qlora.errors import UserError, problem
from qlora.files import disk_full

_POPULATE_WRITE = (
    23  # MADV_POPULATE_WRITE (Linux 5.14), which Python has no name for: all page faults of a range at once
)


def anonymous(nbytes: int) -> Tensor:
    """uint8 [nbytes] of zeros in a mapping of its own, which goes back to the system with the tensor. (What malloc gets
    back it may keep.)

    Raises:
        MemoryError: there is none.
    """
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot map {nbytes} bytes") from error
    return torch.frombuffer(memory, dtype=torch.uint8)


class MappedFile:
    """Pages in a file without a name: preallocated, so that a full disk is met before anything counts on it (a write to
    a mapped hole would kill the process), and unlinked, so that nobody can cut it short and nothing is left behind.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder or tempfile.gettempdir())
        self.moved = self.stalls = 0
        self._handle, self._length = -1, 0
        self._kept: mmap.mmap | None = None
        self._keep = True

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """Offsets of new pages of zeros. Raises: UserError if the disk has no room, or the folder lies in memory."""
        if self._handle < 0:
            self._handle = open_unlinked(self.folder)
            self._finalizer = weakref.finalize(self, os.close, self._handle)
        offsets, end = [], self._length
        for size in sizes:
            offsets.append(end)
            end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        allocate(self._handle, self._length, end - self._length, self.folder)
        self._length = end
        return offsets

    def write(self, place: int, page: Tensor) -> None:
        rest = memoryview(page.numpy())
        while rest:
            written = os.pwrite(self._handle, rest, place)
            place, rest = place + written, rest[written:]

    def read(self, places: Sequence[tuple[int, int]]) -> list[Tensor]:
        window = torch.frombuffer(self._map(), dtype=torch.uint8)
        return [window[place : place + size] for place, size in places]

    def _map(self) -> mmap.mmap:
        if self._kept is not None and len(self._kept) == self._length:
            return self._kept
        mapping = mmap.mmap(self._handle, self._length)
        self._kept = mapping if self._keep else None
        return mapping

    def unmap(self) -> int:
        """From now on map the file only while it is used; returns the bytes of addresses that are freed."""
        freed = len(self._kept) if self._kept is not None else 0
        self._kept, self._keep = None, False
        return freed

    @contextmanager
    def walk(self, places: Sequence[tuple[int, int]]) -> Iterator[Iterator[Tensor]]:
        if not places:
            yield iter(())
            return
        pages = self._walk(self._map(), places)
        try:
            yield pages
        finally:
            pages.close()

    def _walk(self, mapping: mmap.mmap, places: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        window = torch.frombuffer(mapping, dtype=torch.uint8)
        for (place, size), following in zip(places, [*places[1:], None], strict=True):
            if following is not None:
                os.posix_fadvise(self._handle, *following, os.POSIX_FADV_WILLNEED)  # returns at once; the kernel reads
            waited = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            if not self._keep:
                _fault_in(mapping, place, size)
            try:
                yield window[place : place + size]
            finally:
                self.stalls += resource.getrusage(resource.RUSAGE_SELF).ru_majflt > waited
                self.moved += 2 * size
                if not self._keep:
                    mapping.madvise(mmap.MADV_DONTNEED, place, size)

    def scratch(self, nbytes: int) -> Tensor:
        handle = open_unlinked(self.folder)
        try:
            allocate(handle, 0, nbytes, self.folder)
            return torch.frombuffer(mmap.mmap(handle, nbytes), dtype=torch.uint8)  # which holds the file by itself
        finally:
            os.close(handle)

    def close(self) -> None:
        self.unmap()
        if self._handle >= 0:
            self._finalizer()
        self._handle, self._length = -1, 0


def _fault_in(mapping: mmap.mmap, place: int, size: int) -> None:
    """Take the page faults of a range at once, which costs half of taking them one by one."""
    try:
        mapping.madvise(_POPULATE_WRITE, place, size)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel older than 5.14
            raise


def open_unlinked(folder: Path) -> int:
    """A handle of a new file in `folder` that has no name.

    Raises:
        UserError: the folder cannot be written to, or is kept in memory, where spilling saves nothing.
    """
    if in_memory(folder):
        remedy = (
            "Write to a folder on a disk (the output folder, or TMPDIR), or keep the state resident with memory=all"
        )
        raise UserError(
            problem("folder", folder, "lies in memory (tmpfs), so pages spilled to it would save none", remedy)
        )
    try:
        if hasattr(os, "O_TMPFILE"):
            try:
                return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # not on every file system
                    raise
        handle, path = tempfile.mkstemp(prefix=".pages.", suffix=".part", dir=folder)
        os.unlink(path)
        return handle
    except OSError as error:
        raise UserError(
            problem("folder", folder, f"cannot be written ({error.strerror})", "Choose a folder you may write to")
        ) from error


def allocate(handle: int, offset: int, nbytes: int, folder: Path) -> None:
    """Have the blocks of a range of a file. Raises: UserError if the disk is full."""
    try:
        os.posix_fallocate(handle, offset, nbytes)
    except OSError as error:
        if not disk_full(error):
            raise
        remedy = "Free some space there, or let more of it stay in memory"
        raise UserError(
            problem("folder", folder, f"the disk has no room for {nbytes / 1e6:.0f} MB of pages", remedy)
        ) from error


def in_memory(folder: Path) -> bool:
    """Whether a folder's file system is tmpfs or ramfs. Raises: UserError if there is no such folder."""
    try:
        device = os.stat(folder).st_dev
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError as error:
        raise UserError(
            problem("folder", folder, f"cannot be used ({error.strerror})", "Choose a folder on a disk, on Linux")
        ) from error
    name = f"{os.major(device)}:{os.minor(device)}"
    return re.search(rf"^\d+ \d+ {name} .* - (tmpfs|ramfs) ", mounts, re.MULTILINE) is not None

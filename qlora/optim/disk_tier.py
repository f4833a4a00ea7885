"""The slow tier of a CPU: pages in an unlinked, preallocated file that is mapped where it is used.

    reserve   blocks of the file are allocated: a full disk is met here, not by a write to a mapped hole (SIGBUS)
    walk      the file is mapped; the next page is announced to the kernel (WILLNEED), which reads ahead and writes back
    unmap     after a failed allocation: addresses may be what is short, so pages are mapped only while they are used

The kernel's page cache moves the bytes. The alternative, a thread that copies into buffers of our own, was slower and
needs the memory that spilling is to save. MADV_DONTNEED frees no memory of a mapped file, only its mapping, which costs
page faults: the mapping stays as long as addresses are not short.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import tempfile
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qlora import posix
from qlora.errors import UserError, problem
from qlora.files import disk_full

# MADV_POPULATE_WRITE (Linux 5.14), which Python has no name for: all page faults of a range at once.
_POPULATE_WRITE = 23


def anonymous(nbytes: int) -> Tensor:
    """uint8 [nbytes] of zeros in a mapping of its own, which goes back to the system with the tensor.

    (What malloc gets back it may keep.)

    Raises:
        MemoryError: there is none.
    """
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot map {nbytes} bytes") from error
    return torch.frombuffer(memory, dtype=torch.uint8)


class MappedFile:
    """Pages in a file without a name: nobody can cut it short, and nothing is left behind.

    `moved` counts the bytes read and written through `walk`; `stalls` the pages that had to be waited for (those whose
    use took a major page fault).
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder or tempfile.gettempdir())
        self.moved = self.stalls = 0
        self._handle, self._length, self._owner = -1, 0, 0
        self._kept: mmap.mmap | None = None
        self._keep = True

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """Offsets of new pages of zeros, of these sizes in bytes.

        Raises:
            UserError: the disk has no room, the folder lies in memory, or the file is that of a parent process.
        """
        self._refuse_fork()
        if self._handle < 0:
            self._handle, self._owner = open_unlinked(self.folder), os.getpid()
            self._finalizer = weakref.finalize(self, os.close, self._handle)
        offsets, end = [], self._length
        for size in sizes:
            offsets.append(end)
            end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        allocate(self._handle, self._length, end - self._length, self.folder)
        self._length = end
        return offsets

    def write(self, place: int, page: Tensor) -> None:
        """Write uint8 `page` at an offset of the file."""
        rest = memoryview(page.numpy().data)
        while rest:
            written = os.pwrite(self._handle, rest, place)
            place, rest = place + written, rest[written:]

    def read(self, places: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Views of the mapped file, uint8, for (offset, size) each; they keep the mapping alive."""
        window = torch.frombuffer(self._map(), dtype=torch.uint8)
        return [window[place : place + size] for place, size in places]

    def _refuse_fork(self) -> None:
        """A child that was forked shares the file: what it writes there, its parent reads."""
        if self._handle >= 0 and self._owner != os.getpid():
            rule = f"its spilled state belongs to process {self._owner}, of which this one is a forked child"
            remedy = "Make an optimizer of its own in the child, or fork before the first step"
            raise UserError(problem("optimizer", "PagedAdamW", rule, remedy))

    def _map(self) -> mmap.mmap:
        self._refuse_fork()
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
        """An iterator over the pages at (offset, size), to read and write, each good until the next is asked for."""
        if not places:
            yield iter(())
            return
        pages = self._walk(self._map(), places)
        try:
            yield pages
        finally:
            pages.close()

    def _walk(self, mapping: mmap.mmap, places: Sequence[tuple[int, int]]) -> Generator[Tensor, None, None]:
        window = torch.frombuffer(mapping, dtype=torch.uint8)
        for (place, size), following in zip(places, [*places[1:], None], strict=True):
            if following is not None:
                os.posix_fadvise(self._handle, *following, os.POSIX_FADV_WILLNEED)  # returns at once; the kernel reads
            waited = posix.page_faults()
            if not self._keep:
                _fault_in(mapping, place, size)
            try:
                yield window[place : place + size]
            finally:
                self.stalls += posix.page_faults() > waited
                self.moved += 2 * size
                if not self._keep:
                    mapping.madvise(mmap.MADV_DONTNEED, place, size)

    def scratch(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], mapped from an unlinked file of its own that goes with the tensor."""
        handle = open_unlinked(self.folder)
        try:
            allocate(handle, 0, nbytes, self.folder)
            return torch.frombuffer(mmap.mmap(handle, nbytes), dtype=torch.uint8)  # which holds the file by itself
        finally:
            os.close(handle)

    def close(self) -> None:
        """Give the file back. Tensors from `read` stay good as long as somebody holds them."""
        self.unmap()
        if self._handle >= 0:
            self._finalizer()
        self._handle, self._length = -1, 0


def _fault_in(mapping: mmap.mmap, place: int, size: int) -> None:
    """Take the page faults of a range at once, which is cheaper than one by one."""
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
        rule = "lies in memory (tmpfs), so pages spilled to it would save none"
        remedy = "Write to a folder on a disk (the output folder, or TMPDIR), or use `optimizer_memory=all`"
        raise UserError(problem("folder", folder, rule, remedy))
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
        rule = f"cannot be written ({error.strerror})"
        raise UserError(problem("folder", folder, rule, "Choose a folder you may write to")) from error


def allocate(handle: int, offset: int, nbytes: int, folder: Path) -> None:
    """Allocate the blocks of a range of a file.

    Raises:
        UserError: the disk is full.
    """
    try:
        os.posix_fallocate(handle, offset, nbytes)
    except OSError as error:
        if not disk_full(error):
            raise
        rule = f"the disk has no room for {nbytes / 1e6:.0f} MB of pages"
        remedy = "Free some space there, or let more of it stay in memory"
        raise UserError(problem("folder", folder, rule, remedy)) from error


def in_memory(folder: Path) -> bool:
    """Whether a folder's file system is tmpfs or ramfs.

    Raises:
        UserError: there is no such folder.
    """
    try:
        device = os.stat(folder).st_dev
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError as error:
        rule = f"cannot be used ({error.strerror})"
        raise UserError(problem("folder", folder, rule, "Choose a folder on a disk, on Linux")) from error
    name = f"{os.major(device)}:{os.minor(device)}"
    return re.search(rf"^\d+ \d+ {name} .* - (tmpfs|ramfs) ", mounts, re.MULTILINE) is not None

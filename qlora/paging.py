"""Pages of memory in two tiers: a fast one with a budget in bytes, and a slow one for the rest.

    device   fast tier                             slow tier                     a spilled page in use
    cpu      anonymous memory of its own mapping   an unlinked, preallocated     where the file is mapped; the kernel reads ahead,
                                                   file on a disk                writes back, and takes the memory when it needs it
    cuda     device memory                         pinned memory of the host     one of two staging slots, copied on side streams

On a CPU the kernel's page cache is the transfer engine: a spilled page is used where the file maps it, and nothing is
copied. What the cache holds is no RssAnon and does not count against the budget, though `ps` shows it as resident.
Copies by a thread into buffers of our own (the alternative) doubled the time of an optimizer step. Giving mapped pages
back with MADV_DONTNEED frees no memory, only its mapping, and made it 1.4 times as long for the page faults; so the
mapping stays, until an allocation
fails: then addresses may be what is short (ulimit -v), and the file is mapped only while it is used. No managed memory:
it loses its paging on resume and never frees. Every tier belongs to its `Pager` and goes with it.

The CUDA tier has the same interface and is written after the same rules; it has not run on a card yet.
"""

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


class Pager:
    """Byte pages on `device`. Of at most `budget` bytes (None: any number) the memory is `device`'s own, the rest lies
    in the
    slow tier: on a CPU a file in `folder` (None: the system's folder for temporary files).

    With `spill` False nothing ever goes to the slow tier. `moved` counts the bytes that went in and out of spilled
    pages, `stalls` the times that one was not there yet when it was asked for.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        budget: int | None = None,
        folder: str | Path | None = None,
        spill: bool = True,
    ):
        self.device, self.budget, self.spill = torch.device(device), budget, spill
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(
                problem("device", self.device, "pages can lie on cpu and cuda", "Move the parameters there")
            )
        self._slow = PinnedMemory(self.device) if self.device.type == "cuda" else MappedFile(folder)
        self._sizes: list[int] = []
        self._fast: dict[int, Tensor] = {}  # page -> its memory
        self._places: dict[int, int] = {}  # page -> where it lies in the slow tier
        self.closed = False

    @property
    def resident(self) -> int:
        """Bytes of all pages in the fast tier."""
        return sum(self._sizes[index] for index in self._fast)

    @property
    def spilled(self) -> int:
        """Bytes of all pages in the slow tier."""
        return sum(self._sizes) - self.resident

    @property
    def moved(self) -> int:
        return self._slow.moved

    @property
    def stalls(self) -> int:
        return self._slow.stalls

    def add(self, sizes: Sequence[int]) -> range:
        """New pages of these sizes in bytes, filled with zeros; returns their numbers. A page that the fast tier has no
        room or no memory for is spilled.

        Raises:
            UserError: the slow tier has no room either; no page was added.
        """
        room = None if self.budget is None else max(0, self.budget - self.resident)
        first, fast, slow = len(self._sizes), {}, []
        for index, (size, fits) in enumerate(zip(sizes, fitting(sizes, room), strict=True), first):
            try:
                if fits:
                    fast[index] = (
                        torch.zeros(size, dtype=torch.uint8, device=self.device)
                        if self.device.type == "cuda"
                        else anonymous(size)
                    )
            except ALLOCATION_ERRORS as error:
                if not (self.spill and out_of_memory(error)):
                    raise
            if index not in fast:
                slow.append(index)
        places = self._slow.reserve([sizes[index - first] for index in slow]) if slow else []
        self._sizes += sizes
        self._fast |= fast
        self._places |= zip(slow, places, strict=True)
        return range(first, len(self._sizes))

    def evict(self, nbytes: int) -> int:
        """Move resident pages of at least `nbytes` bytes (or all there are) to the slow tier, the last first, and lower
        the budget to what stays; returns the bytes freed. Addresses that the slow tier used are freed too, for good.

        Raises:
            UserError: the slow tier has no room; nothing was moved.
        """
        chosen: list[int] = []
        for index in sorted(self._fast, reverse=True) if self.spill else ():
            if sum(self._sizes[i] for i in chosen) >= nbytes:
                break
            chosen.append(index)
        freed = sum(self._sizes[index] for index in chosen)
        for index, place in zip(
            chosen, self._slow.reserve([self._sizes[index] for index in chosen]) if chosen else [], strict=True
        ):
            self._slow.write(place, self._fast[index])
            self._places[index] = place
            del self._fast[index]
        self.budget = self.resident
        freed += self._slow.unmap()
        if chosen and self.device.type == "cuda":
            torch.cuda.empty_cache()
        return freed

    @contextmanager
    def sequence(self, order: Sequence[int]) -> Iterator[Iterator[Tensor]]:
        """An iterator over pages `order` (uint8 tensors to read and write, each good until the next is asked for),
        while the one after is being fetched.

        Everything that can fail for want of memory fails on entering, before a page is handed out.
        """
        spilled = [(self._places[index], self._sizes[index]) for index in order if index not in self._fast]
        with self._slow.walk(spilled) as window:
            yield (self._fast[index] if index in self._fast else next(window) for index in order)

    def pages(self) -> list[Tensor]:
        """Every page as it is, to read: a spilled one is mapped, on a GPU machine it is host memory. What is read
        changes with the page; it lives as long as its tensor.
        """
        spilled = [(place, self._sizes[index]) for index, place in self._places.items()]
        found = dict(zip(self._places, self._slow.read(spilled) if spilled else [], strict=True))
        return [self._fast[index] if index in self._fast else found[index] for index in range(len(self._sizes))]

    def scratch(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] outside of the pages, for what would undo the saving if it lay in memory: mapped from a file
        of its own if pages are spilled to one.
        """
        return self._slow.scratch(nbytes) if self.spilled else torch.empty(nbytes, dtype=torch.uint8)

    def close(self) -> None:
        """Give all memory and files back. Tensors from `pages` stay good as long as somebody holds them."""
        self._sizes, self._fast, self._places, self.closed = [], {}, {}, True
        self._slow.close()


def fitting(sizes: Sequence[int], budget: int | None) -> list[bool]:
    """Which of pages of these sizes are resident under a budget: in order, each that still fits."""
    result, left = [], budget
    for size in sizes:
        result.append(left is None or size <= left)
        if left is not None and result[-1]:
            left -= size
    return result


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


ALLOCATION_ERRORS = (
    MemoryError,
    OSError,
    RuntimeError,
)  # among which `out_of_memory` tells; torch.OutOfMemoryError is a RuntimeError


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, in torch's CPU allocator, in Python or in mmap."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("DefaultCPUAllocator", "bad_alloc")
    )


# ---------------------------------------------------------------- a file


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


# ---------------------------------------------------------------- pinned memory


class PinnedMemory:
    """Pages in page-locked memory of the host; two slots on the device that copies in, computation and copies out
    share:

    in stream    fetch 0 | fetch 1 | ........ | fetch 2 (slot of 0) |
    compute                | use 0   | use 1             | use 2 ...
    out stream                       | store 0 | store 1
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.moved = self.stalls = 0
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._host: list[Tensor] = []
        self._finalizer = weakref.finalize(self, _unpin, device, self._host)

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """Numbers of new pages of zeros. Raises: UserError if the host has no memory that can be pinned."""
        pinned: list[Tensor] = []
        try:
            for size in sizes:
                page = anonymous(size)
                if result := int(torch.cuda.cudart().cudaHostRegister(page.data_ptr(), size, 0)):
                    raise MemoryError(f"cudaHostRegister returned {result}")
                pinned.append(page)
        except MemoryError as error:
            _unpin(self.device, pinned)
            remedy = "Free some of it, or let more of the state stay on the device"
            raise UserError(
                problem("memory", "host", f"has no {sum(sizes) / 1e6:.0f} MB that can be pinned ({error})", remedy)
            ) from error
        self._host += pinned
        return list(range(len(self._host) - len(pinned), len(self._host)))

    def write(self, place: int, page: Tensor) -> None:
        self._host[place].copy_(page)

    def read(self, places: Sequence[tuple[int, int]]) -> list[Tensor]:
        self._out.synchronize()
        return [self._host[place] for place, _ in places]

    @contextmanager
    def walk(self, places: Sequence[tuple[int, int]]) -> Iterator[Iterator[Tensor]]:
        if not places:
            yield iter(())
            return
        largest = max(size for _, size in places)
        slots = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(min(2, len(places)))]
        compute = torch.cuda.current_stream(self.device)
        pages = self._walk(slots, compute, places)
        try:
            yield pages
        finally:
            pages.close()
            compute.wait_stream(self._in)
            compute.wait_stream(self._out)  # the slots go back to the allocator, in the order of this stream

    def _walk(
        self, slots: list[Tensor], compute: torch.cuda.Stream, places: Sequence[tuple[int, int]]
    ) -> Iterator[Tensor]:
        fetched = [torch.cuda.Event() for _ in places]
        stored = [torch.cuda.Event() for _ in places]
        self._in.wait_stream(compute)
        self._in.wait_stream(self._out)

        def fetch(k: int) -> None:
            place, size = places[k]
            if k >= 2:
                self._in.wait_event(stored[k - 2])
            with torch.cuda.stream(self._in):
                slots[k % 2][:size].copy_(self._host[place], non_blocking=True)
                fetched[k].record(self._in)

        fetch(0)
        for k, (place, size) in enumerate(places):
            if k + 1 < len(places):
                fetch(k + 1)
            self.stalls += not fetched[k].query()
            compute.wait_event(fetched[k])
            page = slots[k % 2][:size]
            try:
                yield page
            finally:
                self._out.wait_stream(compute)
                with torch.cuda.stream(self._out):
                    self._host[place].copy_(page, non_blocking=True)
                    stored[k].record(self._out)
                self.moved += 2 * size

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def unmap(self) -> int:
        return 0

    def close(self) -> None:
        self._finalizer()


def _unpin(device: torch.device, pages: list[Tensor]) -> None:
    torch.cuda.synchronize(device)  # copies to and from them may be under way
    while pages:
        page = pages.pop()  # which has to live until it is no longer registered
        torch.cuda.cudart().cudaHostUnregister(page.data_ptr())

"""Pages of memory in two tiers: a fast one with a budget in bytes, and a slow one for the rest.

    device   fast tier                              slow tier (disk_tier, pinned_tier)
    cpu      anonymous memory of its own mapping    an unlinked file on a disk, used where it is mapped
    cuda     device memory                          pinned memory of the host, copied to one of two staging slots

On a CPU the kernel's page cache moves the bytes: what it holds is no RssAnon and does not count against the budget,
though `ps` shows it as resident. Every tier belongs to its `Pager` and goes with it. The alternative, managed memory,
loses its paging on resume and never frees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qlora.errors import UserError, problem
from qlora.optim.disk_tier import MappedFile, anonymous
from qlora.optim.memory_errors import ALLOCATION_ERRORS, out_of_memory
from qlora.optim.pinned_tier import PinnedMemory


class Pager:
    """Byte pages on a device, the rest of them in the slow tier.

    Args:
        budget: bytes of pages that may lie in the device's own memory; None for any number.
        folder: where the file of a CPU's slow tier lies; None for the system's folder for temporary files.
        spill: False if nothing may ever go to the slow tier.
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
            rule = "pages can lie on cpu and cuda"
            raise UserError(problem("device", self.device, rule, "Move the parameters there"))
        self._slow: MappedFile | PinnedMemory
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
        """Bytes that went in and out of spilled pages."""
        return self._slow.moved

    @property
    def stalls(self) -> int:
        """How often a spilled page was not there yet when it was asked for."""
        return self._slow.stalls

    def add(self, sizes: Sequence[int]) -> range:
        """New pages of these sizes in bytes, filled with zeros; returns their numbers.

        A page that the fast tier has no room or no memory for is spilled.

        Raises:
            UserError: the slow tier has no room either; no page was added.
        """
        room = None if self.budget is None else max(0, self.budget - self.resident)
        first = len(self._sizes)
        fast: dict[int, Tensor] = {}
        for index, (size, fits) in enumerate(zip(sizes, fitting(sizes, room), strict=True), first):
            if fits and (memory := self._allocated(size)) is not None:
                fast[index] = memory
        slow = [index for index in range(first, first + len(sizes)) if index not in fast]
        places = self._slow.reserve([sizes[index - first] for index in slow]) if slow else []
        self._sizes += sizes
        self._fast |= fast
        self._places |= zip(slow, places, strict=True)
        return range(first, len(self._sizes))

    def _allocated(self, size: int) -> Tensor | None:
        """uint8 [size] of zeros in the fast tier, or None where the allocation fails and may be spilled."""
        try:
            if self.device.type == "cuda":
                return torch.zeros(size, dtype=torch.uint8, device=self.device)
            return anonymous(size)
        except ALLOCATION_ERRORS as error:
            if not (self.spill and out_of_memory(error)):
                raise
            return None

    def evict(self, nbytes: int) -> int:
        """Move resident pages of at least `nbytes` bytes (or all there are) to the slow tier, the last first.

        The budget becomes what stays; returns the bytes freed. So are addresses that the slow tier used, for good.

        Raises:
            UserError: the slow tier has no room; nothing was moved.
        """
        chosen: list[int] = []
        for index in sorted(self._fast, reverse=True) if self.spill else ():
            if sum(self._sizes[i] for i in chosen) >= nbytes:
                break
            chosen.append(index)
        freed = sum(self._sizes[index] for index in chosen)
        places = self._slow.reserve([self._sizes[index] for index in chosen]) if chosen else []
        for index, place in zip(chosen, places, strict=True):
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
        """An iterator over pages `order` while the one after is being fetched.

        Pages are uint8 tensors to read and write, each good until the next is asked for.

        Everything that can fail for want of memory fails on entering, before a page is handed out.
        """
        spilled = [(self._places[index], self._sizes[index]) for index in order if index not in self._fast]
        with self._slow.walk(spilled) as window:
            yield (self._fast[index] if index in self._fast else next(window) for index in order)

    def pages(self) -> list[Tensor]:
        """Every page as it is, to read: a spilled one is mapped, on a GPU machine it is host memory.

        What is read changes with the page; it lives as long as its tensor.
        """
        spilled = [(place, self._sizes[index]) for index, place in self._places.items()]
        found = dict(zip(self._places, self._slow.read(spilled) if spilled else [], strict=True))
        return [self._fast[index] if index in self._fast else found[index] for index in range(len(self._sizes))]

    def scratch(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] outside of the pages, for what would undo the saving if it lay in memory.

        Mapped from a file of its own if pages are spilled to one.
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

"""TODO head of optim.pinned_tier."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qlora.errors import UserError, problem
from qlora.optim.disk_tier import anonymous


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

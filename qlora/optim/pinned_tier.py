"""The slow tier of a GPU: pages in page-locked memory of the host, copied to and from two slots on the device.

    in stream    fetch 0 | fetch 1 | ........ | fetch 2 (slot of 0) |
    compute                | use 0   | use 1             | use 2 ...
    out stream                       | store 0 | store 1

Copying in, computation and copying out overlap; page k waits for the store of page k - 2, which had its slot. The host
waits for nothing. The alternative, managed memory, loses its paging on resume and never frees. The order of the streams
is tested with fakes (tests/optim/test_pinned_tier.py); no card has run this class yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qlora.errors import UserError, problem
from qlora.optim.disk_tier import anonymous


class PinnedMemory:
    """Pages of the host for one device. Places are page numbers here; otherwise the interface is `MappedFile`'s.

    `moved` counts the bytes copied in and out; `stalls` the pages whose copy had not ended when they were asked for.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.moved = self.stalls = 0
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._host: list[Tensor] = []
        self._finalizer = weakref.finalize(self, _unpin, device, self._host)

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """Numbers of new pages of zeros, of these sizes in bytes.

        Raises:
            UserError: the host has no memory that can be pinned.
        """
        pinned: list[Tensor] = []
        try:
            for size in sizes:
                page = anonymous(size)
                if result := int(torch.cuda.cudart().cudaHostRegister(page.data_ptr(), size, 0)):
                    raise MemoryError(f"cudaHostRegister returned {result}")
                pinned.append(page)
        except MemoryError as error:
            _unpin(self.device, pinned)
            rule = f"has no {sum(sizes) / 1e6:.0f} MB that can be pinned ({error})"
            remedy = "Free some of it, or let more of the state stay on the device"
            raise UserError(problem("memory", "host", rule, remedy)) from error
        self._host += pinned
        return list(range(len(self._host) - len(pinned), len(self._host)))

    def write(self, place: int, page: Tensor) -> None:
        """Copy a page of the device to the host; returns when it is there."""
        self._host[place].copy_(page)

    def read(self, places: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The pages of the host themselves, when every copy out has ended."""
        self._out.synchronize()
        return [self._host[place] for place, _ in places]

    @contextmanager
    def walk(self, places: Sequence[tuple[int, int]]) -> Iterator[Iterator[Tensor]]:
        """An iterator over pages on the device, to read and write, each good until the next is asked for.

        The slots are allocated on entering: what can fail fails before a page is handed out.
        """
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
    ) -> Generator[Tensor, None, None]:
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
        """uint8 [nbytes] of ordinary memory of the host."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def unmap(self) -> int:
        """Nothing: addresses are not what a GPU is short of."""
        return 0

    def close(self) -> None:
        """Wait for copies under way, and give the host's memory back."""
        self._finalizer()


def _unpin(device: torch.device, pages: list[Tensor]) -> None:
    torch.cuda.synchronize(device)  # copies to and from them may be under way
    while pages:
        page = pages.pop()  # which has to live until it is no longer registered
        torch.cuda.cudart().cudaHostUnregister(page.data_ptr())

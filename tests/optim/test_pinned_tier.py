"""The tier of a GPU on a machine without one: its copies and events, run in every order that the streams allow.

A fake stream is a queue of work. What is queued runs late, when somebody has to wait for it, or in a random order of
streams; an event that a stream waits for holds it up. A copy that comes too early or too late leaves other bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from qlora.errors import UserError
from qlora.optim.pinned_tier import PinnedMemory


class Stream:
    """Work in its order: functions, and events to wait for."""

    def __init__(self, device: object = None):
        self.queue: list[Callable[[], None] | Event] = []

    def wait_event(self, event: Event) -> None:
        self.queue.append(event)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        while self.queue:
            GPU.now.turn()

    def step(self) -> bool:
        """Do what comes next, unless it waits for an event."""
        if not self.queue or (isinstance(self.queue[0], Event) and not self.queue[0].done):
            return False
        work = self.queue.pop(0)
        if not isinstance(work, Event):
            work()
        return True


class Event:
    """Done when its stream comes to where it was recorded."""

    def __init__(self):
        self.done = False

    def record(self, stream: Stream) -> None:
        stream.queue.append(lambda: setattr(self, "done", True))

    def query(self) -> bool:
        return self.done


class GPU(TorchDispatchMode):
    """Copies are queued on the current stream; registrations are counted, and fail from the `room`-th on."""

    now: GPU

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int | None, room: int = 99):
        super().__init__()
        self.dice, self.room, self.registered = None if seed is None else random.Random(seed), room, set()
        self.compute, self.streams, self.ends, GPU.now = Stream(), [], [], self
        self.current = self.compute

        def stream(device: object) -> Stream:
            self.streams.append(Stream())
            return self.streams[-1]

        monkeypatch.setattr(torch.cuda, "Stream", stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.compute)
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.drain())
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)

    def tier(self) -> PinnedMemory:
        made = PinnedMemory(torch.device("cpu"))
        self.ends.append(made._finalizer)  # so that none outlives the fakes when a test fails
        return made

    def __exit__(self, *error):
        for end in self.ends:
            end()
        super().__exit__(*error)

    def use(self, stream: Stream):
        gpu = self

        class Chosen:
            def __enter__(self):
                self.before, gpu.current = gpu.current, stream

            def __exit__(self, *error):
                gpu.current = self.before

        return Chosen()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.registered) >= self.room:
            return 2
        self.registered.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        self.registered.remove(address)

    def turn(self) -> None:
        """One piece of work of some stream that does not wait."""
        streams = [self.compute, *self.streams]
        if self.dice:
            self.dice.shuffle(streams)
        assert any(stream.step() for stream in streams), "every stream waits for another"

    def drain(self) -> None:
        while any(stream.queue for stream in (self.compute, *self.streams)):
            self.turn()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default and self.current is not self.compute:
            target, source = args[0], args[1]
            self.current.queue.append(lambda: _copy(target, source))
            return target
        return function(*args, **(kwargs or {}))


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with _disable_current_modes():
        target.copy_(source)


def walk(gpu: GPU, tier: PinnedMemory, places: list[tuple[int, int]], by: int) -> None:
    """Add `by` to every byte of these pages, as queued work of the computing stream."""
    with tier.walk(places) as pages:
        for page in pages:
            gpu.compute.queue.append(lambda page=page: page.add_(by))
            for _ in range(gpu.dice.randrange(4) if gpu.dice else 0):
                if any(stream.queue for stream in (gpu.compute, *gpu.streams)):
                    gpu.turn()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", [None, *range(12)])
def test_every_page_is_fetched_used_and_stored_in_order(monkeypatch, count, seed):
    """Two walks, one right after the other: each page is what both left, whatever order the streams took."""
    gpu = GPU(monkeypatch, seed)
    with gpu:
        tier = gpu.tier()
        sizes = [64 + 8 * k for k in range(count)]
        places = list(zip(tier.reserve(sizes), sizes, strict=True))
        for by in (3, 4):
            walk(gpu, tier, places, by)
        assert gpu.compute.queue, "nothing was waited for"
        pages = tier.read(places)
        assert [page.tolist() for page in pages] == [[7] * size for size in sizes]
        assert tier.moved == 2 * 2 * sum(sizes)
        walk(gpu, tier, places, 1)
        tier.close()  # waits for the copies: memory in use is not given back
        assert not any(stream.queue for stream in (gpu.compute, *gpu.streams))
    assert not gpu.registered


def test_a_page_that_is_not_there_yet_is_a_stall(monkeypatch):
    gpu = GPU(monkeypatch, None)
    with gpu:
        tier = gpu.tier()
        places = list(zip(tier.reserve([8] * 3), [8] * 3, strict=True))
        walk(gpu, tier, places, 1)
        assert tier.stalls == 3
        gpu.drain()
        with tier.walk(places) as pages:
            for k, _ in enumerate(pages):
                assert tier.stalls == 4, k  # only the first: the rest has been fetched by then
                gpu.drain()


def test_memory_that_cannot_be_pinned_is_one_error_and_goes_back(monkeypatch):
    gpu = GPU(monkeypatch, None, room=3)
    with gpu:
        tier = gpu.tier()
        tier.reserve([8, 8])
        with pytest.raises(UserError, match="has no 0 MB that can be pinned"):
            tier.reserve([8, 8])
        assert len(gpu.registered) == 2 and tier.reserve([8]) == [2]
        del tier  # which gives everything back
    assert not gpu.registered

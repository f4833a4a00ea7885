"""Ctrl-C, SIGTERM and SIGHUP as a request: the step is finished and saved, then the run stops.

    first signal     `StopRequest.number` is set; the loop looks at it between steps
    second signal    what would have happened without this: KeyboardInterrupt, or the end of the process
    outside of it    `as_interrupts`: SIGTERM and SIGHUP raise `Terminated`, so that what is half written is removed

The alternative, to save inside the handler, would write a checkpoint of half a step.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from qlora.streams import tell_now

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """The run was interrupted by signal `number` and stopped after `step` steps, with a checkpoint if it saves any."""

    def __init__(self, step: int, number: int = signal.SIGINT):
        self.step, self.number = step, number
        super().__init__(f"interrupted after step {step}")


class Stopped(Exception):
    """What can be done later is left, because the run is to stop."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP (`number`) outside of a training loop."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"ended by {signal.Signals(number).name}")


def exit_code(stop: KeyboardInterrupt) -> int:
    """What a shell reports for a process that the signal ended: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + int(getattr(stop, "number", signal.SIGINT))


class StopRequest:
    """While it is entered, the first signal sets `number` (0: none came); a second one acts as without this.

    A signal that the process was told to ignore stays ignored: a shell starts what runs behind it (`&`) so that its
    Ctrl-C is not meant for it, and nohup so that a closed terminal is not. Handlers are heard by the main thread alone;
    in another one a run stops when the main thread ended with a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run is to stop."""
        if not self.number and not threading.main_thread().is_alive():
            ended = getattr(sys, "last_type", None)  # of the main thread; Python waits for the others now
            if isinstance(ended, type) and issubclass(ended, KeyboardInterrupt):
                self.number = signal.SIGINT
        return self.number != 0

    def check(self) -> None:
        """Leave what can be done later, an evaluation for one.

        Raises:
            Stopped: the run is to stop.
        """
        if self.requested:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        tell_now("\nStopping after this step; once more stops at once and loses it.\n")

    def _restore(self) -> None:
        _restore(self._before)
        self._before = {}

    def __enter__(self) -> StopRequest:
        self._before = _set(SIGNALS, self._note, lambda handler: handler != signal.SIG_IGN)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()


@contextmanager
def as_interrupts() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `Terminated`, where they would have ended the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    others = [number for number in SIGNALS if number != signal.SIGINT]
    before = _set(others, stop, lambda handler: handler == signal.SIG_DFL)
    try:
        yield
    finally:
        _restore(before)


def _set(numbers: Any, handler: Callable[..., Any], where: Callable[[Any], bool]) -> dict[int, Any]:
    """Set `handler` for the signals whose present one passes `where`; returns those that it replaced."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        return {}
    found = {number: signal.getsignal(number) for number in numbers}
    # None is a handler that Python did not set, and cannot put back.
    return {
        number: signal.signal(number, handler)
        for number, before in found.items()
        if before is not None and where(before)
    }


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)

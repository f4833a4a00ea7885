"""Ctrl-C and SIGTERM as a request: the step is finished and saved, then the run stops.

    first signal     `StopRequest.requested` is set; the loop looks at it between steps
    second signal    what would have happened without this: KeyboardInterrupt, or the end of the process

The alternative, to save inside the handler, would write a checkpoint of half a step.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The run was interrupted and stopped after `step` steps, with a checkpoint if it saves any."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"interrupted after step {step}")


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM sets `requested`; a second one acts as without this.

    A signal that the process was told to ignore stays ignored: a shell starts what runs behind it (`&`) so that its
    Ctrl-C is not meant for it.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        print("\nStopping after this step; once more stops at once and loses it.", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

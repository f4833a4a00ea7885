"""TODO head of train.signals."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (or SIGTERM) came and the run stopped after `step` steps, with a checkpoint if it saves any."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"interrupted after step {step}")


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM sets `asked`; a second one stops at once, as without this. One
    that the
    process was told to ignore stays ignored: a shell starts what runs behind it (`&`) so that its Ctrl-C is not meant
    for it.
    """

    def __init__(self):
        self.asked = False
        self._before: dict[int, Any] = {}

    def _note(self, number, frame) -> None:
        self.asked = True
        self._restore()
        print("\nStopping after this step; once more stops at once and loses it.", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error) -> None:
        self._restore()

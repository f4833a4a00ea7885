"""Standard output and error of a program whose work matters more than what it says.

    with steady():   whatever is printed inside cannot fail: a reader that is gone, a closed terminal, a stream that is
                     closed or missing, letters that the stream's encoding does not have (written as \\xNN)

A stream that failed once leads to /dev/null from then on, its descriptor too, so that C code and the flush at the end
of Python do not fail either. The alternative, a guard around each `print`, forgets those of other libraries.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any


class Steady:
    """A text stream in front of another one (or of None) that never raises."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.lost = stream is None

    def write(self, text: str) -> int:
        """Write, as far as it can be written; returns the length of `text`."""
        if not self.lost:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except (OSError, ValueError):  # nobody reads, the terminal is gone, or it was closed
                self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flush, or give the stream up."""
        if not self.lost:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def isatty(self) -> bool:
        """Whether somebody looks at it on a terminal."""
        return not self.lost and not getattr(self._stream, "closed", False) and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)

    def _give_up(self) -> None:
        self.lost = True
        drop(self._stream)


@contextmanager
def steady() -> Iterator[None]:
    """Within it sys.stdout and sys.stderr are `Steady`."""
    with redirect_stdout(_steady(sys.stdout)), redirect_stderr(_steady(sys.stderr)):
        yield


def _steady(stream: Any) -> Any:
    return stream if isinstance(stream, Steady) else Steady(stream)


def drop(stream: Any) -> None:
    """Lead a stream's descriptor to /dev/null: what it still holds must not be tried again when Python exits. A stream
    without one is left as it is.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def open_missing() -> None:
    """Open /dev/null for each of the descriptors 0, 1, 2 that is closed (as after `>&-`).

    The next file opened would get that number, and what C code or a child prints would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")


def tell_now(text: str) -> None:
    """Write to standard error from a signal handler: past Python's streams, which are not reentrant, and only where it
    cannot block.
    """
    try:
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode())
    except (OSError, ValueError):
        pass

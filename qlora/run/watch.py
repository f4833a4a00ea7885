"""How far a work on the layers of a model is, on stderr: a live bar on a terminal, a line every 10 seconds elsewhere.

    with watched("start", len(layers)) as done:    done() after each layer

The alternative, the bar of training for this too, would count layers as steps in metrics.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qlora.train.metrics import duration

SECONDS = 10.0  # between two lines


@contextmanager
def watched(task: str, layers: int) -> Iterator[Callable[[], None]]:
    """A function to call once for each of the `layers` that is finished."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description:8}"), BarColumn(bar_width=20), MofNCompleteColumn()
        text = TextColumn("layers"), TimeRemainingColumn()
        with Progress(*columns, *text, console=Console(file=sys.stderr), transient=True) as live:
            bar = live.add_task(task, total=layers)
            yield lambda: live.advance(bar)
        return
    began = shown = time.monotonic()
    finished = 0

    def done() -> None:
        nonlocal finished, shown
        finished, now = finished + 1, time.monotonic()
        if now - shown >= SECONDS:
            left = duration((now - began) / finished * (layers - finished))
            print(f"{task:8} {finished} of {layers} layers, {left} left", file=sys.stderr, flush=True)
            shown = now

    yield done

"""The line that is shown while a run trains."""

from __future__ import annotations

import time

from qlora.train.metrics import Progress


def test_an_evaluation_before_the_steps_does_not_count_in_the_time_left(monkeypatch, capsys):
    """Steps of 2 seconds after an evaluation of 100; a resumed run counts its own steps."""
    for first in (0, 5):
        now = [1000.0]
        monkeypatch.setattr(time, "monotonic", lambda now=now: now[0])
        progress = Progress(first + 30, first)
        now[0] += 100
        progress.show({"step": first, "eval_loss": 2.0, "memory_bytes": 10**9})
        now[0] += 2
        progress.show({"step": first + 1, "loss": 1.0, "memory_bytes": 10**9})
        assert capsys.readouterr().err.splitlines()[-1].endswith("  0:58 left")

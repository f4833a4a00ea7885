"""The work of `qlora selftest` in a process of its own, which may die or hang: a line of JSON for all that happens.

    python -m qlora.selftest.child operators|training|speed DEVICE NAME ...

A kernel that reads what is not its own ends the process, and on a card every process' use of it until then; `report`
notes which one it was and starts another for the rest. The alternative, one process, ends with the first such kernel.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qlora.models.device import resolve_device
from qlora.selftest import operators, speed
from qlora.selftest.names import TRAINING
from qlora_kernels import backends

Told = dict[str, Any]


def _operators(device: torch.device, names: list[str]) -> Iterator[Told]:
    backends.in_use(device)  # which recalls what failed before: that is asked again
    backends.AVOIDED.clear()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills `torch.empty` with NaN or the largest integer
    for name in names:
        yield {"begin": name}
        worst: Told = {"error": -1.0, "limit": 0.0, "shape": ""}
        before, began = backends.ROUTES.copy(), time.perf_counter()
        for draw in operators.shapes(device, name):
            error, limit = operators.errors(name, draw)
            if error > worst["error"] or error > limit:
                worst = {"error": error, "limit": limit, "shape": str(draw)}
            if error > limit:
                break
        ran = backends.routes(since=before).get(name, {})
        yield {"end": name, **worst, "ran": ran, "seconds": time.perf_counter() - began}


def _training(device: torch.device, names: list[str]) -> Iterator[Told]:
    from qlora.selftest import training  # loads all that trains, which the operators do without

    for name in names:
        yield {"begin": name}
        began = time.perf_counter()
        error, limit = training.CHECKS[name](device)
        yield {"end": name, "error": error, "limit": limit, "seconds": time.perf_counter() - began}


def _speed(device: torch.device, names: list[str]) -> Iterator[Told]:
    for name in names:
        yield {"begin": name}
        yield {"end": name, "share": speed.share_of_copy(name, device)}


SECTIONS: dict[str, tuple[Callable[[torch.device, list[str]], Iterator[Told]], list[str]]] = {
    "operators": (_operators, list(operators.CASES)),
    "training": (_training, list(TRAINING)),
    "speed": (_speed, list(speed.NAMES)),
}


def main() -> None:
    """Run the section that the arguments name."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a run prints goes to standard error
    section, device, *names = sys.argv[1:]
    for told in SECTIONS[section][0](resolve_device(device), names):
        out.write(json.dumps(told) + "\n")
        out.flush()


if __name__ == "__main__":
    main()

"""`qlora selftest`: every kernel of the backend in use, then what a model has to keep, then times; a table and JSON.

An operator whose kernel is wrong, dies or hangs is named, and goes to the next backend from then on
(`qlora_kernels.avoided`), which the rest of the test already does. The alternative, a warning, leaves the user to train
on it.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qlora.doctor import report as doctor_report
from qlora.errors import UserError, guard, problem
from qlora.models.device import resolve_device
from qlora.selftest.child import SECTIONS
from qlora_kernels import avoided, backends

SECONDS = 120  # that one check may take; on a card the first one compiles


@dataclass(frozen=True)
class Row:
    """One check: `error` beside `limit`, or what `failed`; of an operator the worst `shape` and the backend it `ran`
    on; of a time its `share` of a copy's speed.
    """

    section: str
    name: str
    error: float | None = None
    limit: float | None = None
    shape: str = ""
    ran: str = ""
    share: float | None = None
    failed: str = ""

    @property
    def ok(self) -> bool:
        return not self.failed and (self.error is None or self.limit is None or self.error <= self.limit)

    def __str__(self) -> str:
        if self.share is not None:
            return f"  {self.name:<34} {self.share:6.0%} of a copy's speed"
        said = self.failed or f"{self.error:.1e} (at most {self.limit:.0e})"
        where = f"  {self.ran}" if self.ran else ""
        shape = f"  at {self.shape}" if self.shape and not self.ok else ""
        return f"  {self.name:<34} {'ok   ' if self.ok else 'WRONG'} {said}{where}{shape}"


def selftest(device: str, only: str | None = None) -> dict[str, Any]:
    """All rows, what is gone round from now on, and what `qlora doctor` tells of the machine.

    Args:
        only: names of checks with commas between them; what is known of the kernels of others is kept.

    Raises:
        UserError: no such device or check, or the cache cannot be written.
    """
    place, names = resolve_device(device), _chosen(only)
    backend = backends.in_use(place)
    rows = list(_rows("operators", place, names["operators"]))
    wrong = {row.name: _why(row) for row in rows if not row.ok and backend in row.ran.split()}
    if backend != "reference":
        key = backends.machine(backend, place.index)
        known = {name: why for name, why in avoided.read(key).items() if name not in names["operators"]}
        remedy = "Make it writable, or set XDG_CACHE_HOME"
        with guard("selftest", avoided.file(), "the cache cannot be written", remedy):
            avoided.write(key, known | wrong)
    for section in ("training", "speed"):
        rows += _rows(section, place, names[section])
    return {"device": str(place), "backend": backend, "avoided": wrong, "rows": rows, "machine": doctor_report()}


def _chosen(only: str | None) -> dict[str, list[str]]:
    """The checks of each section that are asked for."""
    every = {name for _, names in SECTIONS.values() for name in names}
    asked = every if only is None else {name.strip() for name in only.split(",")}
    if unknown := sorted(asked - every):
        raise UserError(problem("only", ", ".join(unknown), "is no check", f"Choose from {', '.join(sorted(every))}"))
    return {section: [name for name in names if name in asked] for section, (_, names) in SECTIONS.items()}


def _why(row: Row) -> str:
    return row.failed or f"error {row.error:.1e} at {row.shape}"


def as_text(found: dict[str, Any]) -> str:
    """The table."""
    rows = found["rows"]
    lines = [f"{found['device']}, {found['machine']['used']['kernels'][found['device'].partition(':')[0]]}"]
    for section in SECTIONS:
        lines += ["", section.capitalize(), *(str(row) for row in rows if row.section == section)]
    wrong = [row for row in rows if not row.ok]
    lines += ["", f"{len(rows) - len(wrong)} of {len(rows)} in order"]
    if found["avoided"]:
        lines.append(f"gone round from now on: {', '.join(found['avoided'])} (kept in {avoided.file()})")
    return "\n".join(lines)


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    """The same for programs, and for a report of a defect."""
    rows = [{**asdict(row), "ok": row.ok} for row in found["rows"]]
    for row in rows:  # JSON has no infinity
        row["error"] = row["error"] if row["error"] is None or row["error"] < float("inf") else None
    return {**found, "rows": rows}


# ---------------------------------------------------------------- the children


def _rows(section: str, device: torch.device, names: list[str]) -> Iterator[Row]:
    """The rows of these checks. Where their process fails in one, another one goes on behind it."""
    names = list(names)
    while names:
        under_way = names[0]
        for told in _watched(section, device, names):
            if "begin" in told:
                under_way = told["begin"]
            elif "end" in told:
                names.remove(told["end"])
                ran = " ".join(told.get("ran") or {})
                kept = {key: told[key] for key in ("error", "limit", "shape", "share") if key in told}
                yield Row(section, told["end"], ran=ran, **kept)
            elif names:
                under_way = under_way if under_way in names else names[0]  # or it died between two
                names.remove(under_way)
                ran = backends.in_use(device) if section == "operators" else ""
                yield Row(section, under_way, failed=told["lost"], ran=ran)


def _watched(section: str, device: torch.device, names: list[str]) -> Iterator[dict[str, Any]]:
    """What a child tells; then "lost" if it failed, died, or took too long over a check."""
    command = [sys.executable, "-m", "qlora.selftest.child", section, str(device), *names]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        lines: queue.Queue[str] = queue.Queue()
        stream = process.stdout
        assert stream is not None

        def read() -> None:
            with stream:
                for line in stream:
                    lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()
        open_ended = True
        try:
            while line := lines.get(timeout=SECONDS):
                yield json.loads(line)
            open_ended = False
        except queue.Empty:
            yield {"lost": f"took more than {SECONDS} s"}
            return
        finally:
            if open_ended:  # too slow, or nobody wants the rest
                process.kill()
        if code := process.wait():
            said.seek(0)
            words = _last_words(said.read().decode(errors="replace"))
            yield {"lost": f"signal {-code}" if code < 0 else words or f"exit code {code}"}


def _last_words(text: str) -> str:
    """The first line of the exception that ended a process, and the last: an error of torch says first what happened,
    and then in several lines how to find out more, one of Triton where, and last what.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    begin = max((i for i, line in enumerate(lines) if line.startswith("Traceback (")), default=-2) + 1
    raised = next((i for i in range(max(begin, 0), len(lines)) if not lines[i].startswith(" ")), len(lines) - 1)
    ends = lines[raised : raised + 1] if begin > 0 else []
    ends += [line for line in lines[-1:] if line not in ends]
    return " ... ".join(line.strip()[:200] for line in ends)

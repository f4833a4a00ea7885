"""A share of scripts/trials/fuzz.py: damaged, lying and absurd files end in finite numbers or in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).resolve().parents[1] / "scripts/trials/fuzz.py"


def test_two_thousand_cases(tmp_path):
    """In a process of its own: its children are forked, so it must not have used OpenMP's threads before."""
    command = [sys.executable, FUZZ, "--cases", "2000", "--seed", "1", "--json", tmp_path / "tally.json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    tally = json.loads((tmp_path / "tally.json").read_text())
    counts, targets = tally["counts"], 11
    assert len(counts) == targets and sum(sum(found.values()) for found in counts.values()) == 2000
    assert tally["places"] == {}
    assert all(found["clean"] for found in counts.values())
    assert sum(found.get("ok", 0) for found in counts.values()) > 100  # some damage is harmless, so wholes are whole

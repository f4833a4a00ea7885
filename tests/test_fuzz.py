"""A share of scripts/trials/fuzz.py: damaged, lying and absurd files end in finite numbers or in one line."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts/trials"))

from fuzz import SHARES, fuzz


def test_two_thousand_cases():
    tally = fuzz(2000, seed=1)
    assert sum(found.total() for found in tally.counts.values()) == 2000 and set(tally.counts) == set(SHARES)
    assert tally.places == {}
    assert all(found["clean"] for found in tally.counts.values())
    assert sum(found["ok"] for found in tally.counts.values()) > 100  # some damage is harmless, so wholes are whole

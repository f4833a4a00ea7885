"""A share of the trial that damages checkpoints and adapters at random: nothing may be silently different."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def test_random_damage_is_never_silent(tmp_path):
    path = Path(__file__).resolve().parents[2] / "scripts/trials/damage.py"
    spec = importlib.util.spec_from_file_location("damage", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    threads = torch.get_num_threads()
    tally = script.trial(60, 3, tmp_path)
    torch.set_num_threads(threads)
    assert {"SILENT", "TRACEBACK"} & tally.keys() == set()
    assert min(tally[ended] for ended in ("refused", "said", "harmless")) >= 5, tally

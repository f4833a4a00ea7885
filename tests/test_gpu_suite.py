"""scripts/gpu_suite.py where there is no card: the code that the first minute on one will run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SUITE = Path(__file__).resolve().parents[1] / "scripts" / "gpu_suite.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(str(SUITE.parents[1] / name) for name in (".", "kernels"))
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(SUITE), *arguments], env=environment, capture_output=True, text=True, check=False)


def test_small_shapes_on_a_cpu(tmp_path):
    done = run("--device", "cpu", "--small", "--only", "train,cap", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failed"] == {} and found["about"]["small"]
    agreeing = {row["name"]: row["met"] for row in found["rows"] if row["must"]}
    assert agreeing == {"small 64 tokens: first losses agree to": True, "the README's lines, small, 4 x 64 tokens": True}
    sides = {row["name"].rpartition(": ")[2] for row in found["rows"] if row["unit"] == "tokens/s"}
    assert sides == {"ours", "peft"}


def test_without_a_card_it_says_so_in_one_line():
    done = run()
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "sees no CUDA device" in done.stderr

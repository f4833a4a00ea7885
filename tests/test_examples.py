"""scripts/examples as a reader runs them: the flat loop, and the notebook cell by cell (without jupyter)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "scripts/examples"


def test_the_loop_learns_and_saves(tmp_path):
    command = [sys.executable, EXAMPLES / "finetune_loop.py", "--steps", 2, "--batch-size", 1, "--held-out", 2]
    done = subprocess.run([*map(str, command), "--output", str(tmp_path / "adapter")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", done.stdout))
    assert after < 0.8 * before
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    model, merged = capsys.readouterr().out.splitlines()[-2:]
    assert model == merged and "house wine" in model  # what is in the folder answers as the adapter did

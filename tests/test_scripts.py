"""Scripts name only what there is. Most of their imports stand inside functions, and no test runs every benchmark."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers

HOUSE = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((HOUSE / "scripts").rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_imports_from_us_exists(script):
    missing = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("qlora", "qlora_kernels"):
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    try:
                        importlib.import_module(f"{node.module}.{name.name}")
                    except ModuleNotFoundError:
                        missing.append(f"{node.module}.{name.name}")
    assert SCRIPTS and missing == []


def test_a_contestant_of_the_training_benchmark_is_who_it_says(tmp_path):
    """Side and method once were in each other's place: PEFT ran under both names, and the losses agreed."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny.SMALL | {"vocab_size": 30_010}, intermediate_size=192)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)

    def one(name: str) -> dict:
        command = [sys.executable, str(HOUSE / "scripts/benchmarks/bench_train.py"), "--one", *name.split(), "1x8"]
        command += ["--folder", str(tmp_path), "--steps", "1"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    ours, theirs = one("dora ours int16"), one("dora peft fp32")
    assert (ours["model"], theirs["model"]) == ("LlamaForCausalLM", "PeftModelForCausalLM")
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)


def test_a_run_of_the_budget_benchmark_is_read():
    """Its metrics once began with a line that it did not know."""
    code = (
        "import measure_budget as m; run = m.finetune(str(m.TICKETS), 2, None); print(run['code'], len(run['losses']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=HOUSE / "scripts/benchmarks", capture_output=True, text=True, timeout=600
    )
    assert run.stdout.split() == ["0", "2"], run.stdout + run.stderr

"""scripts/benchmarks/gpu_suite.py where there is no card: the code that the first minute on one will run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[1]
SUITE = HOUSE / "scripts/benchmarks/gpu_suite.py"


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
    paths = os.pathsep.join([*[before] * bool(before), *(str(HOUSE / name) for name in (".", "kernels"))])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(SUITE), *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_small_shapes_on_a_cpu(tmp_path):
    done = run("--device", "cpu", "--small", "--only", "train,mixed,cap", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failed"] == {} and found["about"]["small"]
    agreeing = {row["name"]: row["met"] for row in found["rows"] if row["must"]}
    assert agreeing == {
        "small 64 tokens: first losses agree to": True,
        "the README's lines, small, 4 x 64 tokens": True,
    }
    of_train = [row for row in found["rows"] if row["part"] == "train" and row["unit"] == "tokens/s"]
    sides = {row["name"].rpartition(": ")[2] for row in of_train}
    assert sides == {"ours", "peft"}
    mixed = [row["name"] for row in found["rows"] if row["part"] == "mixed" and row["unit"] == "tokens/s"]
    assert mixed == ["small equal lengths", "small unequal lengths", "small new lengths"]


def test_two_calls_are_all_parts():
    shown = run("--help").stdout
    assert "first, or rest" in shown
    done = run("--device", "cpu", "--small", "--only", "first,nonsense")
    assert done.returncode == 2 and "kernels,bandwidth,train,mixed,profile" not in done.stdout
    assert "--only nonsense: no such part" in done.stderr and done.stderr.strip().endswith("first, rest")


def test_what_fails_does_not_take_the_rest_along(tmp_path):
    """A bitsandbytes that breaks on import, as one for another CUDA does."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("raise RuntimeError('no library for this CUDA')")
    done = run(
        "--device",
        "cpu",
        "--small",
        "--only",
        "bandwidth,plan",
        "--json",
        str(tmp_path / "found.json"),
        before=str(tmp_path),
    )
    found = json.loads((tmp_path / "found.json").read_text())
    wrong = {row["name"]: row["value"] for row in found["rows"] if row["must"] and not row["met"]}
    assert wrong == {"bitsandbytes": "failed: RuntimeError: no library for this CUDA"} and done.returncode == 1
    assert {row["part"] for row in found["rows"]} == set(found["seconds"]) == {"bandwidth", "plan"}
    assert "wrong: bitsandbytes; short" in done.stdout and "RuntimeError: no library" in done.stderr


def test_what_is_not_installed_is_said_in_a_row(tmp_path):
    """As on a machine that has torch, transformers and little else."""
    absent = ("pydantic", "bitsandbytes", "datasets", "rich", "gguf")
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({absent}))")
    done = run(
        "--device",
        "cpu",
        "--small",
        "--only",
        "bandwidth,plan,cap,generate",
        "--json",
        str(tmp_path / "found.json"),
        before=str(tmp_path),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failed"] == {} and "Traceback" not in done.stderr
    assert [(row["part"], row["name"]) for row in found["rows"] if row["value"] == "not installed"] == [
        ("bandwidth", "dequantize, times bitsandbytes' speed"),
        ("plan", "pydantic"),
        ("cap", "pydantic"),
        ("generate", "PEFT + bitsandbytes"),
    ]


def test_without_a_card_it_says_so_in_one_line():
    done = run()
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "sees no CUDA device" in done.stderr

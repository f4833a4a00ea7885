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


def rows_of(path: Path) -> dict[str, dict[str, dict]]:
    """Rows by part and name; every one that has to be so is so."""
    found = json.loads(path.read_text())
    assert found["failed"] == {} and found["about"]["small"]
    assert [row["name"] for row in found["rows"] if row["must"] and not row["met"]] == []
    parts: dict[str, dict[str, dict]] = {}
    for row in found["rows"]:
        parts.setdefault(row["part"], {})[f"{row['name']} {row['unit']}".strip()] = row
    return parts


def test_small_shapes_on_a_cpu(tmp_path):
    parts = "train,mixed,cap,records,gradients,attention,vocabulary,long,doctor"
    done = run("--device", "cpu", "--small", "--only", parts, "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = rows_of(tmp_path / "found.json")
    assert list(rows) == parts.split(",")
    assert rows["train"]["small 64 tokens: first losses agree to"]["must"]
    assert rows["cap"]["the README's lines, small, 4 x 64 tokens GB reserved"]["must"]
    of_train = [row for row in rows["train"].values() if row["unit"] == "tokens/s"]
    sides = {row["name"].rpartition(": ")[2] for row in of_train}
    assert sides == {"ours", "peft"}
    mixed = [row["name"] for row in rows["mixed"].values() if row["unit"] == "tokens/s"]
    assert mixed == ["small equal lengths", "small unequal lengths", "small new lengths"]
    for names in (("dx", "dA", "dB"), ("dx", "dA", "dB", "dm")):
        method = "dora" if "dm" in names else "lora"
        for of in ("a layer", "q, k and v"):
            errors = [rows["gradients"][f"{method}, {of}: {name} beside float64 relative"] for name in names]
            assert all(row["must"] and 1e-4 < row["value"] < 4e-3 for row in errors)  # 0 would be of float32
    exact = [row["value"] for name, row in rows["attention"].items() if "beside float64" in name]
    assert len(exact) == 8 and max(exact[:6]) < 5e-3 and max(exact[6:]) < 1e-6
    assert [row["unit"] for row in rows["vocabulary"].values()].count("TFLOP/s") == 2
    assert [row["name"].split()[-3] for row in rows["long"].values() if row["unit"] == "tokens/s"] == [
        "96",
        "96",
        "192",
    ]
    launched = [row["value"] for name, row in rows["records"].items() if "launches of a step" in name]
    assert len(launched) == 2 and min(launched) > 1


def test_the_first_step_of_a_process_is_timed(tmp_path):
    """With an empty cache and with the one that this left, and in the order in which it comes about."""
    done = run("--device", "cpu", "--small", "--only", "start", "--sanitize", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = rows_of(tmp_path / "found.json")
    for name in ("cold", "warm"):
        times = [rows["start"][f"{name}: {what} s"]["value"] for what in ("imported", "model ready", "first step done")]
        assert 0 < times[0] < times[1] < times[2]
    assert rows["sanitize"]["compute-sanitizer"]["value"] == "a CPU has none"


def test_two_calls_are_all_parts():
    shown = run("--help").stdout
    assert "first, or rest" in shown
    done = run("--device", "cpu", "--small", "--only", "first,nonsense")
    assert done.returncode == 2 and done.stdout == ""
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


LIMITS = """
import json, queue, sys, threading, time
sys.path.insert(0, {folder!r})
import gpu_suite

def told(*lines):
    there = queue.Queue()
    def put():
        for line in lines:
            time.sleep(line) if isinstance(line, float) else there.put(line and json.dumps(line))
    threading.Thread(target=put, daemon=True).start()
    return [list(one)[0] for one in gpu_suite.in_time(there, 0.02)]  # of doctor's 10 seconds: 0.2

print(told({{"begin": "doctor"}}, {{"compiling": 60}}, 1.0, {{"end": "doctor"}}, None))
try:
    told({{"begin": "doctor"}}, 3.0, {{"end": "doctor"}}, None)
except TimeoutError as error:
    print(error)
print({{name: sum(gpu_suite.PARTS[part].seconds for part in parts) < 480 for name, parts in gpu_suite.CALLS.items()}})

import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sys.path.insert(0, {scratch!r})
import one_kernel
seconds = []
bench = gpu_suite.Bench(torch.device("cpu"), True, print, compiling=seconds.append)
bench.listen()
for _ in range(2):
    source = ASTSource(one_kernel.add, {{"x": "*fp32"}}, {{}})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(len(seconds), seconds == bench.compiled and seconds[0] > 0)
"""
KERNEL = """
import triton, triton.language as tl

@triton.jit
def add(x):
    tl.store(x, tl.load(x) + 1)
"""


def test_what_is_compiled_counts_against_no_part(tmp_path):
    """A part has a limit, those of a call are under 8 minutes, and a kernel's first compilation is told of."""
    (tmp_path / "one_kernel.py").write_text(KERNEL)
    script = LIMITS.format(folder=str(SUITE.parent), scratch=str(tmp_path))
    paths = os.pathsep.join(str(HOUSE / name) for name in (".", "kernels"))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "['begin', 'end']",
        "took more than 0.2 seconds",
        "{'first': True, 'rest': True}",
        "1 True",
    ], done.stderr

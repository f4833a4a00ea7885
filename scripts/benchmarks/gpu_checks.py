"""Parts of gpu_suite.py: what the machine is, `qlora selftest`, and NVIDIA's own checkers over our kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from gpu_bench import Bench

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
WHERE = "not found: it comes with the CUDA toolkit, or by: pip install nvidia-cuda-sanitizer-api"
WHERE_ELSE = (
    *(Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ),
    Path("/usr/local/cuda"),
    *sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*")),
)
FOUND = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
OF_SMALL = "dequantize_4bit,joined_gradients"  # of the checks of a selftest


def part_doctor(bench: Bench) -> None:
    from qlora.doctor import report

    found = report()
    bench.row("kernels", found["used"]["kernels"][bench.device.type])
    for entry in found["missing"]:
        bench.row(entry["what"], f"missing: {entry['why']}")


def part_selftest(bench: Bench) -> None:
    """A kernel that is wrong is gone round in the parts that follow, as it will be in training."""
    from qlora.selftest.report import selftest

    for row in selftest(str(bench.device), OF_SMALL if bench.small else None)["rows"]:
        if row.share is not None:
            bench.row(row.name, row.share, "of a copy")
        else:
            bench.row(row.name, row.failed or row.error, "" if row.failed else "error", met=row.ok, must=True)


def part_sanitize(bench: Bench) -> None:
    """compute-sanitizer's four tools over part `kernels` at small shapes, each in a process of its own.

    torch then asks CUDA for every tensor, so that what is read beside one is seen.
    """
    tool = sanitizer()
    if tool is None or not bench.cuda:
        bench.row("compute-sanitizer", WHERE if bench.cuda else "a CPU has none")
        return
    suite = Path(__file__).with_name("gpu_suite.py")
    command = [sys.executable, str(suite), "--work", "kernels", "--device", str(bench.device), "--small"]
    for name in TOOLS:
        with bench.attempt(name):
            done = subprocess.run(
                [tool, "--tool", name, "--error-exitcode", "99", *command],
                env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            said = done.stdout + done.stderr
            counts = [int(one or other) for one, other in FOUND.findall(said)]
            if not counts:
                raise RuntimeError(f"exit code {done.returncode}: {(said.strip().splitlines() or [''])[-1]}")
            if counts[-1]:
                sys.stderr.write(said[-6000:])
            bench.row(name, counts[-1], "errors", most=0, must=True)


def sanitizer() -> str | None:
    """The path of compute-sanitizer: on PATH, of the toolkit, or of NVIDIA's package."""
    folders = [os.environ.get("PATH", os.defpath), *(str(folder / "bin") for folder in WHERE_ELSE)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))

"""NEON without an ARM processor: the library is compiled by a cross compiler, and the tests of the other instruction
sets run as they are on it, behind an emulator (tests/support/emulated.py).

Debian has both tools: `apt-get install g++-aarch64-linux-gnu qemu-user`. Where one is missing this file says so and
tests nothing. An emulator is about a hundred times slower, so a share runs here; CONTRIBUTING.md has the command for
all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

from qlora_kernels.cpu import build

KERNELS = Path(__file__).parent
SHARE = {
    "test_layer.py": "neon and highest and (33x or 130x or 31x or 1x96) and (in_float32 or bf16_that) or float32_has",
    "test_nf4.py": "neon and (codes_equal or decoded_bits or not_finite or nested_codes) or fitted_scales_and and 77",
    "test_levels.py": "neon and (scales_equal or decoded_bits)",
    "test_step.py": "neon and (equal_the_reference or rounded_once or edges)",
    "test_adapter.py": "neon and (row_norms or columnwise_dot or products_of_a_layer and nested and 95x)",
    "test_optim.py": "neon and 8bit",
    "test_geglu.py": "neon and kernels_equal_the_reference",
}


def test_the_reference_tests_pass_on_neon():
    if emulated.CHOSEN:
        return
    if missing := emulated.missing():
        pytest.skip(f"NEON was not tested: {' and '.join(missing)} not found")
    files, words = (
        [str(KERNELS / name) for name in SHARE],
        " or ".join(f"({name} and ({k}))" for name, k in SHARE.items()),
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files, "-k", words],
        env={**os.environ, "QLORA_TEST_MACHINE": emulated.MACHINE},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and re.search(r"\b\d{3,} passed", run.stdout), run.stdout + run.stderr


def test_apples_compiler_is_asked_for_openmp(monkeypatch, tmp_path, capsys):
    compiler = tmp_path / "without"
    compiler.write_text('#!/bin/sh\necho "unsupported option -fopenmp" >&2\nexit 1\n')
    compiler.chmod(0o755)
    assert build.threading_flags([str(compiler)]) == ["-fopenmp"]  # elsewhere none is asked
    monkeypatch.setattr(sys, "platform", "darwin")
    assert build.threading_flags(["g++"]) == ["-fopenmp"]
    assert capsys.readouterr().err == ""
    assert build.threading_flags([str(compiler)]) == []
    assert capsys.readouterr().err.startswith("the native kernels will run on one thread")


def test_each_machine_has_its_own_files():
    shared = {*build.PORTABLE, *build.COMMON}
    own = {machine: set(build.sources(machine)) - shared for machine in ("x86_64", "arm64", "riscv64")}
    assert own == {"x86_64": {"avx2.cpp", "avx_vnni.cpp", "avx512.cpp"}, "arm64": {"neon.cpp"}, "riscv64": set()}

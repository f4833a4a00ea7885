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

KERNELS = Path(__file__).parent
SHARE = {
    "test_layer.py": "test_a_layer_in_float32 and neon and highest and (33x or 130x) or float32_has_kernels",
    "test_nf4.py": "neon and (codes_equal or decoded_bits or not_finite or nested_codes) or fitted_scales_and",
    "test_levels.py": "neon and (scales_equal or decoded_bits)",
    "test_step.py": "neon and (equal_the_reference or rounded_once or edges)",
    "test_adapter.py": "neon and (row_norms or columnwise_dot)",
    "test_optim.py": "neon and 8bit",
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
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", words],
        env={**os.environ, "QLORA_TEST_MACHINE": emulated.MACHINE},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and re.search(r"^\d{3,} passed", run.stdout, re.MULTILINE), run.stdout + run.stderr

"""The Triton kernels without a GPU: equal to the reference in Triton's interpreter, and compiled for the cards that
people have.

What only a card can show is in scripts/benchmarks/gpu_suite.py. Interpreter and compiler exclude each other, so each
has a
process: triton_interpret.py and triton_compile.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton_compile
import triton_interpret
import triton_races

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests" / "support")))


def run(
    script: str, folder: Path, *arguments: str, **variables: str
) -> tuple[dict[str, str], subprocess.CompletedProcess]:
    """What a script printed, by check, and how it ended. Nothing that was compiled before counts."""
    environment = {**os.environ, "PYTHONPATH": PATHS, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "support" / script), *arguments]
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=600, check=False
    )
    return dict(line.split("\t") for line in done.stdout.splitlines()), done


def test_every_kernel_equals_the_reference_in_the_interpreter(tmp_path):
    found, done = run("triton_interpret.py", tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert found == dict.fromkeys(triton_interpret.INTERPRETED, "ok")


def test_programs_in_any_order_do_not_race(tmp_path):
    """And the results are right. Without the order that atomics give, the checker sees each kernel that needs it."""
    found, done = run("triton_races.py", tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert found == dict.fromkeys(triton_races.CHECKS, "0")
    found, done = run("triton_races.py", tmp_path, "--unordered", TRITON_INTERPRET="1")
    assert done.returncode == 0 and set(found) == set(triton_races.SHARED), done.stderr[-2000:]
    assert min(map(int, found.values())) > 0, found


# The most registers of a thread and instructions of a hot kernel on any card, a tenth above what they were found to be.
BUDGET = {
    "dequantize": (53, 475),
    "dequantize with row scale": (53, 572),
    "dequantize three layers": (53, 1716),
    "gemv": (53, 634),
    "row norms, rank 16": (185, 1470),
    "row norms, rank 32": (220, 1751),
    "row norms, rank 64": (185, 1778),
    "row norms of many layers": (185, 1522),
    "encode blocks of moments": (70, 2297),
    "decode blocks of moments": (33, 141),
    "adamw": (53, 739),
    "rms norm": (41, 361),
    "rms norm, backward": (53, 273),
    "swiglu": (37, 185),
    "swiglu, backward": (41, 255),
    "swiglu, backward with dots": (70, 942),
    "rotate": (62, 431),
    "rotate, backward": (62, 431),
    "cross entropy": (52, 766),
    "LoRA factors": (62, 554),
    "LoRA factors of three layers": (70, 1769),
    "gradients of three layers, finished": (53, 335),
    "columnwise dot": (62, 528),
    "gradients": (136, 1012),
    "gradients of three layers": (136, 1100),
}
NARROW = ("gemv", "row norms", "columnwise dot", "gradients for", "gradients of three layers for")  # store sums


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """For every card; half of the kernels in a process, as compiling takes three minutes of one core."""
    names, folder = list(triton_compile.COMPILED), tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor() as pool:
        halves = list(pool.map(lambda half: run("triton_compile.py", folder, *half), (names[::2], names[1::2])))
    assert [done.stderr[-2000:] for _, done in halves if done.returncode] == []
    return {name: json.loads(words) for found, _ in halves for name, words in found.items()}


def test_every_kernel_compiles_for_every_card(compiled):
    assert set(compiled) == {f"{name} for {card}" for name in triton_compile.COMPILED for card in triton_compile.CARDS}


def test_hot_kernels_do_not_spill(compiled):
    assert {name: found["spilled"] for name, found in compiled.items() if found["hot"] and found["spilled"]} == {}


def test_hot_kernels_stay_within_their_budget(compiled):
    """Registers decide how many programs a core holds, instructions what decoding costs beside memory."""
    hot = {name: found for name, found in compiled.items() if found["hot"]}
    assert {name.rpartition(" for ")[0] for name in hot} == set(BUDGET)
    over = {
        name: (found["registers"], found["instructions"])
        for name, found in hot.items()
        for registers, instructions in [BUDGET[name.rpartition(" for ")[0]]]
        if not 0 < found["registers"] <= registers or not 0 < found["instructions"] <= instructions
    }
    assert over == {}


def test_hot_kernels_store_16_bytes_at_a_time(compiled):
    narrow = {name: found["stores"] for name, found in compiled.items() if found["hot"] and found["stores"] != 16}
    assert {name: width for name, width in narrow.items() if not name.startswith(NARROW)} == {}


def test_decoding_touches_no_shared_memory(compiled):
    """Codes to 16-byte stores in registers: a change of layout in between would cost what the kernel gains."""
    assert {found["shared"] for name, found in compiled.items() if name.startswith("dequantize for")} == {0}


def test_nothing_exact_is_contracted(compiled):
    """A fused map[q] * nested + offset would change scales in their last bit."""
    assert [name for name, found in compiled.items() if found["contracted"]] == []


def test_shares_are_stored_before_they_are_counted_and_read_after(compiled):
    """The last program of a column adds up what others have stored: each of its threads stores, waits, and one counts,
    and the rest wait.
    """
    orders = {name: found["order"] for name, found in compiled.items() if "atom" in found["order"]}
    assert len(orders) == 8 * len(triton_compile.CARDS)
    assert [name for name, order in orders.items() if not re.search(r"st(bar)+atom(bar)+.*ld", order)] == []


def test_triton_is_not_imported_before_a_gpu_needs_it():
    code = "import sys, qlora, qlora_kernels.backends; assert 'triton' not in sys.modules, 'imported'"
    environment = {**os.environ, "PYTHONPATH": PATHS}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""`qlora selftest`: every operator is in it and right on each instruction set; a kernel broken on purpose is named and
gone round, also one that ends the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ISAS

from qlora.errors import UserError
from qlora.selftest import operators, training
from qlora.selftest.report import selftest
from qlora_kernels import backends, ops

HOUSE = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
BROKEN = """
import os
from qlora_kernels.cpu.step import StepKernels
right = StepKernels.swiglu
def wrong(self, gate, up):
    result = right(self, gate, up)
    if os.environ["BREAK"] == "dies":
        os.kill(os.getpid(), 11)
    result.view(-1)[-1] = float("nan")  # the last one, as of a kernel that forgets it
    return result
StepKernels.swiglu = wrong
"""


def run(tmp_path: Path, code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """A command in a process with a kernel broken on purpose, and a cache of its own."""
    (tmp_path / "broken").mkdir(exist_ok=True)
    (tmp_path / "broken/sitecustomize.py").write_text(f"import os\nif 'BREAK' in os.environ:\n    exec({BROKEN!r})\n")
    paths = os.pathsep.join(map(str, (tmp_path / "broken", HOUSE, HOUSE / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path / "cache")} | variables
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


COMMAND = "import sys; from qlora.cli import main; sys.exit(main(sys.argv[1:]))"
STEP = """
import torch
from qlora_kernels import backends, ops
x = torch.randn(3, 70)
assert torch.allclose(ops.swiglu(x, x), x * x.sigmoid() * x)
print(backends.routes())
"""


def test_every_operator_is_tested():
    assert set(operators.CASES) == set(ops.OPERATORS)


@pytest.mark.parametrize("isa", ISAS)
def test_all_are_right(kernels, poisoned, isa):
    """At odd shapes, on each instruction set; what is selected for the library holds for the operators too."""
    backends.NATIVE.select(isa)
    try:
        for name in operators.CASES:
            for draw in operators.shapes(CPU)[2:4]:
                error, limit = operators.errors(name, draw)
                assert error <= limit, (name, str(draw), error)
    finally:
        backends.NATIVE.select()


@pytest.mark.parametrize("name", ["a LoRA step is PEFT's definition", "a DoRA step is PEFT's definition"])
def test_a_step_sees_a_wrong_gradient(monkeypatch, name):
    """The check's own control: beside the definition with another scale it fails by far."""
    right = training.CHECKS[name](CPU)
    assert right[0] <= right[1]
    monkeypatch.setattr(training, "SCALING", 2.02)
    error, limit = training.CHECKS[name](CPU)
    assert error > limit


def test_a_wrong_kernel_is_named_and_gone_round(kernels, tmp_path):
    checks = "swiglu,rms_norm"
    found = tmp_path / "found.json"
    line = ["selftest", "--device", "cpu", "--only", checks, "--json", str(found)]
    done = run(tmp_path, COMMAND, *line, BREAK="wrong")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "WRONG inf" in " ".join(done.stdout.split()) and "gone round from now on: swiglu" in done.stdout
    written = json.loads(found.read_text())
    assert [row["name"] for row in written["rows"] if not row["ok"]] == ["swiglu"]
    assert written["machine"]["packages"]["torch"] == torch.__version__ and written["backend"] == "native"
    after = run(tmp_path, STEP, BREAK="wrong")  # training goes on with what is right
    assert after.stdout.strip() == "{'swiglu': {'reference': 1}}", after.stderr
    assert "swiglu (native) failed `qlora selftest` here" in after.stderr
    assert run(tmp_path, COMMAND, *line).returncode == 0  # mended: it is asked again, and used again
    mended = run(tmp_path, STEP)
    assert mended.stdout.strip() == "{'swiglu': {'native': 1}}" and not mended.stderr


def test_a_kernel_that_ends_the_process_is_named(kernels, tmp_path):
    """The checks behind it run in another process."""
    done = run(tmp_path, COMMAND, "selftest", "--device", "cpu", "--only", "swiglu,geglu", BREAK="dies")
    assert done.returncode == 1 and "gone round from now on: swiglu" in done.stdout, done.stderr
    assert "WRONG signal 11" in " ".join(done.stdout.split()) and "2 of 3 in order" in done.stdout


def test_an_unknown_check_is_one_line():
    with pytest.raises(UserError, match=r"only=swigglu: is no check\. Choose from a DoRA step"):
        selftest("cpu", "swigglu")


def test_a_damaged_cache_holds_nothing(tmp_path, monkeypatch):
    from qlora_kernels import avoided

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    avoided.write("one", {"swiglu": "why"})
    assert avoided.read("one") == {"swiglu": "why"} and avoided.read("another") == {}
    for text in ("{", "[1]", '{"one": 3}', "\x00"):
        avoided.file().write_text(text)
        assert avoided.read("one") == {}

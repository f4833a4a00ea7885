"""`qlora selftest`: every operator is in it and right on each instruction set; a kernel broken on purpose is named and
gone round, also one that ends the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import ISAS

from qlora.errors import UserError
from qlora.optim.disk_tier import in_memory
from qlora.selftest import operators, training
from qlora.selftest.first_use import NEEDED
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
    if os.environ["BREAK"] == "raises":
        raise RuntimeError("CUDA error: an illegal memory access\\nmaybe late\\n\\nPass CUDA_LAUNCH_BLOCKING=1\\n")
    result.view(-1)[-1] = float("nan")  # the last one, as of a kernel that forgets it
    return result
StepKernels.swiglu = wrong
"""


def surroundings(tmp_path: Path) -> dict[str, str]:
    """The variables of a process with a kernel that BREAK breaks, and a cache of its own."""
    (tmp_path / "broken").mkdir(exist_ok=True)
    (tmp_path / "broken/sitecustomize.py").write_text(f"import os\nif 'BREAK' in os.environ:\n    exec({BROKEN!r})\n")
    paths = os.pathsep.join(map(str, (tmp_path / "broken", HOUSE, HOUSE / "kernels")))
    return {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path / "cache")}


def run(tmp_path: Path, code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """A command in such a process."""
    environment = {**os.environ, **surroundings(tmp_path)} | variables
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
            for draw in (draw for draw in operators.shapes(CPU, name) if draw.rows in (33, 96)):
                error, limit = operators.errors(name, draw)
                assert error <= limit, (name, str(draw), error)
    finally:
        backends.NATIVE.select()


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "portable"])
def test_products_by_integers_are_tested_where_there_are_any(kernels, isa):
    """They err more than float32 does, which shows that it is they."""
    backends.NATIVE.select(isa)
    try:
        for name in operators.BY_INTEGERS:
            drawn = [draw for draw in operators.shapes(CPU, name) if draw.integers]
            assert len(drawn) == 2 * backends.multiplies_by_integers()
            for draw in drawn:
                error, limit = operators.errors(name, draw)
                assert 1e-6 < error <= limit, (name, str(draw), error)
    finally:
        backends.NATIVE.select()
    assert torch.get_float32_matmul_precision() == "highest"


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


def test_an_error_of_several_lines_is_told_by_its_first_and_its_last(kernels, tmp_path, monkeypatch):
    for name, value in (surroundings(tmp_path) | {"BREAK": "raises"}).items():
        monkeypatch.setenv(name, value)
    row = selftest("cpu", "swiglu")["rows"][0]
    expected = "RuntimeError: CUDA error: an illegal memory access ... Pass CUDA_LAUNCH_BLOCKING=1"
    assert not row.ok and row.failed == expected


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


# ---------------------------------------------------------------- the short form, at the first use of a card

CHECK = """
import torch
from qlora.selftest.first_use import check_first_use
from qlora_kernels import backends, ops
check_first_use(torch.device("cpu"))
print("checked", len(backends.ROUTES))
x = torch.randn(3, 70)
assert torch.allclose(ops.swiglu(x, x), x * x.sigmoid() * x)
print(backends.routes()["swiglu"])
"""


def test_a_broken_kernel_is_gone_round_from_the_first_use_on(kernels, tmp_path):
    done = run(tmp_path, CHECK, BREAK="wrong")
    line = "kernels  swiglu (native) failed its check at the first use (error inf at 130x576"
    assert done.returncode == 0 and done.stderr.count(line) == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "'reference': 1" in done.stdout  # what follows is right
    assert len(json.loads((tmp_path / "cache/qlora/checked.json").read_text())) == 1
    again = run(tmp_path, CHECK, BREAK="wrong")
    assert "checked 0" in again.stdout and "swiglu (native) failed `qlora selftest` here" in again.stderr


def test_what_is_right_is_checked_once(kernels, tmp_path):
    first, second = (run(tmp_path, CHECK) for _ in range(2))
    assert first.stderr == second.stderr == "" and not (tmp_path / "cache/qlora/avoided.json").exists()
    assert f"checked {len(NEEDED)}" in first.stdout and "checked 0" in second.stdout


def test_a_device_that_answers_no_more_is_one_line(kernels, tmp_path):
    """As a card after a kernel that read what is not its own: the next start goes round that."""
    code = CHECK.replace("check_first_use(torch", f"{DEAD}\ncheck_first_use(torch")
    done = run(tmp_path, code, BREAK="wrong")
    assert "device=cpu: swiglu (native) failed and the device answers no more" in done.stderr
    assert not (tmp_path / "cache/qlora/checked.json").exists()
    assert "swiglu" in (tmp_path / "cache/qlora/avoided.json").read_text()


DEAD = """
def ones(*arguments, **options):
    raise RuntimeError("an illegal memory access was encountered")
torch.ones = ones"""


def test_a_cache_that_cannot_be_written_is_no_obstacle(kernels, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(tmp_path, CHECK, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.returncode == 0 and f"checked {len(NEEDED)}" in done.stdout, done.stderr


def test_a_card_needs_no_other_kernels(planned_step):
    """Those of a step on a card that have a Triton kernel are all checked."""
    from qlora_kernels.triton import adapter, nf4, optim, step

    named = {name for name in ops.OPERATORS if any(hasattr(module, name) for module in (nf4, adapter, step, optim))}
    ran = planned_step & named
    assert ran and ran <= set(NEEDED) | {"row_norms_4bit_all"}, ran - set(NEEDED)


@pytest.fixture
def planned_step(tmp_path: Path) -> set[str]:
    """The operators that a DoRA step of a card calls."""
    from launches import Launches
    from transformers import LlamaConfig

    from qlora.config.commands import FinetuneConfig
    from qlora.data.batch import Example, pack
    from qlora.layers.loss import loss_sum
    from qlora.plan.meta import MetaRun
    from qlora.run.inputs import find_model

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2).save_pretrained(tmp_path)
    config = FinetuneConfig(model=str(tmp_path), data="-", output="-", device="cuda", dtype="bf16", method="dora")
    model = MetaRun(config, find_model(config, weights=False)).model(2, False)
    with backends.planned_for("cuda"), Launches() as launches:
        loss_sum(model.train(), pack([Example((1,) * 9, (False,) + (True,) * 8)])).backward()
    return set(launches.found)


def test_state_is_spilled_to_a_disk_where_temporary_files_lie_in_memory(monkeypatch):
    """/tmp is a tmpfs on many systems; nothing is spilled to one, and the check was called wrong there."""
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert in_memory(Path(tempfile.gettempdir()))
    assert training.spilled(CPU) == (0.0, 0.0)

"""The first minute on a card, up to the first kernel, on a card that is only claimed: the suite, doctor, plan and a
budget.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from fake_card import REFUSED, TOTAL

HOUSE = Path(__file__).resolve().parents[1]
PATHS = os.pathsep.join(str(HOUSE / name) for name in (".", "kernels", "tests/support", "scripts/benchmarks"))
CLAIM = "import json, sys, torch, fake_card; calls = fake_card.install({capability}); "


def python(code: str, capability: str = "") -> subprocess.CompletedProcess:
    """`code` where a card is claimed, and `calls` are what is asked of it."""
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    script = CLAIM.format(capability=capability) + code
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def refused(said: str) -> bool:
    return any(words in said for words in REFUSED)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data.jsonl")
    return folder


def test_a_budget_is_set_on_a_card_before_anything_is_loaded(place):
    """CUDA's context is counted within it."""
    options = {"model": str(place / "model"), "data": str(place / "data.jsonl"), "output": str(place / "run")}
    options |= {"memory": 8_000_000_000, "device": "auto", "steps": 1}
    code = f"import qlora; from qlora.config.commands import FinetuneConfig; options = {options!r}\n"
    code += "try:\n    qlora.finetune(FinetuneConfig(**options))\nexcept BaseException as error:\n"
    code += "    print('RAISED', json.dumps([repr(error), [c for c in calls if c[0] == '_cuda_setMemoryFraction']]))"
    done = python(code)
    told, _, found = done.stdout.partition("RAISED")
    raised, fractions = json.loads(found)
    assert "memory   8000 MB: --batch-size 4" in told and refused(raised), done.stdout + done.stderr
    assert fractions == [["_cuda_setMemoryFraction", (8_000_000_000 - 500_000_000) / TOTAL, 0]]


def test_memory_is_watched_on_a_card_that_nothing_has_started(place):
    """With its number and a dtype given, nothing has asked the card before."""
    options = {"model": str(place / "model"), "data": str(place / "data.jsonl"), "output": str(place / "watched")}
    options |= {"device": "cuda:0", "dtype": "bf16", "steps": 1}
    code = f"import qlora; from qlora.config.commands import FinetuneConfig; options = {options!r}\n"
    code += "try:\n    qlora.finetune(FinetuneConfig(**options))\nexcept BaseException as error:\n"
    code += "    print('RAISED', json.dumps([repr(error), [c for c in calls if c[0] == '_cuda_resetPeakMemoryStats']]))"
    done = python(code)
    raised, resets = json.loads(done.stdout.partition("RAISED")[2])
    assert refused(raised) and resets == [["_cuda_resetPeakMemoryStats", 0]], done.stdout + done.stderr


def test_the_suite_begins():
    """It tells what the card is and begins its parts; what fails is torch without CUDA alone."""
    parts = ["doctor", "kernels", "train", "records", "gradients", "attention", "vocabulary", "long", "plan"]
    code = (
        "import gpu_suite, gpu_steps; from qlora.models.device import resolve_device; card = resolve_device('cuda')\n"
    )
    code += f"sys.argv[1:] = ['--work', {','.join(parts)!r}, '--device', 'cuda', '--small']; gpu_suite.main()\n"
    code += "try:\n    gpu_steps.first_step(card, True, 0.0)\nexcept Exception as error:\n    print('RAISED', error)"
    done = python(code)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told[0]["about"]["device"] == "a claimed card" and told[0]["about"]["capability"] == "8.9", done.stderr
    assert [line["begin"] for line in told if "begin" in line] == parts
    assert [line["end"] for line in told if "end" in line] == parts
    rows = [line["row"] for line in told if "row" in line]
    failed = [row["value"] for row in rows if str(row["value"]).startswith("failed")]
    assert len(failed) > 20 and [value for value in failed if not refused(value)] == []
    assert {row["part"] for row in rows} == set(parts)
    assert refused(done.stderr.partition("RAISED")[2])  # where all but rows goes from then on


SANITIZER = """#!/bin/sh
case "$2" in
memcheck) echo "========= ERROR SUMMARY: 2 errors" ; exit 99 ;;
racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
initcheck) echo "========= ERROR SUMMARY: 0 errors" ;;
*) echo "Device not supported" ; exit 1 ;;
esac
echo "$@ $PYTORCH_NO_CUDA_MEMORY_CACHING" >> {asked}
"""


def test_the_sanitizer_is_asked_for_its_four_tools(tmp_path):
    """Without it: one row, which says where it comes from. What it finds is wrong, what it cannot do has failed."""
    tool = tmp_path / "bin/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(asked=tmp_path / "asked"))
    tool.chmod(0o755)
    code = "import os, gpu_checks, gpu_suite; card = torch.device('cuda', 0); path = os.environ['PATH']\n"
    code += "gpu_checks.WHERE_ELSE = ()\ngpu_suite.work(['sanitize'], card, True)\n"
    code += f"os.environ['PATH'] = {str(tool.parent)!r} + os.pathsep + path\ngpu_suite.work(['sanitize'], card, True)"
    done = python(code)
    told = [json.loads(line) for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]
    rows = [(line["row"]["name"], line["row"]["value"], line["row"]["met"]) for line in told if "row" in line]
    assert rows == [
        ("compute-sanitizer", rows[0][1], None),
        ("memcheck", 2, False),
        ("racecheck", 0, True),
        ("initcheck", 0, True),
        ("synccheck", "failed: RuntimeError: exit code 1: Device not supported", False),
    ]
    assert rows[0][1].endswith("pip install nvidia-cuda-sanitizer-api")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[1] for line in asked] == ["racecheck", "initcheck"]
    assert all("--work kernels --device cuda:0 --small" in line and line.endswith(" 1") for line in asked)


def test_doctor_and_plan_answer(place):
    code = "from qlora.cli import main; code = main(['doctor', '--json']); print('PLAN', flush=True); "
    code += f"sys.exit(code or main(['plan', '--model', {str(place / 'model')!r}, '--memory', '24GB', '--json']))"
    done = python(code)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    doctor, plan = map(json.loads, done.stdout.split("PLAN"))
    assert doctor["gpus"][0]["name"] == "a claimed card" and doctor["used"]["device"] == "cuda:0"
    (entry,) = (entry for entry in doctor["missing"] if entry["what"] == "our kernels on the card")
    assert "a small one failed" in entry["why"]
    assert plan["device"] == "cuda" and plan["fits"] and plan["baseline"] == 500_000_000


def test_an_old_card_is_said_to_be_slow():
    done = python("from qlora.cli import main; sys.exit(main(['doctor', '--json']))", "(7, 5)")
    found = json.loads(done.stdout)
    assert found["used"]["dtype"] == "fp32", done.stderr
    (note,) = found["used"]["notes"]
    assert "a claimed card has no bf16, so auto is fp32" in note and "fp16" in note


GRAPH = """
from types import SimpleNamespace
from qlora_kernels import reference
from qlora_kernels.triton import common
zeros, capturing = torch.zeros, [False]
torch.zeros = lambda *size, device=None, **options: zeros(*size, **options)  # the card has no memory
tables = []
reference.dynamic_map = tables.append
torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=7)
torch.cuda.is_current_stream_capturing = lambda: capturing[0]
card = torch.device("cuda", 0)
common.prepare(card)
capturing[0] = True
inside = common.counters(card, 100)
capturing[0] = False
outside = common.counters(card, 100)
capturing[0] = True
try:
    common.counters(card, 5000)
except RuntimeError as error:
    print(outside is not inside, len(inside), *tables, error)
"""


def test_counters_of_a_graph_are_made_before_it():
    """Made while it is captured, they would lie in its own memory; too few of them are refused, with what to do."""
    said = python(GRAPH).stdout.strip()
    assert said == "True 4096 cuda:0 5000 counters for a CUDA graph: run the step once before it is captured"


@pytest.mark.parametrize("capability, half", [("(7, 5)", "float16"), ("(8, 6)", "bfloat16")])
def test_a_card_is_checked_in_the_16_bits_that_it_computes_in(capability, half):
    code = "from qlora.selftest.operators import half, shapes; card = torch.device('cuda', 0); "
    code += "print(half(card), sorted({str(draw.dtype) for draw in shapes(card, 'swiglu')}))"
    done = python(code, capability)
    assert done.stdout.strip() == f"torch.{half} {sorted(['torch.float32', f'torch.{half}'])}", done.stderr

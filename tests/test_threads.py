"""Threads beside other work and inside a container: read from real files in a folder that stands for the root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.doctor import as_text, report
from qlora.threads import COUNTS, WAITING, be_a_good_neighbour, cpu_quota, how_threads_wait, thread_limit

HOUSE = Path(__file__).resolve().parents[1]
EIGHT = frozenset(range(8))


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v1(quota: str, path: str = "/", mount: str = "cpu,cpuacct") -> dict[str, str]:
    folder = f"sys/fs/cgroup/{mount}{path.rstrip('/')}"
    return {
        "proc/self/cgroup": f"5:memory:/other\n4:cpu,cpuacct:{path}\n0::{path}",
        f"{folder}/cpu.cfs_quota_us": quota,
        f"{folder}/cpu.cfs_period_us": "50000",
    }


HYBRID = {"sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-7"} | {
    f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n // 2 * 2}-{n // 2 * 2 + 1}" for n in range(4)
}


@pytest.mark.parametrize(
    "files, quota, limit",
    [
        ({}, None, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5, 3),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5, 1),
        (  # the least of all groups above
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "900000 100000",
            },
            2.0,
            2,
        ),
        ({"proc/self/cgroup": "0::/docker/1f", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1.0, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "1600000 100000"}, 16.0, None),
        (v1("100000"), 2.0, 2),
        (v1("100000", "/docker/1f"), 2.0, 2),
        (v1("100000", mount="cpu"), 2.0, 2),
        (v1("-1"), None, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "no numbers"}, None, None),
        (HYBRID, None, 2),
        (HYBRID | v1("50000"), 1.0, 1),
    ],
)
def test_threads_by_quota_and_by_kind_of_core(tmp_path, files, quota, limit):
    root = machine(tmp_path, files)
    assert cpu_quota(root) == quota and thread_limit(root, EIGHT) == limit


def test_slow_cores_compute_where_there_are_no_others(tmp_path):
    """Four slow cores that the process was pinned to: torch's own choice stands."""
    assert thread_limit(machine(tmp_path, HYBRID), frozenset({4, 5, 6, 7})) is None


def test_what_the_user_says_stands(tmp_path):
    root = machine(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"})
    found: dict[str, str] = {}
    be_a_good_neighbour(found, root, EIGHT)
    assert found == {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1", "OMP_NUM_THREADS": "2"}
    for name in WAITING:
        found = {name: "passive"}
        be_a_good_neighbour(found, root, EIGHT)
        assert found == {name: "passive", "OMP_NUM_THREADS": "2"} and how_threads_wait(found) == f"{name}=passive"
    for name in COUNTS:
        found = {name: "5"}
        be_a_good_neighbour(found, root, EIGHT)
        assert found[name] == "5" and set(found) == {name, "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    assert how_threads_wait({}) == "the runtime's own way"


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in (*WAITING, *COUNTS)}
    paths = {"PYTHONPATH": os.pathsep.join([str(HOUSE), str(HOUSE / "kernels")])}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | paths | variables, capture_output=True, text=True, check=True
    )


def test_the_runtime_of_a_command_waits_so_and_that_of_an_import_as_ever():
    """Asked of the runtime that torch loads, which tells its settings."""
    load = "; import torch; print(torch.get_num_threads())"
    for code, expected in (
        ("from qlora.cli import main; main(['--version'])", True),
        ("import qlora, qlora.cli", False),
    ):
        told = run(code + load, OMP_DISPLAY_ENV="VERBOSE").stderr
        assert "OPENMP DISPLAY ENVIRONMENT" in told and ("GOMP_SPINCOUNT = '1000'" in told) is expected


def test_torch_computes_with_so_many_threads(tmp_path):
    machine(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "100000 100000"})
    code = f"from pathlib import Path; from qlora.threads import *; be_a_good_neighbour(root=Path({str(tmp_path)!r}), "
    code += "allowed=frozenset(range(8))); import torch; print(torch.get_num_threads())"
    assert run(code).stdout.split() == ["1"]


def test_the_doctor_says_how_threads_wait(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    found = report()
    assert "GOMP_SPINCOUNT=77" in found["threads_wait"] and "GOMP_SPINCOUNT=77" in as_text(found)
    assert "2.5 of them by this container's quota" in as_text(found | {"cpu": found["cpu"] | {"quota_cores": 2.5}})


def test_the_scripts_set_it_unless_the_user_did():
    """The lines of environment.sh that do, in a shell."""
    text = (HOUSE / "scripts/environment.sh").read_text()
    (lines,) = (part for part in text.split("\n\n") if "GOMP_SPINCOUNT" in part)
    for given, expected in (({}, "1000,1"), ({"OMP_WAIT_POLICY": "active"}, ",")):
        kept = {name: value for name, value in os.environ.items() if name not in WAITING} | given
        show = 'echo "${GOMP_SPINCOUNT:-},${KMP_BLOCKTIME:-}"'
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{lines}\n{show}"], env=kept, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected

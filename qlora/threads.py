"""How many threads compute, and how they wait: beside other work on a machine, and inside a container.

    be_a_good_neighbour()     GOMP_SPINCOUNT, KMP_BLOCKTIME, OMP_NUM_THREADS for the process, before torch is loaded
    thread_limit(root, ...)   fewer threads than torch takes by itself: the cgroup's quota, the performance cores

A thread of OpenMP that waits for the others spins. On a core that another process wants too, the one that is waited
for does not run meanwhile, and a step takes several times as long; a thread that sleeps at once costs an idle machine
5 %. A thousand turns cost little on either (docs/log.md). torch takes one thread for each core that it may run on: it
sees the affinity, not the quota, and not that some cores are slow, for which its own products wait. Both runtimes read
these variables once, when they are loaded. The alternative, to set them when `qlora` is imported, would change a
program that only uses us.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping, Set
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SPINS = "1000"  # of libgomp, which PyPI's torch brings
BLOCKTIME = "1"  # milliseconds, of Intel's and LLVM's


def be_a_good_neighbour(
    environment: MutableMapping[str, str] = os.environ, root: Path = Path("/"), allowed: Set[int] | None = None
) -> None:
    """Set what the user left open, for this process and those it starts; without an effect once torch is loaded.

    Args:
        environment: where the variables are set.
        root: the folder that holds `proc` and `sys`.
        allowed: the processors that this process may run on (None: asked of the system).
    """
    if not any(name in environment for name in WAITING):
        environment.update(GOMP_SPINCOUNT=SPINS, KMP_BLOCKTIME=BLOCKTIME)
    if not any(name in environment for name in COUNTS):
        limit = thread_limit(root, processors() if allowed is None else allowed)
        if limit is not None:
            environment["OMP_NUM_THREADS"] = str(limit)


def how_threads_wait(environment: MutableMapping[str, str] = os.environ) -> str:
    """What the environment says about it, in words."""
    given = [f"{name}={environment[name]}" for name in WAITING if name in environment]
    return ", ".join(given) or "the runtime's own way"


def processors() -> Set[int]:
    """The processors that this process may run on; none where the system does not tell."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else frozenset()


def thread_limit(root: Path, allowed: Set[int]) -> int | None:
    """How many threads to compute with, where that is fewer than torch takes: a core of `allowed` each. Else None."""
    cores = _cores(root, allowed)
    quick = _cores(root, allowed & _listed(root / "sys/devices/cpu_core/cpus")) or cores
    quota = cpu_quota(root)
    wanted = quick if quota is None else min(quick, max(1, -int(-quota // 1)))
    return wanted if wanted < cores else None


def _cores(root: Path, allowed: Set[int]) -> int:
    """How many cores these processors are: two of them may be the hyperthreads of one."""
    topology = root / "sys/devices/system/cpu"
    return len({min(_listed(topology / f"cpu{n}/topology/thread_siblings_list") or {n}) for n in allowed})


def _listed(file: Path) -> Set[int]:
    """The numbers of a list such as 0-3,8; none where there is no such file."""
    found: set[int] = set()
    for part in (_text(file) or "").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return found


def cpu_quota(root: Path) -> float | None:
    """The processors' time that this process's control groups allow, in processors; None for no limit.

    Each group above counts too, and in a container the path may be the host's, of which only an end is to be seen.
    """
    quotas = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        controllers = names.split(",")
        if not names:  # version 2: "0::/path"
            for group in _groups(root / "sys/fs/cgroup", path):
                quotas.append((_text(group / "cpu.max") or "max").split())
        elif "cpu" in controllers:
            for mount in dict.fromkeys((names, "cpu")):
                for group in _groups(root / "sys/fs/cgroup" / mount, path):
                    period = _text(group / "cpu.cfs_period_us") or ""
                    quotas.append([_text(group / "cpu.cfs_quota_us") or "-1", period])
    return min((int(q[0]) / int(q[1]) for q in quotas if _is_limit(q)), default=None)


def _is_limit(quota: list[str]) -> bool:
    return len(quota) == 2 and all(part.isdigit() and int(part) > 0 for part in quota)


def _groups(mount: Path, path: str) -> Iterator[Path]:
    """A control group and those above it."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for end in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:end])


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None

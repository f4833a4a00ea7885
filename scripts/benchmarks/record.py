"""The bookkeeping of every benchmark: what the figures depend on, a process of its own for each measurement, the file.

A figure without its commit, machine and versions cannot be repeated, so `about` gathers them once for all scripts. A
measurement of memory or speed gets a process of its own (`child`), because what an earlier one imported, compiled or
freed would be measured with it. The alternative, pytest-benchmark or a results service, knows neither RssAnon nor two
contestants that take turns.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
RESULTS = SCRIPTS / "results"


def commit() -> str:
    """The short hash of the commit that is checked out, "" where there is no git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=SCRIPTS, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def processor() -> str:
    """The model name of the CPU, or its architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str | None]:
    """The version of each package, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def about(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on: commit, processor, threads, the kernels of `device`, versions."""
    import torch

    from qlora.threads import how_threads_wait
    from qlora_kernels import backends

    return {
        "commit": commit(),
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "threads_wait": how_threads_wait(),
        "backend": backends.describe()[device],
        "versions": versions(*packages),
    }


def child(script: str, *arguments: object, environment: dict[str, str] | None = None, quiet: bool = False) -> Any:
    """Run `script` in a process of its own, whose threads wait as those of a command do (`qlora.threads`).

    Args:
        environment: variables besides those of this process.
        quiet: throw its standard error away.

    Returns:
        The JSON of the last line that it printed.

    Raises:
        CalledProcessError: it failed; an exit code of -9 means that the machine had not enough memory for it.
    """
    from qlora.threads import be_a_good_neighbour

    variables = os.environ | (environment or {})
    be_a_good_neighbour(variables)
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        text=True,
        check=True,
        env=variables,
    )
    return json.loads(done.stdout.splitlines()[-1])


def write(path: str | Path | None, result: Any) -> None:
    """Write the figures as JSON; None: nowhere."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")

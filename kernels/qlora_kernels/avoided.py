"""Kernels that failed `qlora selftest` here, and which the next backend replaces from then on.

    <cache>/qlora/avoided.json    {what they run on: {operator: why}}        <cache>: $XDG_CACHE_HOME or ~/.cache

The key holds all that may mend a kernel or break it: device, driver, versions, and the kernels' own build. After an
update it is another, and nothing is avoided until the test is run again. The alternative, a list of known bad devices
in the code, knows only what others have met.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch


def file() -> Path:
    """Where it is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "qlora" / "avoided.json"


def machine(backend: str, index: int | None, build: str) -> str:
    """The key of what `backend` runs on; `build` tells its kernels' versions apart."""
    parts = [backend, build, f"torch {torch.__version__}"]
    if backend == "triton":
        driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
        parts += [f"triton {importlib.metadata.version('triton')}", f"driver {driver}"]
        parts += [torch.cuda.get_device_properties(index or 0).name]
    else:
        parts += [_processor()]
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def read(key: str | None = None) -> dict:
    """{operator: why} of one machine, or all; a file that cannot be read holds nothing."""
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
        kept = {name: dict(entry) for name, entry in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return kept if key is None else kept.get(key, {})


def write(key: str, failed: dict[str, str]) -> None:
    """Keep what failed there, in place of what was known.

    Raises:
        OSError: the cache cannot be written.
    """
    path, found = file(), read()
    if failed:
        found[key] = failed
    elif found.pop(key, None) is None:
        return
    _put(path, found)


def _put(path: Path, found: dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(found, indent=2), encoding="utf-8")
    part.replace(path)


def checked() -> list[str]:
    """The machines whose kernels were checked at their first use; a file that cannot be read holds none."""
    try:
        found = json.loads(file().with_name("checked.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def note_checked(key: str) -> None:
    """Raises:
    OSError: the cache cannot be written.
    """
    _put(file().with_name("checked.json"), [*checked(), key])

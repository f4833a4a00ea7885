"""Build the native CPU kernels: `python -m qlora_kernels.cpu.build`.

One shared library holds the kernels for every instruction set; each file is compiled with the flags of its own, and the
choice is made at run time, so a wheel built on one machine is right on all of its architecture. A hash of the sources
and flags goes
into the library: `native.load` compares it with the sources that lie beside it, so that a stale build is never used. No
torch and no Python headers are involved, and `setup.py` uses this file too. The alternative,
`torch.utils.cpp_extension`, binds the library to one version of torch and costs a minute for each build.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "csrc"
LIBRARY = "_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
COMMAND = "python -m qlora_kernels.cpu.build"
MARKER = b"qlora-source-hash:"

# No -ffast-math and no contraction: map[q] * nested + offset must be rounded twice.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=default",
    "-Wall",
)
SOURCES: dict[str, tuple[str, ...]] = dict.fromkeys(
    (
        "api_nf4.cpp",
        "api_adapter.cpp",
        "api_layer.cpp",
        "api_step.cpp",
        "api_attention.cpp",
        "api_optim.cpp",
        "dispatch.cpp",
        "tables.cpp",
        "portable.cpp",
        "attention_bf16.cpp",
        "nf4_gemm_amx.cpp",
        "skinny_gemm_amx.cpp",
    ),
    (),
)
if platform.machine().lower() in ("x86_64", "amd64"):
    SOURCES |= {
        "avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
        "avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mfma", "-mavx2"),
    }
HEADERS = (
    "amx.h",
    "attention_bf16.h",
    "dispatch.h",
    "elementwise.h",
    "kernels.h",
    "layer.h",
    "nf4_gemm.h",
    "nf4_gemm_amx.h",
    "nf4_gemm_vnni.h",
    "nf4_kernels.h",
    "skinny_gemm_amx.h",
    "tables.h",
    "types.h",
)


class BuildError(RuntimeError):
    """The compiler is missing or failed; the message has what it said."""


def source_hash(folder: Path = SOURCE) -> str | None:
    """Hash of sources and flags, or None where an installation left the sources out."""
    digest = hashlib.sha256(repr((FLAGS, SOURCES)).encode())
    for name in (*SOURCES, *HEADERS):
        if not (folder / name).is_file():
            return None
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:32]


def built_hash(library: Path) -> str:
    """The hash in a library's bytes; read, not loaded, since a loaded library cannot be replaced."""
    content = library.read_bytes()
    at = content.find(MARKER) + len(MARKER)
    return content[at : at + 32].decode("ascii", "replace")


def is_fresh(library: Path) -> bool:
    """Whether `library` exists and was built from the sources beside this file (or none are there to differ)."""
    expected = source_hash()
    return library.is_file() and (expected is None or built_hash(library) == expected)


def compile_library(target: Path) -> Path:
    """Compile and link into `target`, which appears whole or not at all.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise BuildError("no C++ compiler found: install g++, or set CXX")
    define = f'-DQLORA_SOURCE_HASH="{source_hash()}"'
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build") as work:
        started = []
        for name, flags in SOURCES.items():
            command = [
                *compiler.split(),
                *FLAGS,
                *flags,
                define,
                "-c",
                str(SOURCE / name),
                "-o",
                str(Path(work, name + ".o")),
            ]
            started.append((command, _start(command)))
        for command, process in started:
            _finish(command, process)
        library = Path(work, LIBRARY)
        link = [
            *compiler.split(),
            "-shared",
            "-fopenmp",
            *(str(Path(work, name + ".o")) for name in SOURCES),
            "-o",
            str(library),
        ]
        _finish(link, _start(link))
        os.replace(library, target)
    return target


def _start(command: list[str]) -> subprocess.Popen:
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error


def _finish(command: list[str], process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    if process.returncode:
        raise BuildError(f"{' '.join(command)}\n{output}")


def build(force: bool = False) -> Path:
    """The library in place, beside the sources; compiled only where it is missing or stale, or with `force`.

    Raises:
        BuildError: no compiler, or it failed.
    """
    target = FOLDER / LIBRARY
    return target if is_fresh(target) and not force else compile_library(target)


if __name__ == "__main__":
    try:
        print(build(force="--force" in sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"building the native kernels failed: {error}")

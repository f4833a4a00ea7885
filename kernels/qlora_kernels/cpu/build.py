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
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
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
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=default",
    "-Wall",
)
PORTABLE = {"portable.cpp": ("-O2",)}  # compiles in half the time of -O3, runs in 0.7 to 1.4 of it (docs/log.md)
COMMON = (  # those that take long first, so that none is waited for at the end
    "attention_bf16.cpp",
    "nf4_gemm_amx.cpp",
    "skinny_gemm_amx.cpp",
    "api_layer.cpp",
    "api_adapter.cpp",
    "api_step.cpp",
    "api_optim.cpp",
    "api_nf4.cpp",
    "tables.cpp",
    "dispatch.cpp",
    "allocator.cpp",
    "api_attention.cpp",
    "api_decoder.cpp",
)
X86: dict[str, tuple[str, ...]] = {
    "avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "avx_vnni.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mfma", "-mavx2"),
}
# GCC's first scheduling moves loads over the sums of a tile, which then find no room in registers; Clang warns only.
ARM: dict[str, tuple[str, ...]] = {"neon.cpp": ("-march=armv8-a", "-fno-schedule-insns")}
OF_MACHINE = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}
HEADERS = (
    "amx.h",
    "api.h",
    "attention.h",
    "attention_float.h",
    "avx2.h",
    "dense_gemm.h",
    "dense_gemm_integers.h",
    "dispatch.h",
    "elementwise.h",
    "kernels.h",
    "layer.h",
    "nf4_gemm.h",
    "nf4_gemm_amx.h",
    "nf4_gemm_bf16.h",
    "nf4_gemm_integers.h",
    "nf4_kernels.h",
    "skinny_gemm_amx.h",
    "tables.h",
    "types.h",
)


class BuildError(RuntimeError):
    """The compiler is missing or failed; the message has what it said."""


def sources(machine: str) -> dict[str, tuple[str, ...]]:
    """The files compiled for a machine, as `platform.machine` names it, and the flags that each has beside FLAGS."""
    return OF_MACHINE.get(machine.lower(), {}) | PORTABLE | dict.fromkeys(COMMON, ())


def source_hash(folder: Path = SOURCE, machine: str = platform.machine()) -> str | None:
    """Hash of sources and flags, or None where an installation left the sources out."""
    files = sources(machine)
    digest = hashlib.sha256(repr((FLAGS, files)).encode())
    for name in (*files, *HEADERS):
        if not (folder / name).is_file():
            return None
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:32]


def built_hash(library: Path) -> str:
    """The hash in a library's bytes; read, not loaded, since a loaded library cannot be replaced."""
    content = library.read_bytes()
    at = content.find(MARKER) + len(MARKER)
    return content[at : at + 32].decode("ascii", "replace")


def is_fresh(library: Path, machine: str = platform.machine()) -> bool:
    """Whether `library` exists and was built from the sources beside this file (or none are there to differ)."""
    expected = source_hash(machine=machine)
    return library.is_file() and (expected is None or built_hash(library) == expected)


def threading_flags(compiler: list[str]) -> list[str]:
    """What makes threads of a compiler: -fopenmp, or nothing, with a line of why, where it refuses that. Only Apple's
    does, so that none else is asked.
    """
    if sys.platform != "darwin":
        return ["-fopenmp"]
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
        command = [*compiler, "-fopenmp", str(source), "-o", str(Path(work, "probe"))]
        try:
            _run(command)
        except BuildError:
            print(
                f"the native kernels will run on one thread: {compiler[0]} has no OpenMP. For more set CXX to a "
                "compiler that has it, such as Homebrew's g++ or clang++",
                file=sys.stderr,
            )
            return []
    return ["-fopenmp"]


def compile_library(target: Path, compiler: str | None = None, machine: str = platform.machine()) -> Path:
    """Compile and link into `target`, which appears whole or not at all; for another `machine` by a cross compiler.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = (
        compiler or os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    )
    if compiler is None:
        raise BuildError("no C++ compiler found: install g++, or set CXX")
    words, files = compiler.split(), sources(machine)
    threads, define = threading_flags(words), f'-DQLORA_SOURCE_HASH="{source_hash(machine=machine)}"'
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build") as work:
        base = [*words, *FLAGS, *threads]
        commands = [
            [*base, *flags, define, "-c", str(SOURCE / name), "-o", str(Path(work, name + ".o"))]
            for name, flags in files.items()
        ]
        # More at a time than there are processors take longer together, and starve what runs beside.
        failed = threading.Event()

        def compile_file(command: list[str]) -> None:
            try:
                if not failed.is_set():
                    _run(command)
            except BuildError:
                failed.set()  # none begins after it, nor after a compiler that was killed
                raise

        with ThreadPoolExecutor(_processors()) as pool:
            list(pool.map(compile_file, commands))  # of the first that fails, the error
        library = Path(work, LIBRARY)
        _run([*words, "-shared", *threads, *(str(Path(work, name + ".o")) for name in files), "-o", str(library)])
        os.replace(library, target)
    return target


def _processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}")


def build(force: bool = False, target: Path = FOLDER / LIBRARY) -> Path:
    """The library in `target`; compiled only where none lies beside the sources or it is stale, or with `force`.

    Raises:
        BuildError: no compiler, or it failed.
    """
    beside = FOLDER / LIBRARY
    if force or not is_fresh(beside):
        return compile_library(target)
    if target != beside:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(beside, target)
    return target


def _end(signal_number: int, frame: object) -> None:
    """Leave as at Ctrl-C: the folder of what is not finished goes too."""
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    try:
        print(build(force="--force" in sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"building the native kernels failed: {error}")

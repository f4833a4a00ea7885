"""Which code runs the operators, what is counted of it, and when none may: the environment's choice, forks, stale and
missing libraries.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ISAS, NF4, quantized, routed, wait
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from qlora_kernels import backends, ops
from qlora_kernels.cpu import build, native
from qlora_kernels.weight import NESTED_BLOCKSIZE, QuantizedWeight


def test_environment_chooses_the_code(monkeypatch):
    named = {"portable": "portable C++", "avx2": "AVX2", "avx_vnni": "AVX2 and AVX-VNNI", "avx512": "AVX-512"}
    for name in ISAS:
        monkeypatch.setenv("QLORA_CPU_ISA", name)
        assert native.load()[1].startswith(f"native ({named.get(name, 'NEON')}, ")
    monkeypatch.setenv("QLORA_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="QLORA_CPU_ISA=mmx: must be one of portable, avx2, avx_vnni, avx512"):
        native.load()
    monkeypatch.delenv("QLORA_CPU_ISA")


SHOW_BACKENDS = (
    "from qlora_kernels import backends; found = backends.describe(); print(found['cpu'], found['cuda'], sep='\\n')"
)


@pytest.mark.parametrize(
    "backend, cpu, cuda",
    [
        ("", "native (", "bitsandbytes' kernels, because the Triton kernels cannot run, torch sees no CUDA device"),
        (
            "native",
            "native (",
            "bitsandbytes' kernels, because the Triton kernels cannot run, torch sees no CUDA device",
        ),
        (
            "reference",
            "reference (plain PyTorch), because QLORA_BACKEND=reference",
            "reference (plain PyTorch), because QLORA_BACKEND=reference",
        ),
        (
            "bitsandbytes",
            "bitsandbytes' kernels, because QLORA_BACKEND=bitsandbytes",
            "bitsandbytes' kernels, because QLORA_BACKEND=bitsandbytes",
        ),
    ],
)
def test_environment_chooses_the_backend(kernels, monkeypatch, backend, cpu, cuda):
    monkeypatch.setenv("QLORA_BACKEND", backend)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = python(SHOW_BACKENDS)
    on_cpu, on_cuda = found.stdout.splitlines()
    assert on_cpu.startswith(cpu) and on_cuda == cuda, found.stderr


FAKE_CARD = (
    "import torch; torch.cuda.is_available = lambda: True; torch.cuda.current_device = lambda: 0; "
    "torch.cuda.get_device_capability = lambda index=None: (8, 6) if index in (None, 0) else (7, 5); "
)


def test_a_card_that_refuses_a_kernel_goes_to_the_next_backend(monkeypatch):
    """No driver, no C compiler, a card too new: all that torch says is that there is a card."""
    monkeypatch.delenv("QLORA_BACKEND", raising=False)
    found = python(FAKE_CARD + SHOW_BACKENDS)
    words = found.stdout.splitlines()[1]
    assert words.startswith("bitsandbytes' kernels, because the Triton kernels cannot run, a small one failed ("), words
    assert found.returncode == 0 and "Traceback" not in found.stderr
    monkeypatch.setenv("QLORA_BACKEND", "triton")
    assert (
        "QLORA_BACKEND=triton: the Triton kernels cannot run, a small one failed ("
        in python(FAKE_CARD + SHOW_BACKENDS).stderr
    )


PROBED = """
import torch
from qlora_kernels import backends
found, kernels = [], backends._functions("triton")
for kernel in (kernels["dequantize_4bit"], lambda *_: torch.zeros(2, 64)):
    kernels["dequantize_4bit"] = kernel
    found.append(backends._probe(torch.device("cpu")))
print(found)
"""


def test_a_card_that_computes_something_else_goes_to_the_next_backend(monkeypatch):
    """Triton's interpreter stands for the card, and zeros for a kernel that it gets wrong."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = python(PROBED)
    assert found.stdout.strip() == "['', 'a small one computed something else']", found.stderr


def test_each_card_is_asked_for_itself(monkeypatch):
    monkeypatch.delenv("QLORA_BACKEND", raising=False)
    found = python(FAKE_CARD + "from qlora_kernels import backends; print(*backends._cuda(0), *backends._cuda(1))")
    assert "a small one failed" in found.stdout and "they need compute capability 8.0" in found.stdout, found.stderr


ASKED = """
from torch._subclasses.fake_tensor import FakeTensorMode
from qlora_kernels import backends
asked = []
torch.cuda.get_device_capability = lambda index=None: asked.append(index) or (7, 5)
with FakeTensorMode():
    for index in (1, 0, 1):
        x = torch.empty(4, 64, device=torch.device("cuda", index))
        backends._direct["CUDA"]["swiglu"](x, x)
print(asked)
"""


def test_an_operator_asks_the_card_that_its_tensors_lie_on(monkeypatch):
    """Once, at its first call there."""
    monkeypatch.delenv("QLORA_BACKEND", raising=False)
    found = python(FAKE_CARD + ASKED)
    assert found.stdout.splitlines()[-1:] == ["[1, 0]"], found.stderr


@pytest.mark.parametrize(
    "backend, error",
    [
        ("fastest", "QLORA_BACKEND=fastest: must be one of native, triton, bitsandbytes, reference, or unset"),
        ("triton", "QLORA_BACKEND=triton: the Triton kernels cannot run, torch sees no CUDA device. Unset it"),
    ],
)
def test_a_backend_that_cannot_be_had_is_an_error(monkeypatch, backend, error):
    monkeypatch.setenv("QLORA_BACKEND", backend)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = python(SHOW_BACKENDS)
    assert found.returncode != 0 and error in found.stderr


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """`backends.ROUTES`, empty."""
    empty: Counter = Counter()
    monkeypatch.setattr(backends, "ROUTES", empty)
    return empty


def test_whoever_imports_the_operators_has_what_runs_them(kernels, monkeypatch):
    """The reference must not run unawares in a program that imports `ops`, or PagedAdamW, and nothing else."""
    monkeypatch.delenv("QLORA_BACKEND", raising=False)
    show = "import sys, torch; from qlora_kernels import ops; x = torch.randn(4, 64); ops.swiglu(x, x); "
    found = python(show + "print(sys.modules['qlora_kernels.backends'].routes())")
    assert found.stdout.strip() == "{'swiglu': {'native': 1}}", found.stderr


def test_routes_are_counted(counts):
    """A kernel's calls under its backend, those it does not take under the reference."""
    weight, cpu = torch.randn(4, 64), "reference" if backends.NATIVE is None else "native"
    for _ in range(3):
        ops.quantize_4bit(weight, NF4, 64)
    assert counts == {("quantize_4bit", cpu): 3}
    ops.quantize_4bit(weight.double(), NF4, 64)
    ops.swiglu(weight.double(), weight.double())
    assert counts == Counter({("quantize_4bit", cpu): 3}) + Counter(
        {("quantize_4bit", "reference"): 1, ("swiglu", "reference"): 1}
    )


def test_routes_are_printed_an_operator_a_line(kernels, counts):
    assert backends.routes() == {}
    operators, weight, found = routed(kernels), torch.randn(4, 64), quantized(torch.randn(4, 64))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        operators.quantize_4bit(weight.to(dtype), NF4, 64)
    operators.gemv_4bit(weight[0], found.parts, found.layout)
    operators.swiglu(weight, weight)
    ran = {
        "gemv_4bit": {"reference": 1},  # no kernel on a CPU
        "quantize_4bit": {"native": 2, "reference": 1},
        "swiglu": {"native": 1},
    }
    assert backends.routes() == ran
    assert backends.routes(since=counts.copy()) == {}
    assert backends.routes_as_text(ran) == (
        "  gemv_4bit      reference 1\n  quantize_4bit  native 2, reference 1\n  swiglu         native 1"
    )


def test_operators_go_past_the_dispatcher():
    """And not while somebody looks on: a plan and a count see every operator."""
    here, card = torch.ones(1), SimpleNamespace(is_cuda=True)
    assert backends.quickly("swiglu", here) is not ops.swiglu
    assert torch.equal(backends.quickly("swiglu", here)(here, here), ops.swiglu(here, here))
    assert backends.quickly("swiglu", here.to("meta")) is ops.swiglu
    assert backends.quickly("swiglu", FakeTensorMode().from_tensor(here)) is ops.swiglu
    with torch.profiler.profile():
        assert backends.quickly("swiglu", here) is ops.swiglu
    assert backends.quickly("swiglu", card) is not ops.swiglu
    with FlopCounterMode(display=False):
        assert backends.quickly("swiglu", card) is ops.swiglu


def test_parts_of_a_kernel_are_not_counted(kernels, counts):
    """A layer is one call, whether it is one kernel or the reference's several operators."""
    found, x, A, B = quantized(torch.randn(96, 128)), torch.randn(40, 128), torch.randn(4, 128), torch.randn(96, 4)
    for dtype in (torch.bfloat16, torch.float64):
        routed(kernels).adapted_linear(
            *(x.to(dtype), x.to(dtype), A, B), torch.ones(96), None, None, 0.5, found.parts, found.layout
        )
    assert {name for name, _ in counts} == {"adapted_linear"} and counts.total() == 2


def test_an_error_is_not_covered_up_by_the_reference(kernels, counts):
    """Only NotImplemented is: what does not fit is refused, and not counted."""
    with pytest.raises(ValueError, match="3 scales for 4 blocks"):
        routed(kernels).encode_4bit(torch.randn(4, 64), NF4, torch.ones(3), 64)
    assert not counts


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_hang(kernels, threads):
    """libgomp's threads do not survive a fork: with them, the child would wait in its first parallel region."""
    threads(2)
    weight = torch.randn(600, 1024)
    packed, absmax = kernels.quantize_4bit(weight, NF4, 64)
    found = QuantizedWeight.of(packed, (absmax,), (600, 1024))
    arguments = (found.parts, found.layout, None, torch.float32)
    expected = kernels.dequantize_4bit(*arguments).numpy()
    many = torch.rand(1 << 17)
    kernels.quantize_absmax(many, NESTED_BLOCKSIZE)
    child = os.fork()
    if child == 0:
        torch.use_deterministic_algorithms(False)  # torch fills a large tensor with its threads, which are gone
        got = kernels.dequantize_4bit(*arguments).numpy()
        codes = kernels.quantize_absmax(many, NESTED_BLOCKSIZE)[0].numpy()
        said = kernels.describe().endswith("1 thread after a fork)")
        os._exit(0 if (got == expected).all() and codes.any() and said else 1)
    assert wait(child, 20) == 0


FORKED_BEFORE_LOADING = """
import os, signal, torch
torch.set_num_threads(2)
torch.randn(1 << 20).mul_(2)
child = os.fork()
if child == 0:
    signal.alarm(20)
    torch.set_num_threads(1)
    weight = torch.randn(600, 1024)
    torch.set_num_threads(2)
    from qlora_kernels import ops
    from qlora_kernels.weight import levels_of
    ops.quantize_4bit(weight, levels_of("nf4", weight.device), 64)
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def python(code: str, *, path: Path | None = None, timeout: float = 60) -> subprocess.CompletedProcess:
    """Run `code` in a new interpreter, which imports `qlora_kernels` from `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path or build.FOLDER.parents[1])}
    arguments = ["-m", build.__name__] if code == "build" else ["-c", code]
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_a_child_that_loads_the_kernels_does_not_hang(kernels, monkeypatch):
    """The parent never loaded the kernels, but torch had threads there: the child must not count on them either."""
    monkeypatch.delenv("QLORA_BACKEND", raising=False)
    result = python(FORKED_BEFORE_LOADING)
    assert result.returncode == 0, result.stderr


def test_a_stale_library_is_refused(kernels, monkeypatch, tmp_path):
    """In a checkout: an edited source stops the import and names the command; that command helps; no library is no
    error.
    """
    monkeypatch.delenv("QLORA_BACKEND", raising=False)
    tree = tmp_path / "kernels"
    shutil.copytree(build.FOLDER.parent, tree / "qlora_kernels")
    source = tree / "qlora_kernels" / "cpu" / "csrc" / "portable.cpp"
    show = "from qlora_kernels import backends; print(backends.describe()['cpu'])"
    source.write_text(source.read_text() + "// edited\n")
    stale = python(show, path=tree)
    assert (
        stale.returncode != 0
        and f"was built from other sources than those beside it: run {build.COMMAND}" in stale.stderr
    )
    assert python("build", path=tree, timeout=300).returncode == 0
    assert python(show, path=tree).stdout.startswith("native (")
    (tree / "qlora_kernels" / "cpu" / build.LIBRARY).unlink()
    assert f"the native kernels are not built: run {build.COMMAND}" in python(show, path=tree).stdout


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.compile_library(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_compile_is_named_and_nothing_is_left(monkeypatch, tmp_path):
    """As many compilers at a time as there are processors; none links what is not whole."""
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\necho "+ $*" >> {log}\nsleep 0.1\necho "-" >> {log}\n'
        'case "$*" in *api_step.cpp*) echo "a word is missing"; exit 1;; esac\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match=r"(?s)api_step\.cpp.*a word is missing"):
        build.compile_library(tmp_path / "library.so")
    assert {path.name for path in tmp_path.iterdir()} == {"log", "compiler"}
    lines = log.read_text().splitlines()
    running = list(itertools.accumulate(1 if line.startswith("+") else -1 for line in lines))
    assert 1 <= max(running) <= len(os.sched_getaffinity(0))
    assert not any("-shared" in line for line in lines)


def test_a_build_that_is_ended_takes_its_folder_along(tmp_path):
    """As `scripts/environment.sh` ends it, at Ctrl-C: the build and its compilers, a group of their own."""
    compiler, begun = tmp_path / "compiler", tmp_path / "begun"
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {begun}\nexec sleep 60\n')
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "qlora_kernels.cpu.build", "--force"]
    environment = {**os.environ, "CXX": str(compiler), "PYTHONPATH": str(build.FOLDER.parents[1])}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    folder = Path(begun.read_text().splitlines()[0].rsplit(" -o ", 1)[1]).parent
    assert folder.parent == build.FOLDER and not folder.exists()  # another test may be building beside it


def test_what_is_fresh_is_not_compiled_again(monkeypatch, tmp_path):
    """An installation takes the library that lies beside the sources; with `force` it needs the compiler."""
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    target = tmp_path / "folder" / build.LIBRARY
    assert build.build(target=target) == target
    assert target.read_bytes() == (build.FOLDER / build.LIBRARY).read_bytes()
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.build(force=True, target=target)

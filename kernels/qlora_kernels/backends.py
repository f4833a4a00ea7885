"""Which code runs an operator where, and a count of what ran.

    CPU                 the native library; where it is not built, the reference
    NVIDIA cards        the Triton kernels (compute capability 8.0 and later)
    other accelerators  bitsandbytes' operators for what they have, the reference for the rest

QLORA_BACKEND=native|triton|bitsandbytes|reference forces one; it is an error where it cannot run. A backend is a set of
functions named as the operators. One that cannot take its arguments (a dtype, a shape) returns NotImplemented, and the
reference runs: that happens here alone, and is counted (`ROUTES`, printed with QLORA_TRACE=1 and by `qlora doctor
--trace`), so that nobody trains on the slow path unawares. The alternative, a fallback inside each kernel's function,
leaves silently at fifty places.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from qlora_kernels import BackendError, avoided, ops, reference
from qlora_kernels.cpu import native
from qlora_kernels.cpu.binding import DTYPES
from qlora_kernels.cpu.decoder import Call, Layer
from qlora_kernels.weight import QuantizedWeight

BACKENDS = ("native", "triton", "bitsandbytes", "reference")  # what QLORA_BACKEND may name
ACCELERATORS = ("CUDA", "XPU", "HPU", "MPS", "PrivateUse1")  # torch's dispatch keys

PLAIN = (Tensor, torch.nn.Parameter)  # what nothing stands behind, as behind a fake tensor
_direct: dict[str, dict[str, Callable]] = {"CPU": {}, "CUDA": {}}  # what torch's dispatcher calls there

# (operator, backend) -> calls; the parts of a kernel, or of a decoder layer in one call, are not counted.
ROUTES: Counter[tuple[str, str]] = Counter()
AVOIDED: dict[tuple[str, str], str] = {}  # (operator, backend) -> why `qlora selftest` found it wrong here


def use(name: str, device: str, function: Callable, backend: str) -> None:
    """Run `function`, of `backend`, for the operator on tensors of `device` (a dispatch key, such as "CPU")."""
    install(name, device, routed(name, function, backend))


def install(name: str, device: str, call: Callable, library: torch.library.Library = ops.LIBRARY) -> None:
    """Have torch's dispatcher, and `quickly`, run `call` for the operator on tensors of `device`; by another library
    in place of what is installed.
    """
    library.impl(name, call, device, allow_override=library is not ops.LIBRARY)
    if device in _direct:
        _direct[device][name] = call


def routed(name: str, function: Callable, backend: str) -> Callable:
    """`function`, or the reference for what it does not take; counted either way."""
    fallback, taken, refused = getattr(reference, name), (name, backend), (name, "reference")

    def call(*arguments):
        if taken in AVOIDED:
            return _following(name, backend)(*arguments)
        result = function(*arguments)
        if result is NotImplemented:
            ROUTES[refused] += 1
            return fallback(*arguments)
        ROUTES[taken] += 1
        return result

    return call


@functools.cache
def _following(name: str, backend: str) -> Callable:
    """The operator by the backend behind one that is wrong here: bitsandbytes behind Triton, then the reference."""
    theirs = _loaded("bitsandbytes").get(name) if backend == "triton" and _installed("bitsandbytes") else None
    return routed(name, theirs or getattr(reference, name), "bitsandbytes" if theirs else "reference")


def machine(backend: str, index: int | None = None) -> str:
    """What the kernels of a backend run on, as `avoided` keeps it."""
    if backend == "native":
        there = (native.build.FOLDER / native.build.LIBRARY).stat()
        build = f"{NATIVE.isa if NATIVE else ''}, built {there.st_mtime_ns}.{there.st_size}"
    else:
        sources = sorted((native.build.FOLDER.parent / backend).glob("*.py"))
        build = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    return avoided.machine(backend, index, build)


def recall(backend: str, index: int | None = None) -> None:
    """Go round what failed `qlora selftest` on this machine, and say so at every start."""
    if not avoided.file().exists():
        return
    for name, why in avoided.read(machine(backend, index)).items():
        AVOIDED[name, backend] = why
        line = f"kernels  {name} ({backend}) failed `qlora selftest` here ({why}): the next backend runs it"
        print(line, file=sys.stderr, flush=True)


def routes(since: Counter[tuple[str, str]] | None = None) -> dict[str, dict[str, int]]:
    """What ran so far, or since `ROUTES` was as given: operator -> backend -> calls."""
    found: dict[str, dict[str, int]] = {}
    for (name, backend), count in sorted((ROUTES - (since or Counter())).items()):
        found.setdefault(name, {})[backend] = count
    return found


def routes_as_text(found: dict[str, dict[str, int]]) -> str:
    """The same for people, an operator a line."""
    width = max(map(len, found), default=0)
    return "\n".join(
        f"  {name:<{width}}  {', '.join(f'{backend} {count}' for backend, count in counts.items())}"
        for name, counts in found.items()
    )


# ---------------------------------------------------------------- the choice


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _forced() -> str:
    return os.environ.get("QLORA_BACKEND", "")


@functools.cache
def _cuda(index: int | None = None) -> tuple[str, str]:
    """(backend, why) on a CUDA device, the current one without an index: our Triton kernels where they run. Found out
    at the first use of the device, which may start the driver. Each card is asked for itself: two of a machine differ.
    """
    if _forced() in ("reference", "bitsandbytes"):
        return _other()
    if torch.version.hip is not None:
        missing = "they are made for NVIDIA cards"
    elif not _installed("triton"):
        missing = "triton is not installed"
    elif not torch.cuda.is_available():
        missing = "torch sees no CUDA device"
    elif torch.cuda.get_device_capability(index) < (8, 0):
        missing = "they need compute capability 8.0"
    elif not (missing := _probe(torch.device("cuda", torch.cuda.current_device() if index is None else index))):
        recall("triton", index)
        return "triton", ""
    if _forced() == "triton":
        raise BackendError(
            f"QLORA_BACKEND=triton: the Triton kernels cannot run, {missing}. Unset it for the fastest there is"
        )
    backend, why = _other()
    return backend, f"the Triton kernels cannot run, {missing}" + (f"; {why}" if why else "")


def _probe(device: torch.device) -> str:
    """What keeps a small kernel from running right on the card; "" if nothing does.

    Triton builds its driver with a C compiler at its first launch, and the card's own driver may refuse the code: only
    a launch tells. Whatever is raised means that the next backend has to do.
    """
    try:
        kernel = _functions("triton")["dequantize_4bit"]
        packed = torch.arange(64, dtype=torch.uint8).view(-1, 1)
        weight = QuantizedWeight.of(packed, (torch.tensor([0.5, 2.0]),), (2, 64), 64)
        layout, parts = weight.layout, [part.to(device) for part in weight.parts]
        found = kernel(parts, layout, None, torch.float32).cpu()
    except Exception as error:  # of any kind: a compiler, a driver and a card each have their own
        return " ".join(f"a small one failed ({type(error).__name__}: {error}".split())[:200] + ")"
    expected = reference.dequantize_4bit(weight.parts, layout, None, torch.float32)
    return "" if torch.equal(found, expected) else "a small one computed something else"


@functools.cache
def _other() -> tuple[str, str]:
    """(backend, why) where we have no kernels of our own."""
    if _forced() == "reference":
        return "reference", "QLORA_BACKEND=reference"
    if _installed("bitsandbytes"):
        return "bitsandbytes", "QLORA_BACKEND=bitsandbytes" if _forced() == "bitsandbytes" else ""
    if _forced() == "bitsandbytes":
        raise BackendError(
            "QLORA_BACKEND=bitsandbytes: bitsandbytes is not installed. Install it, or unset QLORA_BACKEND"
        )
    return "reference", "bitsandbytes is not installed"


@functools.cache
def _functions(backend: str) -> dict[str, Callable]:
    """The operators that a backend has; imported here, since importing Triton or bitsandbytes is slow and may fail."""
    if backend == "triton":
        from qlora_kernels.triton import adapter, nf4, optim, step

        modules: tuple[ModuleType, ...] = (nf4, adapter, step, optim)
    elif backend == "bitsandbytes":
        from qlora_kernels.bitsandbytes import nf4 as theirs

        modules = (theirs,)
    else:
        modules = ()
    return {name: getattr(module, name) for module in modules for name in ops.OPERATORS if hasattr(module, name)}


@functools.cache
def _loaded(backend: str) -> dict[str, Callable]:
    """The operators of a backend, or none where it breaks on import, as a bitsandbytes made for another CUDA does."""
    try:
        return _functions(backend)
    except Exception as error:  # of any kind, see `_probe`
        if _forced() == backend:
            raise BackendError(
                f"QLORA_BACKEND={backend}: it cannot be loaded ({error}). Mend it, or unset it"
            ) from error
        warnings.warn(f"{backend} cannot be loaded ({error}): the reference runs in its place, slowly", stacklevel=2)
        return {}


def _late(name: str, choose: Callable[[int], tuple[str, str]]) -> Callable:
    """The operator `name` by the backend that `choose` finds at the first call on each device of the kind; what that
    lacks is the reference's.
    """
    found: dict[int, Callable] = {}

    def call(*arguments):
        index = _index_of(arguments)
        if index not in found:
            backend = choose(index)[0]
            function = _loaded(backend).get(name)
            found[index] = routed(name, function or getattr(reference, name), backend if function else "reference")
        return found[index](*arguments)

    return call


def _index_of(arguments: tuple) -> int:
    """The number of the device that the first tensor of an operator's arguments lies on."""
    for argument in arguments:
        first = argument[0] if isinstance(argument, (list, tuple)) and argument else argument
        if isinstance(first, Tensor):
            return first.get_device()
    return -1


def _choose_cpu() -> tuple[native.Native | None, str]:
    forced = _forced()
    if forced not in ("", *BACKENDS):
        raise BackendError(
            f"QLORA_BACKEND={forced}: must be one of {', '.join(BACKENDS)}, or unset for the fastest there is"
        )
    if forced in ("reference", "bitsandbytes"):
        return None, _words(*_other())
    library, words = native.load()
    if forced == "native" and library is None:
        raise BackendError(
            "QLORA_BACKEND=native: the native CPU kernels are not built. "
            f"Run {native.build.COMMAND}, or unset QLORA_BACKEND"
        )
    if forced == "triton":
        _cuda()
    return library, words


def _words(backend: str, why: str) -> str:
    names = {
        "reference": "reference (plain PyTorch)",
        "triton": "Triton kernels",
        "bitsandbytes": "bitsandbytes' kernels",
    }
    return f"{names[backend]}, because {why}" if why else names[backend]


NATIVE, CPU_BACKEND = _choose_cpu()  # the library or None, and in words what the CPU runs


def _register() -> None:
    for name in ops.OPERATORS:
        if NATIVE is not None and hasattr(NATIVE, name):
            use(name, "CPU", getattr(NATIVE, name), "native")
        elif _forced() == "bitsandbytes":
            install(name, "CPU", _late(name, lambda index: _other()))
        else:
            use(name, "CPU", getattr(reference, name), "reference")
        for device in ACCELERATORS:
            install(name, device, _late(name, _cuda if device == "CUDA" else lambda index: _other()))


_register()
if NATIVE is not None:
    recall("native")


def _is_watched() -> bool:
    """Whether torch looks at operators, as what compiles, traces, counts or profiles them does."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch.autograd._profiler_enabled()


def quickly(name: str, x: Tensor) -> Callable:
    """The operator `name` for tensors that lie where x does: the function that torch's dispatcher would call. To hand
    lists to and fro takes the dispatcher as long as a launch takes, and on a CPU all threads wait for it. Not where
    torch looks on, nor for a tensor that is more than one, such as torch's fake ones. Only for what autograd need not
    see.
    """
    operator: Callable = getattr(ops, name)
    if _is_watched():
        return operator
    if x.is_cuda:
        return _direct["CUDA"].get(name, operator)
    return _direct["CPU"].get(name, operator) if x.is_cpu and type(x) in PLAIN else operator


# ---------------------------------------------------------------- a decoder layer in one call


def has_decoder_layer(x: Tensor) -> bool:
    """Whether `decoder_layer` computes any layer of x: asked before a layer is described, which takes longer. Not where
    torch looks at operators, nor where one of the library's is avoided.
    """
    if NATIVE is None or not x.is_cpu or type(x) not in PLAIN or any(backend == "native" for _, backend in AVOIDED):
        return False
    return not _is_watched() and NATIVE.has_decoder_layer(x)


def supports_decoder_layer(x: Tensor, layer: Layer) -> bool:
    """Whether `decoder_layer` computes this one of x [tokens, width], where there are any."""
    return NATIVE is not None and NATIVE.supports_decoder_layer(x, layer)


def decoder_layer(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor | None, Call]:
    """`DecoderKernels.decoder_layer`."""
    assert NATIVE is not None
    ROUTES["decoder_layer", "native"] += 1
    return NATIVE.decoder_layer(x, layer)


def decoder_layer_backward(
    dy: Tensor, x: Tensor | None, kept: Tensor, factors: Tensor | None, call: Call
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`DecoderKernels.decoder_layer_backward`."""
    assert NATIVE is not None
    ROUTES["decoder_layer_backward", "native"] += 1
    return NATIVE.decoder_layer_backward(dy, x, kept, factors, call)


# ---------------------------------------------------------------- memory of results


def empty(*shape: int, like: Tensor) -> Tensor:
    """As `like.new_empty(shape)`, for what soon goes: on a CPU in memory that the native library keeps for such."""
    if NATIVE is None or like.device.type != "cpu" or like.dtype not in DTYPES:
        return like.new_empty(shape)
    return NATIVE.empty(*shape, dtype=like.dtype)


def release_memory() -> None:
    """Return to the system what the native library keeps for results to come."""
    if NATIVE is not None:
        NATIVE.library.qlora_release_memory()


# ---------------------------------------------------------------- what has a kernel

_planned: ContextVar[str] = ContextVar("planned", default="cpu")


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Inside, tensors without a device ("meta") count as those of this kind, "cpu" or "cuda": a plan follows the
    machine that will run it, not the one that makes it. A card that is not here is taken to run our kernels.
    """
    token = _planned.set(kind)
    try:
        yield
    finally:
        _planned.reset(token)


def kind_of(device: torch.device) -> str:
    """The type of a device; of the meta device the planned one."""
    return _planned.get() if device.type == "meta" else device.type


def _runs_triton(device: torch.device) -> bool:
    if kind_of(device) != "cuda":
        return False
    if device.type == "meta" and not torch.cuda.is_available():
        return _forced() in ("", "native", "triton")
    return _cuda(device.index)[0] == "triton"


def prepare(device: torch.device) -> None:
    """Make what kernels share on a device now, not at their first launch, which may be inside a CUDA graph."""
    if device.type == "cuda" and _runs_triton(device):
        from qlora_kernels.triton import common

        common.prepare(device)


def has_gemv(device: torch.device) -> bool:
    """Whether `gemv_4bit` has a kernel there; elsewhere decoding to a reused buffer and a product is faster."""
    return _runs_triton(device) and ("gemv_4bit", "triton") not in AVOIDED


def has_fused_elementwise(device: torch.device) -> bool:
    """Whether the operators between the products (RMSNorm, SwiGLU) have kernels there, so that they beat PyTorch's
    chains.
    """
    return NATIVE is not None if kind_of(device) == "cpu" else _runs_triton(device)


def has_sum_and_norm(device: torch.device) -> bool:
    """Whether `add_rms_norm` and `rms_norm_backward_add` have kernels there; elsewhere torch adds."""
    return NATIVE is not None and kind_of(device) == "cpu" and ("add_rms_norm", "native") not in AVOIDED


def has_joined_products(device: torch.device) -> bool:
    """Whether adapted layers of one input are best computed as one: where launches are what costs."""
    return _runs_triton(device)


def has_operands(device: torch.device) -> bool:
    """Whether `adapted_operands` has a kernel there; elsewhere a weight and the factors of its adapter are made one by
    one.
    """
    return _runs_triton(device) and ("adapted_operands", "triton") not in AVOIDED


def supports_fused_gemm(x: Tensor, weight: list[Tensor], layout: list[int]) -> bool:
    """Whether `matmul_4bit` and `adapted_linear` of a weight are one kernel; elsewhere a dense weight for the usual
    product is faster.
    """
    if NATIVE is None or kind_of(x.device) != "cpu":
        return False
    if ("matmul_4bit", "native") in AVOIDED or ("adapted_linear", "native") in AVOIDED:
        return False
    return NATIVE.supports_fused_gemm(x, weight, layout)


def supports_matmul_dense(x: Tensor, weight: Tensor) -> bool:
    """Whether `matmul_dense_into` has a kernel for them; elsewhere torch's product is as fast."""
    if ("matmul_dense_into", "native") in AVOIDED:
        return False
    return kind_of(x.device) == "cpu" and NATIVE is not None and NATIVE.supports_matmul_dense(x, weight)


def is_widened(x: Tensor) -> bool:
    """Whether products of x are made in float32 and rounded: of 16 bits on a CPU that does not multiply them, or is
    held to less (QLORA_CPU_ISA), where torch has a plain loop or an emulation. What waits for the backward pass is not
    wide.
    """
    if x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or kind_of(x.device) != "cpu":  # a card's is hot
        return False
    if x.dtype == torch.float16:
        return not _multiplies_fp16()
    return not (multiplies_bf16() if NATIVE is None else NATIVE.bf16_unit)


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def _multiplies_fp16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def multiplies_by_integers() -> bool:
    """Whether float32 products of a layer are made of integers where torch's switch allows less than float32."""
    return NATIVE is not None and NATIVE.layers > 1


def multiplies_layers_in_bf16() -> bool:
    """Whether layers in bf16 are made of dot products of our own, without a matrix unit."""
    return NATIVE is not None and NATIVE.layers_in_bf16


def multiplies_layers_in_float32() -> bool:
    """Whether layers in float32 are multiplied by kernels of our own."""
    return NATIVE is not None and NATIVE.layers > 0


def supports_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` has a kernel for them on their device."""
    if ("attention", "native") in AVOIDED or ("attention_backward", "native") in AVOIDED:
        return False
    return kind_of(q.device) == "cpu" and NATIVE is not None and NATIVE.supports_attention(q, k, v)


def in_use(device: torch.device) -> str:
    """The backend that is chosen for a device; on a card this asks it, and recalls what is avoided there."""
    if device.type == "cpu":
        return "native" if NATIVE is not None else "reference"
    return (_cuda(device.index) if device.type == "cuda" else _other())[0]


def describe() -> dict[str, str]:
    """Which code runs the operators, by device type, in words (for `qlora doctor`)."""
    cpu = CPU_BACKEND if NATIVE is None else NATIVE.describe()
    return {"cpu": cpu, "cuda": _words(*_cuda())}

"""The short form of `qlora selftest`, which runs by itself at the first use of a card: each kernel that training needs,
once, at one odd shape.

    <cache>/qlora/checked.json    [what was checked: device, driver, versions and the kernels' build, see `avoided`]

It takes seconds, most of them for compiling what the first step needs anyway, and once for each of these. A kernel that
is wrong or refused goes to the next backend (`qlora_kernels.avoided`), with a line now and at every start. The
alternative, the whole selftest, takes a minute that nobody has asked for; none, and a driver's mistake trains a model.
"""

from __future__ import annotations

import contextlib
import sys

import torch

from qlora.errors import UserError, problem
from qlora.optim.memory_errors import out_of_memory
from qlora.selftest import operators
from qlora_kernels import avoided, backends

NEEDED = (  # by a step of LoRA or DoRA on a card
    *("dequantize_4bit", "dequantize_4bit_joined", "row_norms_4bit", "prepare_lora_factors", "adapted_operands"),
    *("adapter_gradients", "joined_gradients", "rms_norm", "rms_norm_backward", "swiglu_joined"),
    *("swiglu_joined_backward", "swiglu", "swiglu_backward", "rotate", "rotate_backward", "cross_entropy_", "adamw_"),
)


def check_first_use(device: torch.device) -> None:
    """Check the kernels of the backend in use on `device`, unless these were checked there before.

    Raises:
        UserError: a kernel has ended what this process can do with the card; the next start goes round it.
    """
    backend = backends.in_use(device)
    if backend not in ("native", "triton"):
        return
    key = backends.machine(backend, device.index)
    if key in avoided.checked():
        return
    failed: dict[str, str] = {}
    for name in NEEDED:
        if (name, backend) in backends.AVOIDED or not (why := _failure(name, device)):
            continue
        failed[name] = backends.AVOIDED[name, backend] = why
        line = f"kernels  {name} ({backend}) failed its check at the first use ({why}): the next backend runs it"
        print(line, file=sys.stderr, flush=True)
        if not _answers(device):
            _keep(key, failed, whole=False)
            rule = f"{name} ({backend}) failed and the device answers no more: {why}"
            raise UserError(problem("device", str(device), rule, "Start again: this kernel is gone round then"))
    _keep(key, failed, whole=True)


def _failure(name: str, device: torch.device) -> str:
    """Why the operator is wrong there, or ""."""
    draw = operators.Draw(device, 130, 576, 40, operators.half(device))
    try:
        error, limit = operators.errors(name, draw)
    except Exception as exception:  # of any kind: a compiler, a driver and a card each have their own
        if out_of_memory(exception):
            raise
        return " ".join(f"{type(exception).__name__}: {exception}".split())[:200]
    return "" if error <= limit else f"error {error:.1e} at {draw}"


def _answers(device: torch.device) -> bool:
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def _keep(key: str, failed: dict[str, str], whole: bool) -> None:
    """For the next start. Where the cache cannot be written, that checks again."""
    with contextlib.suppress(OSError):
        if failed:
            avoided.write(key, avoided.read(key) | failed)
        if whole:
            avoided.note_checked(key)

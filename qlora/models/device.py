"""Which device and which dtype "auto" means here, asked of torch once.

`config` checks how an option is written; only here torch says what this machine has. The alternative, to let the first
tensor fail, would read the data and load the model before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora.errors import UserError, problem
from qlora.specs import DTYPE_NAMES
from qlora_kernels import backends

DTYPES = dict(zip(DTYPE_NAMES, (torch.bfloat16, torch.float16, torch.float32), strict=True))


def resolve_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one, else the CPU. A card always has its number: parts of torch.cuda refuse a
    device without one.

    Raises:
        UserError: no device of that name, no CUDA device here, or fewer of them.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(problem("device", device, "is no torch device", "Use auto, cpu, cuda or cuda:0")) from None
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise UserError(
            problem("device", device, "torch sees no CUDA device here", "Use `device=cpu`, and run: qlora doctor")
        )
    index, count = torch.cuda.current_device() if chosen.index is None else chosen.index, torch.cuda.device_count()
    if index >= count:
        names = ", ".join(f"cuda:{i}" for i in range(count))
        raise UserError(problem("device", device, f"torch sees {count} CUDA device{'s' * (count > 1)}", f"Use {names}"))
    return torch.device("cuda", index)


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """ "auto" is bf16 where the device multiplies bf16 natively, else fp32.

    Raises:
        UserError: a name that is neither "auto" nor one of `DTYPES`.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(problem("dtype", dtype, f"must be one of auto, {', '.join(DTYPES)}", "auto suits the device"))
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if backends.multiplies_bf16() else "fp32"


def device_notes(device: torch.device, dtype: str) -> list[str]:
    """What "auto" left aside on this machine, a line each: an unused device, a dtype that a card is slow in."""
    notes = []
    others = {"Apple GPU (mps)": torch.backends.mps.is_available(), "Intel GPU (xpu)": torch.xpu.is_available()}
    if device.type == "cpu":
        unused = [name for name, there in others.items() if there]
        notes += [f"the {name} is not used: qlora trains on CPUs and CUDA devices" for name in unused]
    if device.type == "cuda" and dtype == "fp32" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_properties(device).name
        fast = "`dtype=fp16` is several times as fast in half the memory, but may overflow (`on_nan=skip` goes on)"
        notes.append(f"{name} has no bf16, so auto is fp32: {fast}")
    if dtype == "fp32" and lacks_bf16(device):
        half = "`dtype=bf16` keeps what waits for the backward pass in half the memory, as fast"
        notes.append(f"this CPU does not multiply bf16, so auto is fp32: {half}")
    return notes


def lacks_bf16(device: torch.device) -> bool:
    """Whether this is a CPU that does not multiply bf16: "auto" is fp32 there, and "bf16" is multiplied in float32."""
    return device.type == "cpu" and not backends.multiplies_bf16()


def arithmetic_of(dtype: str, device: torch.device) -> str:
    """What decides the numbers of a run: the dtype, and whether `products_of` makes float32 products of integers."""
    if dtype == "auto" and lacks_bf16(device) and backends.multiplies_by_integers():
        return "auto (fp32, products by integers)"
    return resolve_dtype(dtype, device)


@contextmanager
def products_of(dtype: str, device: torch.device) -> Iterator[None]:
    """Inside, where a CPU has no bf16 and "auto" or "bf16" was asked for, float32 products may be less precise (torch's
    switch, "high"): kernels that have 16-bit integers use them, and lose a fifth of what bf16 would or less. Who asks
    for fp32 gets it. Training, its start, and what is done with its adapter compute alike.
    """
    before = torch.get_float32_matmul_precision()
    try:
        if dtype in ("auto", "bf16") and lacks_bf16(device) and before == "highest":
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)

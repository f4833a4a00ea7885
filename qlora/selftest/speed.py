"""How fast operators are beside a copy on the same device: a share of its bytes a second.

    share = (bytes that the operator has to move / its time) / (bytes that a copy moves / its time)

A copy is what memory allows; the share tells a slow kernel from a slow machine. The alternative, times alone, says
nothing without another machine of the kind.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qlora.selftest.operators import CASES, Draw, half
from qlora_kernels import ops

NAMES = ("dequantize_4bit_into", "rms_norm", "swiglu", "swiglu_backward", "columnwise_dot", "adamw_")
ROUNDS = 5


def share_of_copy(name: str, device: torch.device) -> float:
    """The operator at the shape of a real layer, in 16 bits on a card and float32 on a CPU."""
    card = device.type == "cuda"
    draw = Draw(device, 4096, 4096, 2048, half(device)) if card else Draw(device, 1024, 2048, 512, torch.float32)
    arguments, call = CASES[name](draw), getattr(ops, name)
    source = torch.ones(1 << 24, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    return _moved(name, arguments) / _seconds(lambda: call(*arguments), device) / copied


def _moved(name: str, arguments: tuple) -> int:
    """Bytes that have to be read or written: each tensor once, results as large as the activations."""
    given = _bytes(arguments)
    if name == "adamw_":  # without its workspace, and three of four tensors are written too
        return (given - arguments[5].nbytes) * 7 // 4
    results = {"rms_norm": 1, "swiglu": 1, "swiglu_backward": 2}.get(name, 0)
    return given + results * (arguments[0].nbytes if results else 0)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times[1:])

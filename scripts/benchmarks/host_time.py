#!/usr/bin/env python
"""What Python costs: the time of an adapted layer's forward pass on the host, beside nn.Linear's.

    scripts/benchmarks/host_time.py

The operators only allocate here, and one token of 64 numbers is multiplied, so what is left is the time until a card
has been told everything. (A launch of a Triton kernel costs its own, which no machine without a card shows.) The least
of many repeats, in this thread's processor time, so that it can be taken on a machine that does other things.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora.layers import joined
from qlora.layers.adapters import AdaptedLinear
from qlora.layers.linear import NF4Linear
from qlora.specs import AdapterSpec
from qlora_kernels import backends, ops

WIDTH, REPEATS, CALLS = 64, 1500, 5


def only_allocate() -> torch.library.Library:
    """Every operator in place of its kernel: what it returns, uncomputed."""
    library = torch.library.Library("qlora", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another kernel was there
        for name, function in ops.SHAPES.items():
            library.impl(name, function, "CPU", allow_override=True)
    return library


def microseconds(call: Callable[[], object]) -> float:
    found = []
    for _ in range(REPEATS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        found.append((time.thread_time() - start) / CALLS)
    return min(found) * 1e6


def adapted(method: str) -> list[AdaptedLinear]:
    dense = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)]
    return [AdaptedLinear(NF4Linear.from_linear(layer), AdapterSpec(method, rank=4)) for layer in dense]


def timed(x: Tensor, layers: list[AdaptedLinear]) -> dict[str, float]:
    """Microseconds, of q, k and v and of gate and up as in a model, with the question whether they can be joined."""

    def attention() -> None:
        assert joined.joinable(layers)
        joined.products(x, layers)

    def mlp() -> None:
        assert joined.joinable(layers[:2], biased=False)
        joined.swiglu(x, layers[0], layers[1])

    return {
        "one": microseconds(lambda: layers[0](x)),
        "q, k, v": microseconds(attention),
        "gate, up": microseconds(mlp),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # nobody computed what is multiplied
    x = torch.randn(1, WIDTH, requires_grad=True)
    layers = {method: adapted(method) for method in ("lora", "dora")}  # before the operators compute nothing
    library = only_allocate()
    backends.NATIVE = None  # a card's way through a layer: its products are made of parts
    dense = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    linear = microseconds(lambda: dense(x))
    print(f"nn.Linear {linear:.1f} us")
    for method, some in layers.items():
        found = timed(x, some)
        whole = (found["q, k, v"] + found["gate, up"] + 2 * found["one"]) / 7
        parts = {
            "one layer": found["one"],
            "q, k, v, each": found["q, k, v"] / 3,
            "gate, up, each": found["gate, up"] / 2,
        }
        words = ", ".join(f"{name} {value / linear:.1f}" for name, value in (parts | {"of seven": whole}).items())
        print(f"{method}: times nn.Linear, {words}")
    del library


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""What Python costs: the time of an adapted layer's forward pass on the host, beside nn.Linear's.

    scripts/benchmarks/host_time.py            the operators only allocate
    scripts/benchmarks/host_time.py --kernels  they are those of Triton, but nothing is launched

One token of 64 numbers is multiplied, so what is left is the time until a card has been told everything. (A launch of a
Triton kernel costs its own, which no machine without a card shows.) The least of many repeats, in this thread's
processor time, so that it can be taken on a machine that does other things.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora.layers import joined
from qlora.layers.adapters import AdaptedLinear
from qlora.layers.linear import NF4Linear
from qlora.specs import AdapterSpec
from qlora_kernels import backends, ops

WIDTH, REPEATS, CALLS = 64, 2000, 3


def as_on_a_card(functions: dict[str, Callable]) -> torch.library.Library:
    """These as the operators on CPU tensors, and layers that go a card's way. Keep what is returned."""
    functions = {name: backends.routed(name, function, "triton") for name, function in functions.items()}
    library = torch.library.Library("qlora", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another kernel was there
        for name, function in functions.items():
            library.impl(name, function, "CPU", allow_override=True)
    there: Any = backends
    there.NATIVE, there.kind_of, there.has_operands = None, lambda device: "cuda", lambda device: True
    there.quickly = lambda name, x: functions[name]
    return library


def launching_nothing() -> dict[str, Callable]:
    """The operators of the Triton kernels, whose kernels are left out."""
    import triton

    from qlora_kernels.triton import adapter, adapter_norms, nf4

    class Nothing:
        def __getitem__(self, grid: tuple) -> Callable:
            return lambda *arguments, **options: None

    modules = adapter, adapter_norms, nf4
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                setattr(module, name, Nothing())
    return {name: getattr(module, name) for module in modules for name in ops.OPERATORS if hasattr(module, name)}


def microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least of each, all in turns: a quiet moment of the machine is one for all."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            found[name] = min(found[name], (time.thread_time() - start) / CALLS * 1e6)
    return found


def adapted(method: str) -> list[AdaptedLinear]:
    dense = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)]
    return [AdaptedLinear(NF4Linear.from_linear(layer), AdapterSpec(method, rank=4)) for layer in dense]


def calls_of(x: Tensor, layers: list[AdaptedLinear]) -> dict[str, Callable[[], object]]:
    """A layer, q, k and v, gate and up, as in a model, with the question whether they can be joined."""

    def attention() -> None:
        assert joined.joinable(layers)
        joined.products(x, layers)

    def mlp() -> None:
        assert joined.joinable(layers[:2], biased=False)
        joined.swiglu(x, layers[0], layers[1])

    return {"one": lambda: layers[0](x), "q, k, v": attention, "gate, up": mlp}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernels", action="store_true")
    kernels = parser.parse_args().kernels
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # nobody computed what is multiplied
    x = torch.randn(1, WIDTH, requires_grad=True)
    layers = {method: adapted(method) for method in ("lora", "dora")}  # before the operators compute nothing
    library = as_on_a_card(ops.SHAPES | (launching_nothing() if kernels else {}))
    dense = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    for method, some in layers.items():
        found = microseconds({"nn.Linear": lambda: dense(x)} | calls_of(x, some))
        linear = found["nn.Linear"]
        parts = {
            "one layer": found["one"],
            "q, k, v, each": found["q, k, v"] / 3,
            "gate, up, each": found["gate, up"] / 2,
            "of seven": (found["q, k, v"] + found["gate, up"] + 2 * found["one"]) / 7,
        }
        words = ", ".join(f"{name} {value / linear:.2f}" for name, value in parts.items())
        print(f"{method}: nn.Linear {linear:.1f} us; times that, {words}", flush=True)
    del library


if __name__ == "__main__":
    main()

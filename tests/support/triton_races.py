"""What test_triton.py runs in a process of its own: the Triton kernels with their programs in random order, every load
and store checked for an order.

    TRITON_INTERPRET=1 python tests/support/triton_races.py [--unordered]

Triton's interpreter runs one program after the other, so a kernel whose programs must not meet looks right there. Here
each program knows what happened before it: what it did itself, and, at an atomic operation that releases and acquires,
all that those who came to the same address before had done (vector clocks; Lamport, "Time, Clocks", 1978). Two accesses
of one address, one of them a store, without an order between them are a race. `--unordered` takes the atomics' order
away: a checker that then finds nothing would be worth nothing. One line for each check: its name, a tab, the races.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict

import numpy as np
import torch
from triton.runtime import interpreter

Builder = type(interpreter.interpreter_builder)
SHARED = (  # checks of kernels with sums over several programs
    "row norms of many layers",
    "columnwise dot 3x200",
    "columnwise dot 300x130",
    "gradients 150x130 rank 3",
    "joined 150x192 rank 17, 130, 6, 70 rows",
    "layers 150x130",
)
CHECKS = (  # and one of each other kind
    *SHARED,
    "encoding 33x77 blocks of 64",
    "decoding 33x77 blocks of 64",
    "row norms 5x64 rank 3",
    "gradients 3x200 rank 16",
    "layers 5x77",
    "factors rank 3, 70 to 33",
    "rotation 6 tokens 5+2 heads of 20",
    "loss 3x77",
    "adamw 2500",
    "8-bit 1280 blocks of 256",
)


class Launch:
    """The accesses of one launch. `known[p][q]` is the last epoch of program q that p comes after."""

    def __init__(self, ordered: bool, seed: int):
        self.ordered, self.seed = ordered, seed
        self.races = self.count = 0

    def begin(self, shape: tuple[int, int, int]) -> None:
        self.shape, self.count = shape, self.count + 1
        self.order = list(range(shape[0] * shape[1] * shape[2]))
        random.Random(self.seed + self.count).shuffle(self.order)
        self.written: dict[int, tuple[int, int]] = {}
        self.read: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self.known: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self.released: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self.epoch: defaultdict[int, int] = defaultdict(int)

    def place(self, x: int, y: int, z: int) -> tuple[int, int, int]:
        """The program that runs in the place of (x, y, z)."""
        _, rows, columns = self.shape
        self.program = p = self.order[(x * rows + y) * columns + z]
        return p // (rows * columns), p // columns % rows, p % columns

    def after(self, program: int, epoch: int) -> bool:
        return program == self.program or self.known[self.program].get(program, -1) >= epoch

    def load(self, addresses: list[int]) -> None:
        for address in addresses:
            if address in self.written and not self.after(*self.written[address]):
                self.races += 1
            self.read[address][self.program] = self.epoch[self.program]

    def store(self, addresses: list[int]) -> None:
        for address in addresses:
            others = [*self.read[address].items()] + ([self.written[address]] if address in self.written else [])
            self.races += sum(not self.after(*other) for other in others)
            self.written[address] = self.program, self.epoch[self.program]

    def atomic(self, address: int, order: str) -> None:
        """Take over what was released here, release what is known."""
        self.written.pop(address, None)
        if not (self.ordered and "acq_rel" in order.lower().replace("acquire_release", "acq_rel")):
            return
        there, mine = self.released[address], self.known[self.program]
        for clock, other in ((mine, there), (there, {**mine, self.program: self.epoch[self.program]})):
            for program, epoch in other.items():
                clock[program] = max(clock.get(program, -1), epoch)
        self.epoch[self.program] += 1


def addresses(pointers, mask) -> list[int]:
    found = np.asarray(pointers.data).reshape(-1)
    if mask is not None:
        found = found[np.broadcast_to(np.asarray(mask.data), np.asarray(pointers.data).shape).reshape(-1).astype(bool)]
    return np.unique(found).tolist()


def watch(launch: Launch) -> None:
    """Tell `launch` of every access in the interpreter."""
    dim, index = Builder.set_grid_dim, Builder.set_grid_idx
    load, store, atomic = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw

    def set_grid_dim(self, *shape):
        dim(self, *shape)
        launch.begin(shape)

    def create_masked_load(self, pointers, mask, *rest):
        launch.load(addresses(pointers, mask))
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        launch.store(addresses(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self, operation, pointers, value, mask, sem, scope):
        for address in addresses(pointers, mask):
            launch.atomic(address, str(sem))
        return atomic(self, operation, pointers, value, mask, sem, scope)

    Builder.set_grid_dim = set_grid_dim
    Builder.set_grid_idx = lambda self, x, y, z: index(self, *launch.place(x, y, z))
    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    Builder.create_atomic_rmw = create_atomic_rmw


def main() -> None:
    ordered = "--unordered" not in sys.argv
    launch = Launch(ordered, seed=0)
    watch(launch)
    import triton_interpret

    torch.use_deterministic_algorithms(True)
    for name in CHECKS if ordered else SHARED:
        check, *sizes = triton_interpret.INTERPRETED[name]
        torch.manual_seed(0)
        launch.races = 0
        check(*sizes)
        print(f"{name}\t{launch.races}", flush=True)


if __name__ == "__main__":
    main()

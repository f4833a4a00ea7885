"""Which examples an optimizer step sees: a pure function of (count, examples a step, seed, step).

    epoch e of n examples    a permutation of range(n) by a generator of its own, seeded with (seed, e)
    the stream               epoch 0, 1, ... in turn; step k sees its places k * per_step to (k + 1) * per_step

So a resumed run needs only the number of its step. The alternative, an iterator with a state of its own, has to be
saved, or drawn forward again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from qlora.errors import UserError, problem

T = TypeVar("T")

# More than anybody means: a step's examples are chosen before it begins.
MOST_IN_A_STEP, MOST_STEPS = 1 << 20, 10**9


def _permutation(count: int, *key: object) -> list[int]:
    """A permutation of range(count) from a generator of its own, seeded by a hash: (0, 1) and (1, 0) differ."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(_permutation(count, "epoch", seed, epoch))


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the examples in one epoch, another for each epoch and seed; no global generator is touched."""
    return list(_order(count, seed, epoch))


def stream_length(count: int, epochs: float) -> int:
    """How many examples a run of `epochs` passes sees: half of them for 0.5, and at least one."""
    return max(1, round(count * epochs))


def step_count(count: int, per_step: int, epochs: float) -> int:
    """How many steps of `per_step` examples these passes take; the last may be short."""
    return math.ceil(stream_length(count, epochs) / per_step)


def run_length(count: int, per_step: int, *, steps: int | None, epochs: float | None, warmup: int) -> dict[str, int]:
    """How many `steps` a run on `count` examples takes, and how many `examples` it sees. Without `steps` it is as long
    as `epochs`, which end with a short step.

    Raises:
        UserError: `warmup` is longer than the epochs, or a step or the run is longer than anything that ends.
    """
    if per_step > MOST_IN_A_STEP:
        rule = f"with `accumulate` a step has {per_step} examples, more than {MOST_IN_A_STEP}"
        raise UserError(problem("batch_size", per_step, rule, "Give a smaller `batch_size` or `accumulate`"))
    if (steps or 0) > MOST_STEPS or (epochs or 0.0) * count / per_step > MOST_STEPS:
        name, value = ("steps", steps) if epochs is None else ("epochs", epochs)
        rule = f"is more than {MOST_STEPS} steps"
        raise UserError(problem(name, value, rule, "Give fewer: a constant `schedule` can be made longer by `resume`"))
    if steps is not None:
        return {"steps": steps, "examples": steps * per_step}
    epochs = 1.0 if epochs is None else epochs
    steps = step_count(count, per_step, epochs)
    if warmup > steps:
        rule = f"epochs={epochs:g} are only {steps} steps"
        raise UserError(problem("warmup", warmup, rule, "Give a shorter warmup or more epochs"))
    return {"steps": steps, "examples": stream_length(count, epochs)}


def step_indices(count: int, per_step: int, seed: int, step: int, limit: int | None = None) -> list[int]:
    """Which examples optimizer step `step` (from 0) sees: a step may cross epochs, and no example is left out.

    Args:
        count: examples there are.
        per_step: examples a step.
        seed: of the order.
        step: the step's number.
        limit: examples after which the stream ends: with `stream_length(count, epochs)` the last step of a run by
            epochs sees what is left.

    Raises:
        ValueError: the step begins at or past `limit`.
    """
    start = step * per_step
    end = start + per_step if limit is None else min(start + per_step, limit)
    if end <= start:
        raise ValueError(f"step {step} of {per_step} examples would begin at {start}, past the limit of {limit}")
    return [_order(count, seed, position // count)[position % count] for position in range(start, end)]


def split(records: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(train, held out): a seeded choice of round(fraction * n) but at least 1; both parts keep their order.

    Raises:
        UserError: nothing is left to train on.
    """
    if fraction == 0:
        return list(records), []
    held = max(1, round(fraction * len(records)))
    if held >= len(records):
        rule = f"holds out {held} of {len(records)} records, leaving none"
        raise UserError(problem("eval_fraction", fraction, rule, "Lower it, or give more data"))
    chosen = set(_permutation(len(records), "split", seed)[:held])
    train = [record for number, record in enumerate(records) if number not in chosen]
    return train, [record for number, record in enumerate(records) if number in chosen]

"""TODO head of data.order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from qlora.config.commands import FinetuneConfig
from qlora.errors import UserError, problem


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


def run_length(config: FinetuneConfig, count: int) -> dict[str, int]:
    """How many steps a run on `count` examples takes, and how many examples it sees: epochs end with a short step."""
    per_step = config.batch_size * config.accumulate
    if config.steps is not None:
        return {"steps": config.steps, "examples": config.steps * per_step}
    steps = step_count(count, per_step, config.epochs)
    if config.warmup > steps:
        rule = f"epochs={config.epochs:g} are only {steps} steps"
        raise UserError(problem("warmup", config.warmup, rule, "Give a shorter warmup or more epochs"))
    return {"steps": steps, "examples": stream_length(count, config.epochs)}


def step_indices(count: int, per_step: int, seed: int, step: int, limit: int | None = None) -> list[int]:
    """Which examples optimizer step `step` (from 0) sees. A pure function: a resumed run needs only the step.

    The steps cut up one endless stream of epochs, each in its `epoch_order`: a step may cross epochs, none is left out.
    `limit` ends the stream: with `stream_length(count, epochs)` the last step of a run by epochs sees what is left.

    Raises ValueError for a step that begins at or past `limit`.
    """
    start = step * per_step
    end = start + per_step if limit is None else min(start + per_step, limit)
    if end <= start:
        raise ValueError(f"step {step} of {per_step} examples would begin at {start}, past the limit of {limit}")
    return [_order(count, seed, position // count)[position % count] for position in range(start, end)]


def split(records: Sequence, fraction: float, seed: int) -> tuple[list, list]:
    """(train, held out): a seeded choice of round(fraction * n) but at least 1; both parts keep their order.

    Raises UserError if nothing is left to train on.
    """
    if fraction == 0:
        return list(records), []
    held = max(1, round(fraction * len(records)))
    if held >= len(records):
        raise UserError(
            problem(
                "eval_fraction",
                fraction,
                f"holds out {held} of {len(records)} records, leaving none",
                "Lower it, or give more data",
            )
        )
    chosen = set(_permutation(len(records), "split", seed)[:held])
    parts = ([], [])
    for number, record in enumerate(records):
        parts[number in chosen].append(record)
    return parts

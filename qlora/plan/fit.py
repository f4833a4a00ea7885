"""What a fine-tuning run needs in memory, from the model's config and the options alone: no weights, no data.

    peak = max(loading, training, training)     training = model + adapters + gradients + optimizer + activations + workspace
                                  loading = model + its two largest tensors; libraries (what they take at first use) in
                                  both

What lies still is counted from the shapes of the whole model, built on the meta device. What a step needs in passing is
found by running the step itself, `loss_sum` and its backward pass, on meta tensors of the largest micro-batch, with an
account of every storage that comes and goes (`Account`). Three layers and two are run and the difference is that of
every further layer; layers that are not alike are all run. So the plan follows the code and knows every architecture
that trains. The alternative, a formula of bytes a layer, is faster but has to be kept true by hand for each of them,
and cannot know what a backward pass holds at its worst moment.

On a CPU the figures are anonymous memory (RssAnon) above the process' baseline after its imports, without what is freed
but kept by
glibc: a process with a budget gives that back when memory comes near it (`train.PeakMemory`), one without peaks higher
by a fifth. On CUDA they are allocated bytes, by the same account, which no card has verified yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qlora.config.commands import FinetuneConfig
from qlora.data.batch import Example, by_length
from qlora.data.order import run_length, step_indices
from qlora.optim.pages import state_bytes
from qlora.plan.meta import Skeleton, device_of
from qlora.train.memory import anonymous_memory, return_freed_memory

MARGIN = 0.1  # what a budget leaves free of a predicted peak


@dataclass(frozen=True)
class Settings:
    """What may give way to a budget. None of it changes what is computed, but for rounding."""

    batch_size: int
    accumulate: int
    gradient_checkpointing: bool
    optimizer_memory: int | str

    def flags(self) -> str:
        words = ["--gradient-checkpointing"] if self.gradient_checkpointing else []
        words += [
            f"--batch-size {self.batch_size} --accumulate {self.accumulate}",
            f"--optimizer-memory {self.optimizer_memory}",
        ]
        return " ".join(words)


@dataclass(frozen=True)
class Plan:
    """Bytes. `parts` by component add up to the peak of training; `peak` is that, or `loading` or `evaluating` where
    they are higher.
    """

    settings: Settings
    parts: dict[str, int]
    spilled: int
    mapped: int
    loading: int
    evaluating: int
    tokens: int

    @property
    def peak(self) -> int:
        return max(sum(self.parts.values()), self.loading, self.evaluating)

    @property
    def budget(self) -> int:
        """The peak and a margin for what cannot be foreseen."""
        return int(self.peak * (1 + MARGIN)) + 1


Lengths = tuple[int, ...]  # of the examples of a micro-batch
Largest = Callable[
    [int], tuple[list[Lengths], list[Lengths]]
]  # batch size -> the largest micro-batches of the steps, of the evaluations


def predict(skeleton: Skeleton, settings: Settings, largest: Largest) -> Plan:
    """What a run with these settings needs."""
    s, (trained, evaluated) = skeleton, largest(settings.batch_size)
    steps = {batch: s.step(batch, settings.gradient_checkpointing) for batch in trained}
    batch, step = max(steps.items(), key=lambda item: item[1].kept + item[1].passing)
    evaluating = max(
        (s.step(lengths, settings.gradient_checkpointing).evaluating for lengths in evaluated), default=None
    )
    resident, spilled = state_bytes(s.adapters, s.options.optimizer_state, settings.optimizer_memory)
    gradients, kept = s.adapter_bytes, step.kept
    model = s.weights + s.constants + s.others - s.mapped
    libraries = s.libraries
    # In the first micro-batch of a step the gradients come as the activations go, a layer at a time.
    both = (
        kept + gradients if settings.accumulate > 1 else max(kept + gradients // s.count, gradients + kept // s.count)
    )
    parts = {
        "weights": s.weights,
        "constants": s.constants,
        "embeddings, head, norms": s.others,
        "adapters": s.adapter_bytes,
        "gradients": gradients,
        "optimizer": resident,
        "activations": kept,
        "not at the same time": both - kept - gradients,
        "workspace": step.passing,
        "libraries": libraries,
        "mapped from the file": -s.mapped,
    }
    still = model + s.adapter_bytes + gradients + resident + libraries
    evaluation = 0 if evaluating is None else still + evaluating
    return Plan(settings, parts, spilled, s.mapped, model + s.loading + libraries, evaluation, sum(batch))


def choices(config: FinetuneConfig) -> Iterator[tuple[int, int, bool]]:
    """(batch size, batches a step, checkpointing), cheapest first: recomputation costs time, smaller batches cost more
    of it.

    Dropout draws another mask for other batches, so a run with dropout keeps its own.
    """
    yield config.batch_size, config.accumulate, config.gradient_checkpointing
    for size in range(config.batch_size, 0, -1):
        if config.batch_size % size == 0 and (size == config.batch_size or config.dropout == 0):
            if size < config.batch_size or not config.gradient_checkpointing:
                yield size, config.accumulate * (config.batch_size // size), True


def asked(config: FinetuneConfig) -> Settings:
    return Settings(config.batch_size, config.accumulate, config.gradient_checkpointing, config.optimizer_memory)


def fit(skeleton: Skeleton, available: int, largest: Largest) -> tuple[Plan | None, Plan]:
    """(the cheapest plan whose `budget` is at most `available` bytes or None, the smallest plan there is)."""
    config = skeleton.options
    smallest = None
    wanted = predict(skeleton, asked(config), largest)
    if wanted.budget <= available:
        return wanted, wanted
    for size, accumulate, checkpointing in choices(config):
        least = predict(skeleton, Settings(size, accumulate, checkpointing, "none"), largest)
        smallest = least if smallest is None or least.budget < smallest.budget else smallest
        if least.budget > available:
            continue
        room = int(available / (1 + MARGIN)) - least.peak - 1
        more = wanted.parts["optimizer"]
        best = predict(skeleton, Settings(size, accumulate, checkpointing, min(more, max(0, room))), largest)
        return (best if best.budget <= available else least), smallest
    return None, smallest


def largest(
    config: FinetuneConfig, train: Sequence[Example] | None = None, held_out: Sequence[Example] = ()
) -> Largest:
    """The largest micro-batches of the run, those of most tokens without and with padding: its steps are looked through
    in their order, since the longest examples rarely meet in one. Without data every example has max_tokens.
    """

    def most(batches: Iterable[Sequence[Example]]) -> list[Lengths]:
        found = {tuple(len(example.ids) for example in batch) for batch in batches}
        return list({max(found, key=sum), max(found, key=lambda lengths: len(lengths) * max(lengths))}) if found else []

    @functools.cache
    def of(size: int) -> tuple[list[Lengths], list[Lengths]]:
        if train is None:
            full = [(config.max_tokens,) * size]
            return full, full if config.eval_data is not None or config.eval_fraction > 0 else []
        length, per_step = run_length(config, len(train)), config.batch_size * config.accumulate
        steps = (
            step_indices(len(train), per_step, config.seed, step, length["examples"]) for step in range(length["steps"])
        )
        return most(b for chosen in steps for b in by_length([train[i] for i in chosen], size)), most(
            by_length(held_out, size)
        )

    return of


def held(config: FinetuneConfig) -> int:
    """What this process holds before a run on a CPU, without what is free."""
    if device_of(config.device) != "cpu":
        return 0
    return_freed_memory()
    return anonymous_memory()

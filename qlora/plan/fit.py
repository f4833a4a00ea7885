"""What a fine-tuning run needs in memory, and the settings that keep a budget.

    training = weights + constants + others + adapters + gradients + optimizer + activations + workspace + libraries
               - overlap - mapped
    loading  = model + its two largest tensors + libraries - mapped
    peak     = max(training, loading, evaluating, calibrating)

In the first micro-batch of a step the gradients come as the activations go, a layer at a time: `overlap` is what of the
two is never there at once. `mapped` stays in the checkpoint's files. Sizes and steps are those of `meta.MetaRun`;
neither weights nor a formula of bytes a layer are needed (tracker.py says why), and data only for the lengths of its
examples.

On a CPU the figures are anonymous memory (RssAnon) above the process' baseline after its imports, without what is freed
but kept: a process with a budget gives that back near it (`train.memory.PeakMemory`), one without peaks higher by up to
a tenth. On CUDA they are what torch allocates, by the same account, and the baseline is CUDA's own context, which
torch does not count (`meta.CONTEXT`). The planned device decides, not the machine that plans. No card has verified it
yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qlora.config.commands import FinetuneConfig
from qlora.data.batch import Example, by_length
from qlora.data.order import run_length, step_indices
from qlora.optim.pages import FLAT, state_bytes, waiting_bytes
from qlora.plan.meta import CONTEXT, MetaRun, planned_device
from qlora.train.memory import anonymous_memory, return_freed_memory

MARGIN = 0.1  # what a budget leaves free of a predicted peak


@dataclass(frozen=True)
class Settings:
    """What may give way to a budget. None of it changes what is computed, but for rounding."""

    batch_size: int
    accumulate: int
    gradient_checkpointing: bool
    optimizer_memory: int | str

    def options(self) -> list[str]:
        """The settings as `name=value`; recomputation only where it is on."""
        words = ["gradient_checkpointing=true"] if self.gradient_checkpointing else []
        words += [f"batch_size={self.batch_size}", f"accumulate={self.accumulate}"]
        return [*words, f"optimizer_memory={self.optimizer_memory}"]

    def flags(self) -> str:
        """The settings as they are typed."""
        words = ["--gradient-checkpointing"] if self.gradient_checkpointing else []
        words += [f"--batch-size {self.batch_size}", f"--accumulate {self.accumulate}"]
        return " ".join([*words, f"--optimizer-memory {self.optimizer_memory}"])


@dataclass(frozen=True)
class Plan:
    """Bytes of a run with these settings.

    `parts` are counted by component; `overlap` of gradients and activations is never there at once, and `mapped` stays
    in the checkpoint's files. `spilled` is optimizer state outside of memory. `tokens` are those of the micro-batch at
    the peak of training.
    """

    settings: Settings
    parts: dict[str, int]
    overlap: int
    mapped: int
    spilled: int
    loading: int
    evaluating: int
    calibrating: int  # and measuring the gap to 16 bits, where adapters begin by the error of the base; else 0
    tokens: int

    @property
    def training(self) -> int:
        """The peak of training."""
        return sum(self.parts.values()) - self.overlap - self.mapped

    @property
    def peak(self) -> int:
        """The peak of the whole run."""
        return max(self.training, self.loading, self.evaluating, self.calibrating)

    @property
    def budget(self) -> int:
        """The peak and a margin for what cannot be foreseen."""
        return int(self.peak * (1 + MARGIN)) + 1


Lengths = tuple[int, ...]  # tokens of the examples of a micro-batch
PeakBatches = Callable[[int], tuple[list[Lengths], list[Lengths]]]  # see `peak_batches`


def predict(run: MetaRun, settings: Settings, batches: PeakBatches) -> Plan:
    """What a run with these settings needs."""
    trained, evaluated = batches(settings.batch_size)
    steps = {lengths: run.step(lengths, settings.gradient_checkpointing) for lengths in trained}
    at_peak, step = max(steps.items(), key=lambda item: item[1].kept + item[1].passing)
    evaluations = [run.step(lengths, settings.gradient_checkpointing).evaluating for lengths in evaluated]
    resident, spilled = state_bytes(run.adapters, run.options.optimizer_state, settings.optimizer_memory)
    still, gradients = run.still, run.adapter_bytes
    waiting = 0
    if run.device in FLAT:
        magnitudes = run.spec.adapter.method == "dora"
        waiting = waiting_bytes(run.adapters, run.options.optimizer_state, run.stack.count, magnitudes)
    parts = {
        "weights": still.weights,
        "constants": still.constants,
        "embeddings, head, norms": still.others,
        "adapters": run.adapter_bytes,
        "gradients": gradients,
        "gradients beside sums": waiting,
        "optimizer": resident,
        "activations": step.kept,
        "workspace": step.passing,
        "start of the adapters": run.start_bytes,
        "libraries": run.libraries,
    }
    in_memory = still.model - still.mapped + run.libraries
    lasting = in_memory + run.adapter_bytes + gradients + resident + run.start_bytes
    calibrated = [*trained, run.filled] if run.calibration_bytes and run.filled not in trained else trained
    forward = max(run.step(lengths, settings.gradient_checkpointing).evaluating for lengths in calibrated)
    return Plan(
        settings,
        parts,
        overlap=_overlap(step.kept, gradients, run.stack.count, settings.accumulate),
        mapped=still.mapped,
        spilled=spilled,
        loading=in_memory + still.loading,
        evaluating=lasting + max(evaluations) if evaluations else 0,
        calibrating=in_memory + run.adapter_bytes + forward + run.calibration_bytes if run.calibration_bytes else 0,
        tokens=sum(at_peak),
    )


def _overlap(activations: int, gradients: int, layers: int, accumulate: int) -> int:
    """Bytes of activations and gradients that are never there at once.

    With several micro-batches a step, gradients lie there from the first on, and there are none.
    """
    if accumulate > 1:
        return 0
    both = max(activations + gradients // layers, gradients + activations // layers)
    return activations + gradients - both


def candidates(config: FinetuneConfig) -> Iterator[tuple[int, int, bool]]:
    """(batch size, batches a step, checkpointing), cheapest first.

    Recomputation costs time, smaller batches cost more of it. Dropout draws another mask for other batches, so a run
    with dropout keeps its own.
    """
    yield config.batch_size, config.accumulate, config.gradient_checkpointing
    for size in range(config.batch_size, 0, -1):
        if config.batch_size % size == 0 and (size == config.batch_size or config.dropout == 0):
            if size < config.batch_size or not config.gradient_checkpointing:
                yield size, config.accumulate * (config.batch_size // size), True


def requested(config: FinetuneConfig) -> Settings:
    """The settings that were asked for."""
    return Settings(config.batch_size, config.accumulate, config.gradient_checkpointing, config.optimizer_memory)


def fit(run: MetaRun, available: int, batches: PeakBatches) -> tuple[Plan | None, Plan]:
    """(the cheapest plan whose `budget` is at most `available` bytes or None, the smallest plan there is)."""
    config = run.options
    wanted = predict(run, requested(config), batches)
    if wanted.budget <= available:
        return wanted, wanted
    smallest = None
    for size, accumulate, checkpointing in candidates(config):
        least = predict(run, Settings(size, accumulate, checkpointing, "none"), batches)
        smallest = least if smallest is None or least.budget < smallest.budget else smallest
        if least.budget > available:
            continue
        left = int(available / (1 + MARGIN)) - least.peak - 1
        state = min(wanted.parts["optimizer"], max(0, left))
        best = predict(run, Settings(size, accumulate, checkpointing, state), batches)
        return (best if best.budget <= available else least), smallest
    return None, smallest or wanted


def peak_batches(
    config: FinetuneConfig, train: Sequence[Example] | None = None, held_out: Sequence[Example] = ()
) -> PeakBatches:
    """A function: batch size -> the largest micro-batches of the steps, and those of the evaluations.

    The largest are those of most tokens without and with padding. The steps are looked through in their order, since
    the longest examples rarely meet in one. Without data every example has max_tokens.
    """
    if train is None:
        evaluates = config.eval_data is not None or config.eval_fraction > 0
        return lambda size: ([(config.max_tokens,) * size], [(config.max_tokens,) * size] if evaluates else [])
    per_step = config.batch_size * config.accumulate
    length = run_length(len(train), per_step, steps=config.steps, epochs=config.epochs, warmup=config.warmup)

    @functools.cache
    def of(size: int) -> tuple[list[Lengths], list[Lengths]]:
        steps = (
            step_indices(len(train), per_step, config.seed, step, length["examples"]) for step in range(length["steps"])
        )
        trained = _largest(batch for chosen in steps for batch in by_length([train[i] for i in chosen], size))
        return trained, _largest(by_length(held_out, size))

    return of


def _largest(batches: Iterable[Sequence[Example]]) -> list[Lengths]:
    found = {tuple(len(example.input_ids) for example in batch) for batch in batches}
    return list({max(found, key=sum), max(found, key=lambda lengths: len(lengths) * max(lengths))}) if found else []


def baseline_bytes(device: str) -> int:
    """What this process holds before a run on a CPU, without what is free; on a GPU CUDA's context."""
    if planned_device(device) != "cpu":
        return CONTEXT
    return_freed_memory()
    return anonymous_memory()

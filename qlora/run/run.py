"""What a run owns while it goes on: its output folder, its memory meter, its log, what was asked and what was decided.

    with Run(config) as run:            the folder is locked; a full disk is one line, and what is printed cannot fail
        run.keep_memory(inputs)         settings that keep `memory` (config.memory), and the meter that watches it
        run.own(optimizer)              closed with the run
        with run.begin(...) as log      config.yaml and metrics.jsonl

Whatever it owns goes with it, in the opposite order, also when the run fails. The alternative, nested `with` blocks in
the recipe, hid the order of the run in indentation.
"""

from __future__ import annotations

import functools
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from qlora.config.commands import FinetuneConfig
from qlora.errors import guard
from qlora.models.device import resolve_device
from qlora.plan.fit import Plan, baseline_bytes
from qlora.plan.report import table, within_budget
from qlora.run.inputs import Inputs
from qlora.run.output import Claim, begin_output, claimed, shortage_as_problem, write_config
from qlora.streams import steady
from qlora.train.checkpoint import drop_checkpoint, whole_checkpoint
from qlora.train.memory import PeakMemory
from qlora.train.metrics import MetricsLog


class _Closes(Protocol):
    def close(self) -> None: ...


Closes = TypeVar("Closes", bound=_Closes)


class Run:
    """A run of `finetune`.

    Attributes:
        requested: the options as they were given; `config`: with settings that keep the memory budget.
        output: the absolute output folder, wherever it was moved to when `keep_place` looked last.
        plan: of a run with a budget; `baseline` is what the process held before (bytes).
        memory: the meter, once `keep_memory` was called.

    Raises:
        UserError: on entering, the folder cannot be had.
    """

    memory: PeakMemory

    def __init__(self, config: FinetuneConfig):
        self.requested = self.config = config
        with guard("output", config.output, "the working folder is gone", "Change to a folder that is there"):
            self.asked = Path(config.output).absolute()
        self.plan: Plan | None = None
        self.baseline = 0
        self._began = time.monotonic()
        self._owned = ExitStack()
        self._claim: Claim | None = None
        self._passing: list[Path] = []
        self.begun = False

    def __enter__(self) -> Run:
        self._owned.enter_context(steady())
        self._claim = self._owned.enter_context(claimed(self.asked))
        self._owned.enter_context(shortage_as_problem(self.asked))
        return self

    def __exit__(self, *error) -> bool | None:
        return self._owned.__exit__(*error)

    @property
    def output(self) -> Path:
        """The output folder."""
        return self.asked if self._claim is None else self._claim.path

    def keep_place(self) -> Path:
        """The output folder where it is now, moved or made anew: asked before anything is written to it."""
        assert self._claim is not None
        output = self._claim.follow()
        if self.begun and not (output / "config.yaml").exists():
            write_config(self.requested, output)
        return output

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began

    @property
    def predicted_bytes(self) -> int | None:
        """The plan's peak with the process itself; None without a budget."""
        return None if self.plan is None else self.plan.peak + self.baseline

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the run computes."""
        return resolve_device(self.requested.device)

    @functools.cached_property
    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from; None where the run begins."""
        return whole_checkpoint(self.output) if self.requested.resume else None

    def saved(self, checkpoint: Path, passing: bool) -> None:
        """Note a checkpoint that was written; of `passing` ones, saved because time had passed, two stay."""
        self._passing += [checkpoint] if passing else []
        while len(self._passing) > 2:
            with suppress(OSError):  # it is the user's folder too
                drop_checkpoint(self._passing.pop(0), checkpoint)

    def own(self, resource: Closes) -> Closes:
        """Close `resource` when the run ends."""
        return self._owned.enter_context(closing(resource))

    def keep_memory(self, inputs: Inputs) -> None:
        """Watch memory from here on and, with a budget, decide on settings that keep it.

        On CUDA no more than the budget can be taken, its context included; on a CPU freed memory goes back to the
        system.

        Raises:
            UserError: nothing keeps it; names the smallest budget that works.
        """
        budget, device = self.requested.memory, self.device
        if budget is not None and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            of_torch = max(0, budget - baseline_bytes(self.requested.device))
            torch.cuda.set_per_process_memory_fraction(min(1.0, of_torch / total), device)
        self.memory = self._owned.enter_context(PeakMemory(device, limit=budget))
        if budget is not None:
            self.config, self.plan, self.baseline = within_budget(
                self.config, inputs.source, inputs.train, inputs.held_out, budget
            )
            print(f"memory   {budget / 1e6:.0f} MB: {self.plan.settings.flags()}\n{table(self.plan)}", flush=True)

    def begin(self, first: int, steps: int) -> MetricsLog:
        """Write config.yaml, cut the metrics back to step `first`, and open their log, to be entered.

        Raises:
            UserError: the folder cannot be written.
        """
        output = self.keep_place()
        kept = begin_output(self.requested, output, first)
        self.begun = True
        path, tensorboard = output / "metrics.jsonl", self.requested.tensorboard
        return MetricsLog(path, steps=steps, first=first, tensorboard=tensorboard, kept=kept)

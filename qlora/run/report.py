"""What a run says: the summary before training, the one after it, and how to resume; and its result as an object.

The result comes from the totals of metrics.jsonl, which a resume reads, so a resumed run counts with all its parts. The
alternative, to read the file at the end, fails where it was removed meanwhile, before the adapter is saved.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qlora.config.commands import FinetuneConfig
from qlora.data.batch import Example
from qlora.data.doctor import summary
from qlora.errors import problem
from qlora.layers.attach import adapter_parameters, named_adapters
from qlora.layers.forward_mode import forward_mode
from qlora.models.info import BaseInfo, base_info
from qlora.optim.adamw import PagedAdamW
from qlora.run.inputs import Inputs
from qlora.run.untouched import untouched
from qlora.train.checkpoint import latest_checkpoint
from qlora.train.metrics import Totals, duration
from qlora.train.step import SMALLER, NotFinite


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to.

    `loss` is the last step's, None if its line was lost; evaluations are None without held-out data. `memory_bytes` is
    the measured peak of the process, `predicted_bytes` the plan's, None without a memory budget. `skipped` steps had no
    finite loss or gradient, and their update was left out.
    """

    output: Path
    adapter: Path
    steps: int
    tokens: int
    loss: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    seconds: float
    memory_bytes: int
    predicted_bytes: int | None = None
    skipped: int = 0

    def losses(self) -> dict[str, Any]:
        """What the adapter's card tells of it."""
        return {name: getattr(self, name) for name in ("tokens", "loss", "eval_loss_before", "eval_loss_after")}


def before(
    config: FinetuneConfig, inputs: Inputs, model: PreTrainedModel, optimizer: PagedAdamW, first: int, steps: int
) -> str:
    """The summary before training, which begins with step `first` of `steps`."""
    pager = optimizer.pager
    state = f"{(pager.resident + pager.spilled) / 1e6:.1f} MB"
    state += f", {pager.spilled / 1e6:.1f} MB of it spilled" if pager.spilled else ""
    parameters, adapters = adapter_parameters(model), sum(1 for _ in named_adapters(model))
    trained = sum(p.numel() for p in parameters)
    frozen = model.get_memory_footprint() - sum(p.numel() * p.element_size() for p in parameters)
    base = base_info(model)
    resumed = f", resumed at step {first}" if first else ""
    lines = [
        ("model", f"{config.model}: {_kind(base)}, {frozen / 1e6:.0f} MB, computed in {base.dtype} on {model.device}"),
        ("adapter", f"{config.method} of rank {config.rank} on {adapters} layers, {trained:,} trainable parameters"),
        ("state", f"AdamW in {config.optimizer_state}, {state}"),
        *summary(inputs.dataset, inputs.held_dataset, inputs.tokenizer, config.data, config.max_tokens),
        (
            "steps",
            f"{steps} of {config.batch_size * config.accumulate} examples, {forward_mode(model).batches}{resumed}",
        ),
    ]
    if config.learning_rate > 1:
        lines.append(("note", f"a learning rate of {config.learning_rate:g} seldom teaches anything: 1e-4 is usual"))
    lines[2:2] = [("", line) for line in untouched(model)]
    return "\n".join(f"{name:8} {text}" for name, text in lines)


def _kind(base: BaseInfo) -> str:
    fitted = " with mse scales" if base.scales == "mse" else ""
    return f"NF4 in blocks of {base.blocksize}{fitted}" if base.bits == 4 else str(base.dtype)


def after(result: FinetuneResult, peak: int, budget: int | None) -> str:
    """The summary after training; the command line adds what can be done next.

    Args:
        peak: of the process (bytes), against the plan's.
        budget: of memory (bytes).
    """
    lines = []
    if result.eval_loss_before is not None and result.eval_loss_after is not None:
        lines.append(("held out", f"loss {result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after"))
    if result.skipped:
        lines.append(("skipped", f"{result.skipped} updates, whose loss or gradient was no finite number"))
    lines.append(("time", f"{duration(result.seconds)}, peak memory {result.memory_bytes / 1e9:.2f} GB"))
    lines.append(("adapter", str(result.adapter)))
    if result.predicted_bytes is not None and budget is not None:
        predicted = f"predicted {result.predicted_bytes / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB"
        lines.append(("memory", f"{predicted}, of {budget / 1e6:.0f} MB"))
    return "\n".join(f"{name:8} {text}" for name, text in lines)


def how_to_go_on(run_output: Path, asked: str, stop: KeyboardInterrupt) -> str:
    """What to type after an interruption, on one line under what happened.

    Args:
        run_output: where the folder is.
        asked: the folder as the option names it.
    """
    moved = run_output != Path(asked).absolute()
    folder = str(run_output) if moved else asked
    command = f"qlora finetune --config {shlex.quote(os.path.join(folder, 'config.yaml'))}"
    command += f" --output {shlex.quote(folder)}" if moved else ""
    checkpoint = latest_checkpoint(run_output)
    if checkpoint is None:
        step = getattr(stop, "step", None)
        what = (
            "Stopped before the first step; nothing was lost." if step == 0 else "Stopped before the first checkpoint."
        )
        return f"{what} Start again:\n    {command}"
    saved = int(checkpoint.name.removeprefix("step-"))
    if getattr(stop, "step", None) == saved:
        return f"Stopped after step {saved}, with a checkpoint. Continue:\n    {command} --resume"
    return f"Stopped; the last checkpoint is that of step {saved}. Continue:\n    {command} --resume"


def not_finite(error: NotFinite, examples: Sequence[Example], output: Path, asked: str) -> str:
    """The line for a run that met a number that is not finite: where, at which examples, and what can be done."""
    checkpoint = latest_checkpoint(output)
    remedy = f"Its examples: {_places(examples)}. " if examples else ""
    remedy += f"The last checkpoint is {checkpoint.name}. " if checkpoint else "No checkpoint was saved before it. "
    remedy += f"{SMALLER}, or leave such examples out"
    if error.skippable:
        config = shlex.quote(os.path.join(asked, "config.yaml"))
        resume = " --resume" if checkpoint else ""
        remedy += f", or go on without such updates: qlora finetune --config {config}{resume} --on-nan skip"
    return problem(error.name, error.value, error.rule, remedy)


def _places(examples: Sequence[Example], most: int = 8) -> str:
    """Where examples stand: "train.jsonl line 3, line 17", file by file."""
    files: dict[str, list[str]] = {}
    for example in examples[:most]:
        source, place = example.place or ("data", "a record")
        files.setdefault(source, []).append(place)
    more = f" and {len(examples) - most} more" if len(examples) > most else ""
    return "; ".join(f"{source} {', '.join(places)}" for source, places in files.items()) + more


def outcome(output: Path, totals: Totals, steps: int, seconds: float, predicted: int | None) -> FinetuneResult:
    """The result, from the totals of the metrics: a resumed run counts with all its parts (but for the time).

    Args:
        predicted: the plan's peak (bytes).
    """
    return FinetuneResult(
        output=output,
        adapter=output / "adapter",
        steps=steps,
        tokens=totals.tokens,
        loss=totals.loss,
        eval_loss_before=totals.eval_loss_before,
        eval_loss_after=totals.eval_loss_after,
        seconds=seconds,
        memory_bytes=totals.memory_bytes,
        predicted_bytes=predicted,
        skipped=totals.skipped,
    )

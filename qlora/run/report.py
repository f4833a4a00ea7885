"""What a run says: the summary before training, the one after it, and how to resume; and its result as an object.

The result is read from metrics.jsonl, so a resumed run counts with all its parts. The alternative, sums that the loop
keeps, would have to be saved with every checkpoint.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qlora.config.commands import FinetuneConfig
from qlora.data.tokenize import Dataset
from qlora.layers.attach import adapter_parameters, named_adapters
from qlora.layers.forward_mode import forward_mode
from qlora.models.info import BaseInfo, base_info
from qlora.optim.adamw import PagedAdamW
from qlora.run.inputs import Inputs
from qlora.train.checkpoint import latest_checkpoint
from qlora.train.metrics import duration


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to.

    `loss` is the last step's; evaluations are None without held-out data. `memory_bytes` is the measured peak of the
    process, `predicted_bytes` the plan's, None without a memory budget.
    """

    output: Path
    adapter: Path
    steps: int
    tokens: int
    loss: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    seconds: float
    memory_bytes: int
    predicted_bytes: int | None = None

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
    held_out = f", {len(inputs.held_out)} held out" if inputs.held_out else ""
    dataset, base = inputs.dataset, base_info(model)
    resumed = f", resumed at step {first}" if first else ""
    batches = "packed without padding" if forward_mode(model).packed else "padded to one length"
    lines = [
        ("model", f"{config.model}: {_kind(base)}, {frozen / 1e6:.0f} MB, computed in {base.dtype} on {model.device}"),
        ("adapter", f"{config.method} of rank {config.rank} on {adapters} layers, {trained:,} trainable parameters"),
        ("state", f"AdamW in {config.optimizer_state}, {state}"),
        ("data", f"{config.data} ({dataset.format}): {len(inputs.train)} examples{held_out}{_losses(config, dataset)}"),
        ("", f"{dataset.tokens:,} tokens, {dataset.target_tokens:,} of them count in the loss"),
        ("steps", f"{steps} of {config.batch_size * config.accumulate} examples, {batches}{resumed}"),
    ]
    return "\n".join(f"{name:8} {text}" for name, text in lines)


def _kind(base: BaseInfo) -> str:
    fitted = " with mse scales" if base.scales == "mse" else ""
    return f"NF4 in blocks of {base.blocksize}{fitted}" if base.bits == 4 else str(base.dtype)


def _losses(config: FinetuneConfig, dataset: Dataset) -> str:
    """What of the data is not trained on."""
    parts = [
        (dataset.truncated, f"cut to {config.max_tokens} tokens"),
        (dataset.dropped, "dropped"),
        (dataset.skipped_turns, "assistant turns not trained on"),
    ]
    return "".join(f", {count} {what}" for count, what in parts if count)


def after(result: FinetuneResult, peak: int, budget: int | None) -> str:
    """The summary after training; the command line adds what can be done next.

    Args:
        peak: of the process (bytes), against the plan's.
        budget: of memory (bytes).
    """
    lines = []
    if result.eval_loss_before is not None and result.eval_loss_after is not None:
        lines.append(("held out", f"loss {result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after"))
    lines.append(("time", f"{duration(result.seconds)}, peak memory {result.memory_bytes / 1e9:.2f} GB"))
    lines.append(("adapter", str(result.adapter)))
    if result.predicted_bytes is not None and budget is not None:
        predicted = f"predicted {result.predicted_bytes / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB"
        lines.append(("memory", f"{predicted}, of {budget / 1e6:.0f} MB"))
    return "\n".join(f"{name:8} {text}" for name, text in lines)


def how_to_resume(step: int, output: str) -> str:
    """What to type after an interruption."""
    command = f"qlora finetune --config {shlex.quote(os.path.join(output, 'config.yaml'))}"
    if latest_checkpoint(output) is None:
        return f"Stopped before the first step; nothing was lost. Start again:\n    {command}"
    return f"Stopped after step {step}, with a checkpoint. Continue:\n    {command} --resume"


def summarize(output: Path, seconds: float, predicted: int | None) -> FinetuneResult:
    """The result, from metrics.jsonl: a resumed run counts with all its parts (but for the time).

    Args:
        predicted: the plan's peak (bytes).
    """
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return FinetuneResult(
        output=output,
        adapter=output / "adapter",
        steps=steps[-1]["step"],
        tokens=sum(line["tokens"] for line in steps),
        loss=steps[-1]["loss"],
        eval_loss_before=lines[0].get("eval_loss") if lines[0]["step"] == 0 else None,
        eval_loss_after=evaluations[-1] if evaluations else None,
        seconds=seconds,
        memory_bytes=max(line["memory_bytes"] for line in lines),
        predicted_bytes=predicted,
    )

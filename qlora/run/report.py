"""TODO head of run.report."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora.config.commands import FinetuneConfig
from qlora.layers.attach import adapter_parameters, named_adapters
from qlora.layers.loss import layout_of
from qlora.models.info import base_info
from qlora.optim.adamw import PagedAdamW
from qlora.run.inputs import Data
from qlora.train.checkpoint import latest_checkpoint
from qlora.train.metrics import duration


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to. `loss` is the last step's; evaluations are None without held-out data. Seconds, bytes:
    `memory_bytes` is the measured peak of the process, `predicted_bytes` the plan's, None without --memory.
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


def before(
    config: FinetuneConfig,
    data: Data,
    model: torch.nn.Module,
    optimizer: PagedAdamW,
    base_bytes: int,
    first: int,
    steps: int,
) -> str:
    """The summary before training."""
    pager = optimizer.pager
    spilled = f", {pager.spilled / 1e6:.1f} MB of it spilled" if pager.spilled else ""
    trained, adapters = sum(p.numel() for p in adapter_parameters(model)), sum(1 for _ in named_adapters(model))
    base, source = base_info(model), data.source
    fitted = " with mse scales" if base.scales == "mse" else ""
    kind = f"NF4 in blocks of {base.blocksize}{fitted}" if base.bits == 4 else f"{base.dtype}"
    held = f", {len(data.held_out)} held out" if data.held_out else ""
    lost = f", {source.truncated} cut to {config.max_tokens} tokens" if source.truncated else ""
    lost += f", {source.dropped} dropped" if source.dropped else ""
    lost += f", {source.skipped_turns} assistant turns not trained on" if source.skipped_turns else ""
    going = f", going on from step {first}" if first else ""
    laid = "end to end without padding" if layout_of(model).packed else "padded to one length"
    lines = [
        ("model", f"{config.model}: {kind}, {base_bytes / 1e6:.0f} MB, computed in {base.dtype} on {model.device}"),
        ("adapter", f"{config.method} of rank {config.rank} on {adapters} layers, {trained:,} trainable parameters"),
        ("state", f"AdamW in {config.optimizer_state}, {(pager.resident + pager.spilled) / 1e6:.1f} MB{spilled}"),
        ("data", f"{config.data} ({source.format}): {len(data.train)} examples{held}{lost}"),
        ("", f"{source.tokens:,} tokens, {source.target_tokens:,} of them count in the loss"),
        ("steps", f"{steps} of {config.batch_size * config.accumulate} examples, {laid}{going}"),
    ]
    return "\n".join(f"{name:8} {text}" for name, text in lines)


def after(result: FinetuneResult) -> str:
    """The summary after training; the command line adds what can be done next."""
    lines = []
    if result.eval_loss_before is not None and result.eval_loss_after is not None:
        lines.append(("held out", f"loss {result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after"))
    lines.append(("time", f"{duration(result.seconds)}, peak memory {result.memory_bytes / 1e9:.2f} GB"))
    lines.append(("adapter", str(result.adapter)))
    return "\n".join(f"{name:8} {text}" for name, text in lines)


def how_to_go_on(step: int, output: str) -> str:
    """What to type after an interruption."""
    command = f"qlora finetune --config {shlex.quote(os.path.join(output, 'config.yaml'))}"
    if latest_checkpoint(output) is None:
        return f"Stopped before the first step; nothing was lost. Start again:\n    {command}"
    return f"Stopped after step {step}, with a checkpoint. Go on:\n    {command} --resume"


def summarize(output: Path, seconds: float, predicted: int | None) -> FinetuneResult:
    """The result, from metrics.jsonl: a resumed run counts with all its parts (but for the time)."""
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

"""A plan in words: the table, what fits, and the line for a budget that nothing keeps.

Everything that people read about a plan is written here, and everything that programs read is `asdict(plan)`. The
alternative, text beside the arithmetic, made both hard to follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from qlora.config.commands import FinetuneConfig, PlanConfig
from qlora.data.batch import Example
from qlora.errors import UserError, problem
from qlora.models.device import lacks_bf16
from qlora.models.source import Source
from qlora.plan.fit import Plan, baseline_bytes, fit, peak_batches, predict, requested
from qlora.plan.meta import MetaRun, planned_device


def table(plan: Plan) -> str:
    """The plan in MB, a component a line."""
    lines = [_line(name, nbytes) for name, nbytes in plan.parts.items() if nbytes]
    if plan.overlap:
        lines.append(_line("less: never at once", -plan.overlap, "gradients come as activations go"))
    if plan.mapped:
        lines.append(_line("less: mapped", -plan.mapped, "stays in the checkpoint's files"))
    lines += [_line("training", plan.training), _line("loading", plan.loading)]
    if plan.calibrating:
        lines.append(_line("calibrating", plan.calibrating, "the start of the adapters, or the codes"))
    if plan.spilled:
        lines.append(_line("(optimizer, spilled)", plan.spilled))
    return "\n".join([*lines, _line("peak", plan.peak, f"in a micro-batch of {plan.tokens} tokens")])


def _line(name: str, nbytes: int, note: str = "") -> str:
    return f"  {name:<24} {nbytes / 1e6:>10.1f} MB" + (f", {note}" if note else "")


def refusal(config: FinetuneConfig, memory: int, smallest: Plan, baseline: int) -> UserError:
    """The error for a budget (bytes) that no settings keep."""
    # The process' own size differs by a little from run to run.
    least = -(-(smallest.budget + baseline) // 1_000_000) + 5
    settings = ", ".join(f"`{option}`" for option in smallest.settings.options())
    own = f"{baseline / 1e6:.0f} MB of it the process itself"
    rule = f"too little for this model and these options: the smallest that works is {least}MB ({own}, with {settings})"
    wide = config.dtype == "auto" and lacks_bf16(torch.device(planned_device(config.device)))
    narrower = ", or `dtype=bf16`, which keeps activations in half the memory here" if wide else ""
    return UserError(problem("memory", f"{memory / 1e6:.0f}MB", rule, f"Use `memory={least}MB`{narrower}"))


def within_budget(
    config: FinetuneConfig, source: Source, train: Sequence[Example], held_out: Sequence[Example], memory: int
) -> tuple[FinetuneConfig, Plan, int]:
    """(`config` with settings that keep `memory` bytes, their plan, what this process holds already, which counts).

    Raises:
        UserError: nothing keeps it; names the smallest budget that works.
    """
    baseline = baseline_bytes(config.device)
    run = MetaRun(config, source, varied_lengths=True)
    chosen, smallest = fit(run, memory - baseline, peak_batches(config, train, held_out))
    if chosen is None:
        raise refusal(config, memory, smallest, baseline)
    return dataclasses.replace(config, **dataclasses.asdict(chosen.settings)), chosen, baseline


def describe(
    config: PlanConfig, source: Source, train: Sequence[Example] | None = None, held_out: Sequence[Example] = ()
) -> dict[str, Any]:
    """What a run with these options needs, whether it fits `config.memory`, and the settings that do.

    With the examples of its data, in batches of their lengths; without, of max_tokens. `text` is for people.
    """
    baseline, batches = baseline_bytes(config.device), peak_batches(config, train, held_out)
    run = MetaRun(config, source, varied_lengths=train is not None)
    wanted = predict(run, requested(config), batches)
    total = baseline + wanted.peak
    found = {"device": run.device, "baseline": baseline, "peak": wanted.peak, "total": total, **as_json(wanted)}
    unverified = " (not verified on a card)" if run.device == "cuda" else ""
    text = [f"{config.model} on {run.device}{unverified}", table(wanted)]
    if baseline:
        text.append(f"{_line('with the process itself', total)}; without a budget up to a tenth more, freed but kept")
    if config.memory is not None:
        fitting, smallest = fit(run, config.memory - baseline, batches)
        found |= {"memory": config.memory, "fits": fitting is not None and fitting.settings == requested(config)}
        found |= {"fitting": as_json(fitting) if fitting else None, "smallest": smallest.budget + baseline}
        text += _verdict(config, config.memory, fitting, refusal(config, config.memory, smallest, baseline).problems)
    return {**found, "text": "\n".join(text)}


def _verdict(config: PlanConfig, memory: int, fitting: Plan | None, refused: list[str]) -> list[str]:
    """What is said of a budget (bytes); `refused` if nothing keeps it."""
    if fitting is None:
        return refused
    if fitting.settings == requested(config):
        return [f"It fits {memory / 1e6:.0f} MB."]
    flags = fitting.settings.flags()
    return [f"It does not fit {memory / 1e6:.0f} MB as it is. It does with: {flags}", table(fitting)]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as numbers for programs."""
    return {**dataclasses.asdict(plan), "training": plan.training, "peak": plan.peak}

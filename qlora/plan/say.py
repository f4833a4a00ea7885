"""TODO head of plan.say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qlora.config.commands import FinetuneConfig, PlanConfig
from qlora.data.batch import Example
from qlora.errors import UserError, problem
from qlora.plan.fit import Plan, asked, fit, held, largest, predict
from qlora.plan.meta import Skeleton


def table(plan: Plan) -> str:
    """The plan in MB, a component a line."""
    lines = [f"  {name:<24} {nbytes / 1e6:>10.1f} MB" for name, nbytes in plan.parts.items() if nbytes]
    lines += [
        f"  {'training':<24} {sum(plan.parts.values()) / 1e6:>10.1f} MB",
        f"  {'loading':<24} {plan.loading / 1e6:>10.1f} MB",
    ]
    if plan.spilled:
        lines.append(f"  {'(optimizer, spilled)':<24} {plan.spilled / 1e6:>10.1f} MB")
    return "\n".join([*lines, f"  {'peak':<24} {plan.peak / 1e6:>10.1f} MB, in a micro-batch of {plan.tokens} tokens"])


def refusal(memory: int, smallest: Plan, baseline: int) -> UserError:
    least = (
        -(-(smallest.budget + baseline) // 1_000_000) + 5
    )  # the process' own size differs by a little from run to run
    rule = f"the smallest that works is {least}MB ({baseline / 1e6:.0f} MB of it the process itself, then {smallest.settings.flags()})"
    return UserError(
        problem(
            "memory",
            f"{memory / 1e6:.0f}MB",
            f"too little for this model and these options: {rule}",
            f"Give --memory {least}MB",
        )
    )


def within(
    config: FinetuneConfig, train: Sequence[Example], held_out: Sequence[Example]
) -> tuple[FinetuneConfig, Plan, int]:
    """`config` with settings that keep `config.memory`, their plan, and what this process holds now (on a CPU), which
    counts.

    Raises:
        UserError: nothing keeps it; the smallest budget that works.
    """
    used = held(config)
    skeleton = Skeleton(config, real=True)
    chosen, smallest = fit(skeleton, config.memory - used, largest(config, train, held_out))
    if chosen is None:
        raise refusal(config.memory, smallest, used)
    return dataclasses.replace(config, **dataclasses.asdict(chosen.settings)), chosen, used


def plan_command(
    config: PlanConfig, train: Sequence[Example] | None = None, held_out: Sequence[Example] = ()
) -> dict[str, Any]:
    """`qlora plan`: what a run with these options needs, whether it fits `config.memory`, and the settings that do.
    With the examples of its data, in batches of their lengths; else of max_tokens.
    """
    baseline, batches = held(config), largest(config, train, held_out)
    skeleton = Skeleton(config, real=train is not None)
    wanted = predict(skeleton, asked(config), batches)
    found = {
        "device": skeleton.device,
        "baseline": baseline,
        "peak": wanted.peak,
        "total": baseline + wanted.peak,
        **_shown(wanted),
    }
    text = [
        f"{config.model} on {skeleton.device}" + (" (not verified on a card)" if skeleton.device == "cuda" else ""),
        table(wanted),
    ]
    if baseline:
        text.append(
            f"  {'with the process itself':<24} {(baseline + wanted.peak) / 1e6:>10.1f} MB; without --memory up to a fifth more, freed but kept"
        )
    if config.memory is not None:
        fitting, smallest = fit(skeleton, config.memory - baseline, batches)
        found |= {
            "memory": config.memory,
            "fits": fitting is wanted or (fitting is not None and fitting.settings == asked(config)),
        }
        found |= {"fitting": _shown(fitting) if fitting else None, "smallest": smallest.budget + baseline}
        if fitting is None:
            text.append(refusal(config.memory, smallest, baseline).problems[0])
        elif found["fits"]:
            text.append(f"It fits {config.memory / 1e6:.0f} MB.")
        else:
            text.append(
                f"It does not fit {config.memory / 1e6:.0f} MB as it is. It does with: {fitting.settings.flags()}"
            )
            text.append(table(fitting))
    return {**found, "text": "\n".join(text)}


def _shown(plan: Plan) -> dict[str, Any]:
    return {**dataclasses.asdict(plan), "peak": plan.peak}

"""TODO head of run.identity."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from array import array
from pathlib import Path
from typing import Any

from qlora.config.commands import FinetuneConfig
from qlora.config.options import changeable, defaults
from qlora.errors import UserError, problem
from qlora.models.device import resolve_device, resolve_dtype
from qlora.run.inputs import Data
from qlora.train.checkpoint import read_state


def run_identity(config: FinetuneConfig, data: Data, length: dict[str, int]) -> dict[str, Any]:
    """What decides the numbers of a run: its options, its tokens, its length.

    `model` and `data` may lie elsewhere (`resume="free"`), but must be the same: the base's fingerprint and the tokens
    are compared. `steps` and `epochs` are compared where the schedule depends on them.
    """
    options = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in changeable(FinetuneConfig)
    }
    options |= dataclasses.asdict(data.quantization)  # as it is, given or not
    options["dtype"] = resolve_dtype(config.dtype, resolve_device(config.device))  # auto depends on the machine
    digest = hashlib.sha256()
    for example in data.train:
        digest.update(struct.pack("q", len(example.ids)) + array("q", example.ids).tobytes())
        digest.update(bytes(map(bool, example.targets)))
    return {"options": options, "length": length, "data": {"examples": len(data.train), "sha256": digest.hexdigest()}}


def check_same_run(identity: dict[str, Any], checkpoint: Path) -> None:
    """Raises: UserError with every difference from the run that wrote `checkpoint`."""
    state = read_state(checkpoint)
    began, done = state["run"], state["step"]
    now = identity["options"]
    # Checkpoints from before an option do not name it: it had what is its default now.
    before = {name: value for name, value in defaults(FinetuneConfig).items() if name in now}
    was = before | {"scales": now["scales"] and "absmax"} | began["options"]
    anew = "or start anew in another folder"
    problems = [
        problem(name, now.get(name), f"the run began with {name}={was.get(name)}", f"Resume with that, {anew}")
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    if not problems and began["data"] != identity["data"]:
        first, these = began["data"]["examples"], identity["data"]["examples"]
        rule = f"the run began on {first} training examples that are not these {these}"
        problems.append(problem("data", "(changed)", rule, f"Resume with that data and the same tokenizer, {anew}"))
    if not problems and began["length"] != identity["length"]:
        problems += _length_problems(began["length"], identity["length"], done, was)
    if problems:
        raise UserError(problems)


def _length_problems(was: dict[str, int], now: dict[str, int], done: int, options: dict[str, Any]) -> list[str]:
    """Whether a run of length `was` can become one of length `now` after `done` steps and be the same run so far."""
    seen = done * options["batch_size"] * options["accumulate"]
    if options["schedule"] != "constant":
        laid_out = f"{was['steps']} steps and {was['examples']} examples"
        rule = f"the {options['schedule']} schedule was laid out for {laid_out}, not for {now['examples']}"
        remedy = "Resume with the same --steps or --epochs; only a run with --schedule constant can change its length"
    elif now["steps"] < done:
        rule = f"the run has taken {done} steps already"
        remedy = "Give at least as many, or start anew in another folder"
    elif min(seen, was["examples"]) != min(seen, now["examples"]):
        rule = "the last step of the run was a short one, as it ended with an epoch"
        remedy = "Start anew in another folder"
    else:
        return []
    return [problem("steps", now["steps"], rule, remedy)]

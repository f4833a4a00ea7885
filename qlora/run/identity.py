"""What decides the numbers of a run, and whether a checkpoint belongs to the same run.

    identity = {"options": those that change a number, "length": steps and examples, "data": a hash over all tokens}

It is written to every checkpoint (state.json, "run") and compared at a resume, all differences at once. The
alternative, to take over what the checkpoint says, would make options that do nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from array import array
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora.config.commands import FinetuneConfig
from qlora.config.options import changeable, defaults
from qlora.errors import UserError, problem
from qlora.export.peft import OWN_CONFIG
from qlora.files import read_json
from qlora.models.info import BaseInfo
from qlora.run.inputs import Inputs, begins_by_error
from qlora.specs import Quantization
from qlora.train.checkpoint import read_state


def run_identity(
    config: FinetuneConfig, inputs: Inputs, length: dict[str, int], dtype: str, checkpoint: Path | None = None
) -> dict[str, Any]:
    """What decides the numbers of a run: its options, its tokens, its length.

    Args:
        dtype: what the option means here, as "auto" depends on the machine; see `arithmetic_of`.
        checkpoint: what the run goes on from.
    """
    free = changeable(FinetuneConfig)
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    options |= dataclasses.asdict(inputs.quantization)  # as it is, given or not
    del options["cast_to"]  # see `quantization_of`
    options["dtype"] = dtype
    options["adapter_init"] = adapter_init_of(config, inputs, checkpoint)
    digest = hashlib.sha256()
    for example in [*inputs.train, *(inputs.calibration if config.calibrate else ())]:
        digest.update(struct.pack("q", len(example.input_ids)) + array("q", example.input_ids).tobytes())
        digest.update(bytes(map(bool, example.loss_mask)))
    data = {"examples": len(inputs.train), "sha256": digest.hexdigest()}
    moment = {} if inputs.moment is None else {"moment": inputs.moment.isoformat()}
    return {"options": options, "length": length, "data": data, **moment}


def quantization_of(config: FinetuneConfig, checkpoint: Path | None) -> Quantization:
    """How the base of a run is quantized; of one that goes on, from the values that it began with: runs of earlier
    versions rounded weights to what they computed in first.
    """
    made = config.quantization()
    if checkpoint is None or made.bits != 4:
        return made
    base = read_json(checkpoint / OWN_CONFIG).get("base") or {}
    return dataclasses.replace(made, cast_to=BaseInfo(**base).cast_to)


def adapter_init_of(config: FinetuneConfig, inputs: Inputs, checkpoint: Path | None) -> str:
    """How the adapters of a run begin; where `auto` goes on, as they began."""
    if config.adapter_init == "auto" and checkpoint is not None:
        return str(read_state(checkpoint)["run"]["options"].get("adapter_init", "zero"))
    return "error" if begins_by_error(config, inputs.unquantized) else "zero"


def moment_of(checkpoint: Path | None) -> datetime | None:
    """What a template that writes the date took for now in the run that wrote `checkpoint`: a resume takes the same."""
    moment = None if checkpoint is None else read_state(checkpoint)["run"].get("moment")
    return None if moment is None else datetime.fromisoformat(moment)


def check_same_run(identity: dict[str, Any], checkpoint: Path) -> None:
    """Check that a run is the one that wrote `checkpoint`.

    Raises:
        UserError: every difference.
    """
    state = read_state(checkpoint)
    began, done = state["run"], state["step"]
    now = identity["options"]
    # Checkpoints from before an option do not name it: it had what is its default now.
    before = {name: value for name, value in defaults(FinetuneConfig).items() if name in now}
    was = before | {"scales": now["scales"] and "absmax", "adapter_init": "zero"} | began["options"]
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
        planned = f"{was['steps']} steps and {was['examples']} examples"
        rule = f"the {options['schedule']} schedule was planned for {planned}, not for {now['examples']}"
        remedy = "Resume with the same `steps` or `epochs`; only a run with `schedule=constant` can change its length"
    elif now["steps"] < done:
        rule = f"the run has taken {done} steps already"
        remedy = "Give at least as many, or start anew in another folder"
    elif min(seen, was["examples"]) != min(seen, now["examples"]):
        rule = "the last step of the run was a short one, as it ended with an epoch"
        remedy = "Start anew in another folder"
    else:
        return []
    return [problem("steps", now["steps"], rule, remedy)]

"""Training checkpoints: whole or not there, exact to the bit, and without a pickle.

    checkpoints/step-000123/   the files of an adapter (export/peft.py), so that each checkpoint can be used as one
                               optimizer.safetensors   <module>.lora_A.exp_avg, ...: its state by parameter name
                               state.json              step, optimizer groups, random states, what the run is

The schedule and the position in the data are functions of the step. The alternative, torch.save of the objects' own
state, runs code when it is read and knows parameters by position, so that a changed model takes another one's moments.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora.errors import UserError, problem
from qlora.export.peft import PEFT_CONFIG, TENSORS, load_adapter, named_parameters
from qlora.export.peft_write import write_adapter
from qlora.files import read_json, whole_folder, write_json
from qlora.train.rng import random_states, set_random_states

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def save_checkpoint(
    output: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, Any],
    tokenizer=None,
    *,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write `output`/checkpoints/step-000123: everything that a resume needs; returns that folder.

    Args:
        step: how many steps have been taken.
        run: the caller's own, as JSON.
        notes: for the adapter's card.

    Raises:
        UserError: the disk is full. Earlier checkpoints are as they were.
    """
    folder = Path(output).absolute() / "checkpoints" / f"step-{step:06d}"
    with whole_folder(folder) as part:
        tensors, groups = _optimizer_state(model, optimizer)
        write_adapter(model, part, tokenizer, {**(notes or {}), "step": step})
        save_file(tensors, part / OPTIMIZER, metadata={"format": "pt"})
        kind = {"kind": type(optimizer).__name__, "groups": groups}
        state = {"format": 1, "step": step, "run": dict(run), "optimizer": kind, "random": random_states(model)}
        write_json(part / STATE, state)
    return folder


def latest_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint of the highest step in an output folder. What is not whole is not seen."""
    found = _checkpoints(output)
    return found[max(found)] if found else None


def _checkpoints(output: str | Path) -> dict[int, Path]:
    """The whole checkpoints in an output folder by step."""
    found = {}
    for path in (Path(output) / "checkpoints").glob("step-*"):
        whole = all((path / name).is_file() for name in (TENSORS, PEFT_CONFIG, OPTIMIZER, STATE))
        if whole and re.fullmatch(r"step-\d+", path.name):
            found[int(path.name.removeprefix("step-"))] = path
    return found


def drop_checkpoints(newest: Path, keep: int) -> None:
    """Remove whole checkpoints of earlier steps than `newest`, the one just saved, so that `keep` with it stay.

    One that holds anything which `newest` does not is left alone. `keep` 0 keeps all.
    """
    output, step = newest.parents[1], int(newest.name.removeprefix("step-"))
    written = {file.name for file in newest.iterdir()}
    earlier = sorted(((n, path) for n, path in _checkpoints(output).items() if n < step), reverse=True)
    for _, path in earlier[keep - 1 :] if keep else ():
        if not path.is_symlink() and {file.name for file in path.iterdir()} <= written:
            # After a kill in between, `remove_partial` removes what is left under this name.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.{os.getpid()}.old.part")))


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """state.json of a checkpoint: `step`, `run`, and what `load_checkpoint` needs.

    Raises:
        UserError: the file is damaged or of a newer version.
    """
    state = read_json(Path(checkpoint) / STATE)
    if state.get("format") != 1:
        rule = f"state.json has format {state.get('format')}, written by a newer version"
        raise UserError(problem("checkpoint", checkpoint, rule, "Update qlora"))
    return state


def load_checkpoint(checkpoint: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Bring `model` (adapters attached), `optimizer` and the random states back to a checkpoint, to the bit.

    Returns:
        Its state, see `read_state`.

    Raises:
        UserError: the files do not fit the model or the optimizer; everything that is wrong, in one list.
    """
    checkpoint = Path(checkpoint)
    state = read_state(checkpoint)
    load_adapter(model, checkpoint)
    names = _names(model, optimizer)
    _refuse_other_optimizer(optimizer, names, state["optimizer"], checkpoint)
    tensors, groups = load_file(checkpoint / OPTIMIZER), state["optimizer"]["groups"]
    optimizer.load_state_dict(_positional_state(names, tensors, groups))
    set_random_states(state["random"], model)
    return state


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the optimizer's parameters, by group."""
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(tensors by <parameter>.<key>, groups with the names of their parameters)."""
    packed, names = optimizer.state_dict(), _names(model, optimizer)
    flat = [name for group in names for name in group]
    tensors = {
        f"{flat[i]}.{key}": value.detach().contiguous()
        for i, entries in packed["state"].items()
        for key, value in entries.items()
    }
    groups = [{**group, "params": members} for group, members in zip(packed["param_groups"], names, strict=True)]
    return tensors, groups


def _refuse_other_optimizer(
    optimizer: torch.optim.Optimizer, names: list[list[str]], saved: dict[str, Any], where: Path
) -> None:
    problems = []
    if saved["kind"] != type(optimizer).__name__:
        rule = f"its optimizer is {saved['kind']}, the run's {type(optimizer).__name__}"
        problems.append(problem("checkpoint", where, rule, "Use the same optimizer"))
    if [group["params"] for group in saved["groups"]] != names:
        rule = "its optimizer holds other parameters than the run's"
        problems.append(problem("checkpoint", where, rule, "Resume with the options it began with"))
    if problems:
        raise UserError(problems)


def _positional_state(
    names: list[list[str]], tensors: dict[str, Tensor], saved: list[dict[str, Any]]
) -> dict[str, Any]:
    """torch's form of an optimizer's state, which knows parameters by their position."""
    place = {name: i for i, name in enumerate(name for group in names for name in group)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = key.rsplit(".", 1)
        state.setdefault(place[name], {})[part] = tensor
    position, groups = 0, []
    for group in saved:
        members = list(range(position, position + len(group["params"])))
        position += len(members)
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
        groups.append(options | {"params": members})
    return {"state": state, "param_groups": groups}

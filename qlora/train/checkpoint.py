"""Training checkpoints: whole or not there, exact to the bit, and without a pickle.

    checkpoints/step-000123/   the files of an adapter (export/peft.py), so that each checkpoint can be used as one
                               optimizer.safetensors   <module>.lora_A.exp_avg, ...: its state by parameter name
                               state.json              step, optimizer groups, random states, what the run is
                               manifest.json           size and SHA-256 of each of these (qlora/manifest.py)

A checkpoint is used as it was written or not at all: `whole_checkpoint` names what is damaged and goes back to the
newest that is not. The schedule and the position in the data are functions of the step. The alternative, torch.save of
the objects' own state, runs code when it is read and knows parameters by position, so that a changed model takes
another one's moments.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora.errors import UserError, guard, problem
from qlora.export.peft import PEFT_CONFIG, TENSORS, named_parameters, put_adapter, read_adapter
from qlora.export.peft_write import write_adapter
from qlora.files import read_json, whole_folder, write_json
from qlora.manifest import MANIFEST, damages, digest_of, read_manifest, versions, write_manifest
from qlora.models.quantize import is_finite
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
        UserError: the disk is full, or the adapter or the optimizer holds values that are no finite numbers. Earlier
            checkpoints are as they were.
    """
    folder = Path(output).absolute() / "checkpoints" / f"step-{step:06d}"
    with whole_folder(folder) as part:
        tensors, groups = _optimizer_state(model, optimizer)
        broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
        if broken:
            rule = f"the optimizer's state of step {step} holds values that are no finite numbers"
            raise UserError([problem(name, "(not finite)", rule, "Use a smaller `learning_rate`") for name in broken])
        write_adapter(model, part, tokenizer, {**(notes or {}), "step": step})
        save_file(tensors, part / OPTIMIZER, metadata={"format": "pt"})
        kind = {"kind": type(optimizer).__name__, "groups": groups, "state": sorted(tensors)}
        state = {"format": 1, "step": step, "run": dict(run), "optimizer": kind, "random": random_states(model)}
        write_json(part / STATE, state)
        write_manifest(part, "checkpoint", versions(_device(model)), step, digest_of(run))
        _keep_foreign(folder, {path.name for path in part.iterdir()})
    return folder


def _device(model: nn.Module) -> torch.device:
    return next(iter(named_parameters(model).values())).device


def _keep_foreign(folder: Path, ours: set[str]) -> None:
    """Set a folder aside that is about to be replaced, if it holds anything that is not ours."""
    if folder.is_dir() and not {path.name for path in folder.iterdir()} <= ours:
        number = 2
        while folder.with_name(f"{folder.name}-{number}").exists():
            number += 1
        folder.rename(folder.with_name(f"{folder.name}-{number}"))


def latest_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint of the highest step in an output folder, whole or damaged."""
    found = _checkpoints(output)
    return found[max(found)] if found else None


def whole_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint of the highest step that is as it was written; None where there is no checkpoint at all.

    Newer ones that are damaged are named on stderr, with what is wrong, and so is one that nothing can be said of.

    Raises:
        UserError: all are damaged.
    """
    bad: dict[str, str] = {}
    for _, path in sorted(_checkpoints(output).items(), reverse=True):
        wrong = checkpoint_damages(path)
        if not wrong:
            for name, what in bad.items():
                print(f"note: {name} is damaged ({what}); going on from {path.name}", file=sys.stderr, flush=True)
            if not (path / MANIFEST).exists():
                said = f"{path.name} has no {MANIFEST}, so that damage to it cannot be seen"
                print(
                    f"note: {said}: it is of an earlier version, or the file was removed", file=sys.stderr, flush=True
                )
            return path
        bad[path.name] = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    if bad:
        remedy = "Restore one of them from a copy, or start anew in another folder"
        raise UserError([problem("checkpoint", name, f"is damaged ({what})", remedy) for name, what in bad.items()])
    return None


def checkpoint_damages(folder: Path) -> list[str]:
    """What is not as it was when a checkpoint was written, a few words each."""
    needed = (TENSORS, PEFT_CONFIG, OPTIMIZER, STATE)
    wrong = damages(folder) or [f"{name} is missing" for name in needed if not (folder / name).is_file()]
    if wrong:
        return wrong
    try:
        step, manifest = read_state(folder)["step"], read_manifest(folder)
    except UserError as error:
        return error.problems
    named = re.fullmatch(r"step-(\d+)", folder.name)
    expected = {int(named[1])} if named else set()
    expected |= {manifest["step"]} if manifest else set()
    return [] if {step} >= expected else [f"{STATE} is that of step {step}"]


def _checkpoints(output: str | Path) -> dict[int, Path]:
    """The checkpoint folders in an output folder by step."""
    paths = (Path(output) / "checkpoints").glob("step-*")
    numbered = {path: re.fullmatch(r"step-(\d+)", path.name) for path in paths if path.is_dir()}
    return {int(name[1]): path for path, name in numbered.items() if name}


def drop_checkpoints(newest: Path, keep: int) -> None:
    """Remove whole checkpoints of earlier steps than `newest`, the one just saved, so that `keep` with it stay.

    One that holds anything which `newest` does not is left alone. `keep` 0 keeps all.
    """
    output, step = newest.parents[1], int(newest.name.removeprefix("step-"))
    present = {n: path for n, path in _checkpoints(output).items() if (path / STATE).is_file()}
    earlier = sorted(((n, path) for n, path in present.items() if n < step), reverse=True)
    for _, path in earlier[keep - 1 :] if keep else ():
        drop_checkpoint(path, newest)


def drop_checkpoint(checkpoint: Path, newest: Path) -> None:
    """Remove a checkpoint of ours, unless it holds anything that `newest` does not."""
    written = {file.name for file in newest.iterdir()}
    if not checkpoint.is_symlink() and {file.name for file in checkpoint.iterdir()} <= written:
        # After a kill in between, `remove_partial` removes what is left under this name.
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.dropped.part")))


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """state.json of a checkpoint: `step`, `run`, and what `load_checkpoint` needs.

    Raises:
        UserError: the file is damaged or of a newer version.
    """
    state = read_json(Path(checkpoint) / STATE)
    if state.get("format") != 1:
        rule = f"state.json has format {state.get('format')}, written by a newer version"
        raise UserError(problem("checkpoint", checkpoint, rule, "Update qlora"))
    kinds = {"step": int, "run": dict, "optimizer": dict, "random": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    if wrong:
        rule = f"state.json has no {' and no '.join(wrong)}"
        raise UserError(problem("checkpoint", checkpoint, rule, "The file is damaged: use an earlier checkpoint"))
    return state


def load_checkpoint(checkpoint: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Bring `model` (adapters attached), `optimizer` and the random states back to a checkpoint, to the bit.

    Returns:
        Its state, see `read_state`.

    Raises:
        UserError: the files do not fit the model or the optimizer; everything that is wrong, in one list.
    """
    checkpoint = Path(checkpoint)
    remedy = "Use an earlier checkpoint"
    wrong = checkpoint_damages(checkpoint)
    if wrong:
        raise UserError([problem("checkpoint", checkpoint, f"is damaged: {what}", remedy) for what in wrong])
    state = read_state(checkpoint)
    with guard("checkpoint", checkpoint, "is damaged", remedy):
        tensors, saved = load_file(checkpoint / OPTIMIZER), state["optimizer"]
        names = _names(model, optimizer)
        problems = _other_optimizer(optimizer, names, saved, checkpoint)
        if not problems:
            problems = _moment_problems(tensors, names, saved, state["step"], checkpoint)
    if problems:
        raise UserError(problems)
    put_adapter(model, read_adapter(checkpoint, checked=True))
    with guard("checkpoint", checkpoint, "is damaged", remedy):
        optimizer.load_state_dict(_positional_state(names, tensors, saved["groups"]))
        set_random_states(state["random"], model)
    _note_other_versions(checkpoint, _device(model))
    return state


def _note_other_versions(checkpoint: Path, device: torch.device) -> None:
    """One line on stderr where something else computes now than did: then bits may differ."""
    manifest = read_manifest(checkpoint)
    was, now = manifest["versions"] if manifest else {}, versions(device)
    others = [f"{name} {was[name]} (now {now[name]})" for name in now if name in was and was[name] != now[name]]
    if others:
        said = f"{checkpoint.name} was written with {', '.join(others)}"
        print(f"note: {said}: the run goes on, but its last bits may be others", file=sys.stderr, flush=True)


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


def _other_optimizer(
    optimizer: torch.optim.Optimizer, names: list[list[str]], saved: dict[str, Any], where: Path
) -> list[str]:
    """A line for all in which the saved optimizer is not this one. The learning rate is the schedule's."""
    problems = []
    if saved["kind"] != type(optimizer).__name__:
        rule = f"its optimizer is {saved['kind']}, the run's {type(optimizer).__name__}"
        problems.append(problem("checkpoint", where, rule, "Use the same optimizer"))
    remedy = "Resume with the options it began with"
    if [group["params"] for group in saved["groups"]] != names:
        rule = "its optimizer holds other parameters than the run's"
        return [*problems, problem("checkpoint", where, rule, remedy)]
    for was, now in zip(saved["groups"], optimizer.param_groups, strict=True):
        for name in sorted((was.keys() | now.keys()) - {"params", "lr", "initial_lr"}):
            one, two = _plain(was.get(name)), _plain(now.get(name))
            if one != two:
                problems.append(problem(name, two, f"the optimizer in {where.name} had {name}={one}", remedy))
    return list(dict.fromkeys(problems))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _moment_problems(
    tensors: dict[str, Tensor], names: list[list[str]], saved: dict[str, Any], step: int, where: Path
) -> list[str]:
    """A line for every tensor of the optimizer that is missing, not its own, or not finite."""
    flat = [name for group in names for name in group]
    parts = {key.rsplit(".", 1)[1] for key in tensors} or {"exp_avg", "exp_avg_sq", "step"}
    # Checkpoints from before this list had a state of every parameter.
    expected = saved.get("state") or [f"{name}.{part}" for name in flat for part in sorted(parts) if step]
    own = {f"{name}.{part}" for name in flat for part in parts}
    wrong = {key: "is missing from the optimizer's state" for key in expected if key not in tensors}
    wrong |= {key: "is no state of a parameter of the run" for key in tensors if key not in own}
    wrong |= {key: "holds values that are no finite numbers" for key in tensors if not is_finite(tensors[key])}
    remedy = "Use an earlier checkpoint"
    return [problem(key, f"(in {where.name})", rule, remedy) for key, rule in wrong.items()]


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
        options = {key: _plain(value) for key, value in group.items()}
        groups.append(options | {"params": members})
    return {"state": state, "param_groups": groups}

"""Adapter files in PEFT's layout: their names and keys, and how they are read and checked (`peft_write` writes them).

    adapter_model.safetensors   float32: base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r],
                                .lora_magnitude_vector [out] (DoRA)
    adapter_config.json         PEFT's LoraConfig
    start.safetensors           the same tensors before training, where it began by undoing the base's error
    qlora.json                  what PEFT has no key for: the base's bits and fingerprint, versions, notes
    README.md, tokenizer files

Whatever is wrong with a file is said at once, tensor by tensor. The alternative, PEFT's own save and load, would make
it a dependency at run time, and it passes over missing tensors with a warning.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora.errors import UserError, guard, problem
from qlora.files import read_json
from qlora.layers.attach import active_adapter, adapters_of, attach, forget_row_norms, named_adapters
from qlora.layers.linear import LINEAR, frozen_weight
from qlora.models.info import BaseInfo, info
from qlora.specs import AdapterSpec

TENSORS, PEFT_CONFIG, OWN_CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "qlora.json", "README.md"
START = "start.safetensors"
PREFIX = "base_model.model."
# Our parameter name: the end of its key in an adapter file.
KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
OLD_KEYS = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}  # as PEFT before 0.12 wrote it


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every adapter parameter by its name: <module>.lora_A, <module>.lora_B, <module>.magnitude."""
    return {
        f"{module}.{part}": parameter
        for module, adapter in named_adapters(model)
        for part, parameter in adapter.named_parameters(recurse=False)
    }


def file_key(name: str) -> str:
    """The key in an adapter file of a parameter named as by `named_parameters`."""
    module, part = name.rsplit(".", 1)
    return f"{PREFIX}{module}.{KEYS[part]}"


# What a PEFT configuration may say besides the values read in `_read_peft`: it says nothing about the result.
_PASSIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "use_dora",
    "use_rslora",
}
# Ways to draw A and B that leave the base as it is; pissa, olora, loftq, corda, lora_ga and others move part of it.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter_info(folder: str | Path) -> tuple[BaseInfo, AdapterSpec]:
    """How an adapter was made: its base, and the adapter itself.

    An adapter made by PEFT names only the model: all else in its BaseInfo is None.

    Raises:
        UserError: not an adapter folder; a damaged file; every feature of PEFT in it that is not done here.
    """
    folder = _adapter_folder(folder)
    config = _read_peft(folder)
    own = read_json(folder / OWN_CONFIG) if (folder / OWN_CONFIG).is_file() else {}
    if own.get("format", 1) != 1:
        rule = f"qlora.json has format {own['format']}, written by a newer version"
        raise UserError(problem("adapter", folder, rule, "Update qlora"))
    with safetensors.safe_open(folder / TENSORS, "pt") as file:
        spec = AdapterSpec.from_peft(config, _modules(file.keys()))
    if own.get("base"):
        base = BaseInfo(**own["base"])
    else:
        base = BaseInfo(config.get("base_model_name_or_path"), config.get("revision"), scales=None)
    return base, spec


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put an adapter from its files onto `model`, in place; returns the model.

    Attaches by the files if the model has no adapters yet; adapters that are there must be of the same kind and shape.
    The model is untouched if anything is wrong.

    Raises:
        UserError: every missing, unexpected, misshapen or non-finite tensor, a different kind of adapter, and a base
            other than the one it was trained on, or quantized otherwise, in one list.
    """
    folder = _adapter_folder(folder)
    base, spec = read_adapter_info(folder)
    tensors = {_current(key): value for key, value in load_file(folder / TENSORS).items()}
    start = read_start(folder)
    problems = _base_problems(model, base, folder)
    attached = active_adapter(model)
    if attached is None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR)}
        shapes = {name: frozen_weight(layers[name]).shape for name in spec.modules if name in layers}
        names = list(layers)
    else:
        shapes = {name: frozen_weight(adapter.base).shape for name, adapter in named_adapters(model)}
        names = list(shapes)
        for field in ("method", "rank", "alpha", "rslora"):
            stored, there = getattr(spec, field), getattr(attached, field)
            if stored != there:
                rule = f"is what {folder.name} holds; the model's adapter has {there}"
                problems.append(problem(field, stored, rule, "Attach the same kind"))
    problems += _tensor_problems(tensors, shapes, names, spec)
    if problems:
        raise UserError(problems)
    if attached is None:
        attach(model, dataclasses.replace(spec, targets=spec.modules))
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            parameter.copy_(tensors[file_key(name)])
    forget_row_norms(model)
    adapters = adapters_of(model)
    if adapters.active is not None:
        adapters[adapters.active].start = start and {name: start[file_key(name)] for name in named_parameters(model)}
    return model


def read_start(folder: str | Path) -> dict[str, Tensor] | None:
    """An adapter's tensors before training by their keys in its file; None for one that began as its base.

    Raises:
        UserError: the adapter had such a start, and its file is gone or is not of these tensors.
    """
    folder = Path(folder).expanduser()
    own = read_json(folder / OWN_CONFIG) if (folder / OWN_CONFIG).is_file() else {}
    if START not in own.get("files", ()):
        return None
    with guard("adapter", folder / START, "the adapter's start cannot be read", "Use another copy of the adapter"):
        start = load_file(folder / START)
        with safetensors.safe_open(folder / TENSORS, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        if {key: list(value.shape) for key, value in start.items()} != shapes:
            raise ValueError("it holds other tensors than the adapter")
    return start


def _adapter_folder(folder: str | Path) -> Path:
    """The folder as a Path.

    Raises:
        UserError: it holds no adapter, with what it holds instead.
    """
    folder = Path(folder)
    if (folder / PEFT_CONFIG).is_file() and (folder / TENSORS).is_file():
        return folder
    if not folder.exists():
        raise UserError(problem("adapter", folder, "no such folder", "Give the adapter folder that finetune wrote"))
    if (folder / "adapter" / PEFT_CONFIG).is_file():
        raise UserError(problem("adapter", folder, "holds a run, not an adapter", f"Give {folder / 'adapter'}"))
    if (folder / PEFT_CONFIG).is_file() and (folder / "adapter_model.bin").is_file():
        remedy = "Save it again with safe_serialization=True in PEFT"
        raise UserError(problem("adapter", folder, "its tensors are a pickle, which may run code", remedy))
    missing = " and ".join(name for name in (PEFT_CONFIG, TENSORS) if not (folder / name).is_file())
    raise UserError(problem("adapter", folder, f"has no {missing}", "Give the adapter folder that finetune wrote"))


def _read_peft(folder: Path) -> dict[str, Any]:
    """PEFT's configuration.

    Raises:
        UserError: every option in it that would be ignored here, by name.
    """
    config = read_json(folder / PEFT_CONFIG)
    remedy = "Merge this adapter with PEFT, or train it without"
    known: dict[str, Sequence[object]] = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None)}
    known["bias"] = ("none", None)
    known["init_lora_weights"] = _KEEPS_BASE
    problems = []
    for key, allowed in known.items():
        if config.get(key) not in allowed:
            names = ", ".join(str(value) for value in allowed if value is not None)
            problems.append(problem(key, config.get(key), f"not supported in an adapter (only {names})", remedy))
    problems += [
        problem(key, json.dumps(value)[:80], "PEFT's option is not supported", remedy)
        for key, value in config.items()
        if value and key not in known and key not in _PASSIVE
    ]
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or isinstance(config.get(key), bool):
            rule = f"must be a number in {PEFT_CONFIG}"
            problems.append(problem(key, config.get(key), rule, "The file is damaged: save the adapter again"))
    if problems:
        raise UserError(problems)
    return config


def _current(key: str) -> str:
    """A key as PEFT names it today."""
    for old, new in OLD_KEYS.items():
        if key.endswith("." + old):
            return key.removesuffix(old) + new
    return key


def _modules(keys: Iterable[str]) -> list[str]:
    """The modules that an adapter file names, in the order of its keys."""
    ends = tuple("." + end for end in (*KEYS.values(), *OLD_KEYS))
    found: dict[str, None] = {}
    for key in keys:
        end = next((end for end in ends if key.endswith(end)), None)
        if key.startswith(PREFIX) and end:
            found[key.removeprefix(PREFIX).removesuffix(end)] = None
    return list(found)


def _base_problems(model: nn.Module, trained: BaseInfo, folder: Path) -> list[str]:
    """Other weights, or the same weights quantized otherwise: an adapter corrects the error of those it learned on."""
    base = info(model).base
    if base is None or base.fingerprint is None or trained.fingerprint is None:
        return []
    if trained.fingerprint != base.fingerprint:
        where = f"was trained on {trained.model} ({_made(trained)}, fingerprint {trained.fingerprint[:12]})"
        rule = f"{where}; this model is {base.model} ({_made(base)}, fingerprint {base.fingerprint[:12]})"
        return [problem("adapter", folder, rule, "Load the base it was trained on")]
    names = ("bits", "blocksize", "double_quant", "scales") if trained.bits == base.bits == 4 else ("bits",)
    pairs = [(getattr(trained, name), getattr(base, name)) for name in names]
    # None: a checkpoint that was NF4 already does not tell.
    if all(one == two or one is None or two is None for one, two in pairs):
        return []
    rule = f"was trained on {_made(trained)}; this model has {_made(base)}"
    return [problem("adapter", folder, rule, f"Load the base with {_made(trained)}")]


def _made(base: BaseInfo) -> str:
    """The options of `load_base` that decide the weights."""
    names = ("bits", "blocksize", "double_quant", "scales") if base.bits == 4 else ("bits",)
    return ", ".join(f"{name}={getattr(base, name)}" for name in names)


def _tensor_problems(
    tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]], names: list[str], spec: AdapterSpec
) -> list[str]:
    """What is wrong with `tensors` for adapters of `spec` on layers of `shapes` ([out, in] by module)."""
    problems, expected = [], {}
    for module, (rows, columns) in shapes.items():
        wanted = {"lora_A": (spec.rank, columns), "lora_B": (rows, spec.rank), "magnitude": (rows,)}
        for part, shape in wanted.items():
            if part != "magnitude" or spec.method == "dora":
                expected[f"{PREFIX}{module}.{KEYS[part]}"] = shape
    remedy = "Use the adapter with the model it was trained on"
    for key, shape in expected.items():
        if key not in tensors:
            problems.append(problem(key, "(missing)", f"the model needs it with shape {list(shape)}", remedy))
        elif tuple(tensors[key].shape) != shape:
            problems.append(problem(key, list(tensors[key].shape), f"the model needs shape {list(shape)}", remedy))
        elif not tensors[key].is_floating_point() or not bool(tensors[key].isfinite().all()):
            rule = "holds values that are no finite numbers"
            problems.append(problem(key, tensors[key].dtype, rule, "Go back to an earlier checkpoint"))
    for key, tensor in tensors.items():
        if key not in expected:
            module = next(iter(_modules([key])), key)
            if module in shapes:
                why = f"is not part of a {spec.method} adapter"
            else:
                near = difflib.get_close_matches(module, names, n=1)
                nearest = f"; the nearest is {near[0]}" if near else ""
                why = f"the model has no adapted or linear layer {module}{nearest}"
            problems.append(problem(key, list(tensor.shape), why, remedy))
    return problems

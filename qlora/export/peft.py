"""Adapter files in PEFT's layout: their names and keys, and how they are read and checked (`peft_write` writes them).

    adapter_model.safetensors   float32: base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r],
                                .lora_magnitude_vector [out] (DoRA)
    adapter_config.json         PEFT's LoraConfig
    start.safetensors           the same tensors before training, where it began by undoing the base's error
    qlora.json                  what PEFT has no key for: the base's bits and fingerprint, versions, notes
    README.md, tokenizer files, manifest.json (see qlora/manifest.py)

`read_adapter` is the one reader: what it refuses, nobody uses (load, merge, eval, generate, resume). Whatever is wrong
with a file is said at once, tensor by tensor. The alternative, PEFT's own reader, passes over missing tensors.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlora.errors import UserError, guard, problem, shortened
from qlora.files import read_json
from qlora.layers.attach import active_adapter, adapters_of, attach, bare, forget_row_norms, named_adapters, taken
from qlora.layers.linear import frozen_weight, is_linear
from qlora.manifest import FREE, MANIFEST, damages
from qlora.models.info import BaseInfo, info
from qlora.models.quantize import is_finite, same_weights
from qlora.models.source import read_tokenizer
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


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as its folder holds it: the base of its training, its kind, its tensors by their keys of today."""

    folder: Path
    base: BaseInfo
    spec: AdapterSpec
    tensors: dict[str, Tensor]
    targets: tuple[str, ...]  # endings of layers that all have an adapter
    start: dict[str, Tensor] | None = None  # the tensors before training, where they undid an error of the base

    def misfits(self, model: nn.Module) -> list[str]:
        """A line for every tensor that is missing, unexpected, misshapen or not finite for `model`, which may be empty
        (meta), and may have adapters.
        """
        if active_adapter(model) is None:
            layers = {name: module for name, module in model.named_modules() if is_linear(module)}
            ends = tuple(f".{target}" for target in self.targets)
            meant = [name for name in layers if name in self.spec.modules or f".{name}".endswith(ends)]
            shapes = {name: frozen_weight(layers[name]).shape for name in meant}
            return _tensor_problems(self.tensors, shapes, list(layers), self.spec)
        shapes = {name: frozen_weight(adapter.base).shape for name, adapter in named_adapters(model)}
        return _tensor_problems(self.tensors, shapes, list(shapes), self.spec)


def read_adapter(folder: str | Path, *, checked: bool = False) -> AdapterFiles:
    """An adapter's files, with all that can be known of them without a model. Says on stderr what cannot be checked.

    An adapter made by PEFT names only the model: all else in its BaseInfo is None.

    Args:
        folder: that of the adapter, or a checkpoint.
        checked: whether its manifest was looked at already.

    Raises:
        UserError: not an adapter folder; a damaged or missing file; every feature of PEFT in it that is not done here;
            no tensors, or keys that are not PEFT's.
    """
    folder = _adapter_folder(folder)
    if not checked:
        _check_manifest(folder)
    config = _read_peft(folder)
    own, remedy = _read_own(folder), "Use another copy of the adapter"
    with guard("adapter", folder / TENSORS, "cannot be read", remedy):
        tensors = {_current(key): value for key, value in load_file(folder / TENSORS).items()}
    problems = _key_problems(tensors, folder)
    with guard("adapter", folder / PEFT_CONFIG, "is damaged", remedy):
        spec = AdapterSpec.from_peft(config, _modules(tensors))
        problems += spec.problems()
        targets, excluded = config.get("target_modules"), config.get("exclude_modules")
        targets = tuple(targets) if isinstance(targets, list) and not excluded else ()
    with guard("adapter", folder / OWN_CONFIG, "is damaged", remedy):
        problems += _contradictions(own, spec, folder)
        if own.get("base"):
            base = BaseInfo(**own["base"])
        else:
            base = BaseInfo(config.get("base_model_name_or_path"), config.get("revision"), scales=None)
    if problems:
        raise UserError(problems)
    return AdapterFiles(folder, base, spec, tensors, targets, _read_start(folder, own, tensors))


def _read_own(folder: Path) -> dict[str, Any]:
    """qlora.json of an adapter; {} where there is none, as in one of PEFT's.

    Raises:
        UserError: it is of a newer version, or its parts are not what we write there.
    """
    own = read_json(folder / OWN_CONFIG) if (folder / OWN_CONFIG).is_file() else {}
    if own.get("format", 1) != 1:
        rule = f"qlora.json has format {shortened(repr(own['format']), 40)}, written by a newer version"
        raise UserError(problem("adapter", folder, rule, "Update qlora"))
    kinds = {"files": list, "base": dict, "adapter": dict}
    names = [name for name, kind in kinds.items() if not isinstance(own.get(name) or kind(), kind)]
    names = names or ["files"] * (not all(isinstance(name, str) for name in own.get("files") or ()))
    if names:
        raise UserError(problem("adapter", folder / OWN_CONFIG, f"is damaged ({', '.join(names)})", "Use another copy"))
    return own


def _read_start(folder: Path, own: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """An adapter's tensors before training by their keys in its file; None for one that began as its base.

    Raises:
        UserError: the adapter had such a start, and its file is gone or is not of these tensors.
    """
    if START not in (own.get("files") or ()):
        return None
    with guard("adapter", folder / START, "the adapter's start cannot be read", "Use another copy of the adapter"):
        start = load_file(folder / START)
        if {key: value.shape for key, value in start.items()} != {key: value.shape for key, value in tensors.items()}:
            raise ValueError("it holds other tensors than the adapter")
    return start


def read_adapter_info(folder: str | Path) -> tuple[BaseInfo, AdapterSpec]:
    """How an adapter was made: its base, and the adapter itself.

    Raises:
        UserError: see `read_adapter`.
    """
    files = read_adapter(folder)
    return files.base, files.spec


def load_adapter(model: nn.Module, folder: str | Path, name: str | None = None) -> nn.Module:
    """Put an adapter from its files onto `model`, in place; returns the model, with that adapter active.

    With a `name` it is one more adapter on the base; the others are set aside (`qlora.activate`). Without one, it is
    attached as "default" if no adapter is active; one that is active takes over what the files hold, and must be of the
    same kind and shape. The model is untouched if anything is wrong.

    Raises:
        UserError: see `read_adapter` and `put_adapter`.
    """
    return put_adapter(model, read_adapter(folder), name)


def put_adapter(model: nn.Module, files: AdapterFiles, name: str | None = None) -> nn.Module:
    """`load_adapter` of files that are read already.

    Raises:
        UserError: every missing, unexpected, misshapen or non-finite tensor, a different kind of adapter, an adapter of
            this name, and a base other than the one it was trained on, or quantized otherwise, in one list.
    """
    spec, attached = files.spec, active_adapter(model) if name is None else None
    problems = base_problems(info(model).base, files.base, files.folder)
    if attached is not None:
        for field in ("method", "rank", "alpha", "rslora"):
            stored, there = getattr(spec, field), getattr(attached, field)
            if stored != there:
                rule = f"is what {files.folder.name} holds; the model's adapter has {there}"
                problems.append(problem(field, stored, rule, "Attach the same kind"))
        problems += files.misfits(model)
    else:
        name = "default" if name is None else name
        problems += taken(model, name)
        with bare(model):
            problems += files.misfits(model)
    if problems:
        raise UserError(problems)
    if attached is None:
        attach(model, dataclasses.replace(spec, targets=spec.modules), name or "default")
    with torch.no_grad():
        for parameter_name, parameter in named_parameters(model).items():
            parameter.copy_(files.tensors[file_key(parameter_name)])
    forget_row_norms(model)
    adapters = adapters_of(model)
    if adapters.active is not None:
        start = files.start
        adapters[adapters.active].start = start and {key: start[file_key(key)] for key in named_parameters(model)}
    return model


def adapter_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with an adapter; None where there is none.

    Raises:
        UserError: its files are damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return read_tokenizer(folder, folder, of="adapter", trust_remote_code=trust_remote_code)


def _check_manifest(folder: Path) -> None:
    """Refuse files of an adapter that are not what was written, and say where that cannot be known.

    Raises:
        UserError: a line for each.
    """
    training_only = ("optimizer.safetensors", "state.json")  # of a checkpoint
    remedy = f"Use another copy of the adapter, or, if you changed it on purpose, remove {MANIFEST}"
    problems = [problem("adapter", folder, what, remedy) for what in damages(folder, training_only)]
    if not problems and (folder / OWN_CONFIG).is_file() and not (folder / MANIFEST).exists():
        names = _read_own(folder).get("files") or []
        missing = [name for name in names if name not in (MANIFEST, *FREE) and not os.path.exists(folder / name)]
        problems = [
            problem("adapter", folder, f"{shortened(name, 99)} is missing", "Use another copy") for name in missing
        ]
        if read_json(folder / OWN_CONFIG).get("manifest") is not False:  # `save_pretrained` writes none
            said = f"{folder.name} has no {MANIFEST}, so that damage to it cannot be seen"
            print(f"note: {said}: it is of an earlier version, or the file was removed", file=sys.stderr, flush=True)
    if problems:
        raise UserError(problems)


def _key_problems(tensors: dict[str, Tensor], folder: Path) -> list[str]:
    """A line for a file whose keys are none of PEFT's, as a whole."""
    named = [re.search(r"\.lora_(?:A|B|magnitude_vector)\.(?!weight$)([^.]+)(?:\.weight)?$", key) for key in tensors]
    names = sorted({found[1] for found in named if found})
    name, remedy = folder / TENSORS, "Save it with save_pretrained of PEFT"
    ends = tuple("." + end for end in KEYS.values())
    if names:
        return [problem("adapter", name, f"its keys carry an adapter name ({', '.join(names[:3])})", remedy)]
    if not any(key.endswith(ends) for key in tensors):
        return [problem("adapter", name, "holds no tensors of an adapter", "Use another copy of the adapter")]
    bare = [key for key in tensors if key.endswith(ends) and not key.startswith(PREFIX)]
    if bare:
        rule = f"its keys do not begin with {PREFIX}, as in {shortened(bare[0], 100)}"
        return [problem("adapter", name, rule, remedy)]
    return []


def _contradictions(own: dict[str, Any], spec: AdapterSpec, folder: Path) -> list[str]:
    """A line for each value that adapter_config.json says, and qlora.json says otherwise."""
    stated = own.get("adapter") or {}
    found = []
    for name in ("method", "rank", "alpha", "rslora"):
        one, two = stated.get(name), getattr(spec, name)
        if name in stated and one != two:
            rule = f"is what {PEFT_CONFIG} says; {OWN_CONFIG} says {shortened(one, 100)}"
            remedy = "Use another copy of the adapter"
            found.append(problem(name, shortened(two, 100), f"{rule} (in {folder.name})", remedy))
    return found


def _adapter_folder(folder: str | Path) -> Path:
    """The folder as a Path.

    Raises:
        UserError: it holds no adapter, with what it holds instead.
    """
    remedy = "Give the adapter folder that finetune wrote"
    with guard("adapter", repr(str(folder)), "cannot be read", remedy):
        folder = Path(folder).expanduser()
        held = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    if held >= {PEFT_CONFIG, TENSORS}:
        return folder
    if not folder.exists():
        raise UserError(problem("adapter", folder, "no such folder", remedy))
    if (folder / "adapter" / PEFT_CONFIG).is_file():
        raise UserError(problem("adapter", folder, "holds a run, not an adapter", f"Give {folder / 'adapter'}"))
    if held >= {PEFT_CONFIG, "adapter_model.bin"}:
        again = "Save it again with safe_serialization=True in PEFT"
        raise UserError(problem("adapter", folder, "its tensors are a pickle, which may run code", again))
    missing = " and ".join(name for name in (PEFT_CONFIG, TENSORS) if name not in held)
    raise UserError(problem("adapter", folder, f"has no {missing}", remedy))


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
    old, new = next(((old, new) for old, new in OLD_KEYS.items() if key.endswith("." + old)), ("", ""))
    return key.removesuffix(old) + new


def _modules(keys: Iterable[str]) -> list[str]:
    """The modules that an adapter file names, in the order of its keys."""
    ends = tuple("." + end for end in (*KEYS.values(), *OLD_KEYS))
    found: dict[str, None] = {}
    for key in keys:
        end = next((end for end in ends if key.endswith(end)), None)
        if key.startswith(PREFIX) and end:
            found[key.removeprefix(PREFIX).removesuffix(end)] = None
    return list(found)


def base_problems(base: BaseInfo | None, trained: BaseInfo, folder: Path) -> list[str]:
    """Other weights, or the same weights quantized otherwise: an adapter corrects the error of those it learned on."""
    if base is None or base.fingerprint is None or trained.fingerprint is None:
        return []
    if not same_weights(trained, base):
        where = f"was trained on {trained.model} ({_made(trained)}, fingerprint {trained.fingerprint[:12]})"
        rule = f"{where}; this model is {base.model} ({_made(base)}, fingerprint {base.fingerprint[:12]})"
        return [problem("adapter", folder, rule, "Load the base it was trained on")]
    if trained.bits == base.bits == 4 and not _same_values(trained, base):
        rule = f"was trained on weights that were rounded to {trained.dtype} before they were quantized"
        remedy = f"Load the base with `cast_to={trained.dtype!r}`, as `generate`, `eval` and `resume` do by themselves"
        return [problem("adapter", folder, rule, remedy)]
    names = ("bits", "blocksize", "double_quant", "scales") if trained.bits == base.bits == 4 else ("bits",)
    pairs = [(getattr(trained, name), getattr(base, name)) for name in names]
    # None: a checkpoint that was NF4 already does not tell.
    if all(one == two or one is None or two is None for one, two in pairs):
        return []
    rule = f"was trained on {_made(trained)}; this model has {_made(base)}"
    return [problem("adapter", folder, rule, f"Load the base with {_made(trained)}")]


def _same_values(trained: BaseInfo, base: BaseInfo) -> bool:
    """Whether the same values were quantized, as far as both tell: rounding to what they are stored in changes none."""
    stored = trained.stored or base.stored
    pair = {info.cast_to for info in (trained, base)}
    return stored is None or len(pair) == 1 or pair <= {None, "fp32", stored}


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
        elif not tensors[key].is_floating_point():
            rule = "must hold floating-point numbers"
            problems.append(problem(key, tensors[key].dtype, rule, "Use another copy of the adapter"))
        elif not is_finite(tensors[key]):
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

"""Adapter files in PEFT's layout: written, described, read and checked.

    adapter_model.safetensors   float32: base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r],
                                .lora_magnitude_vector [out] (DoRA)
    adapter_config.json         PEFT's LoraConfig
    qlora.json                  what PEFT has no key for: the base's bits and fingerprint, versions, notes
    README.md, tokenizer files

Whatever is wrong with a file is said at once, tensor by tensor. The alternative, PEFT's own save and load, would make
it a dependency at run time, and it passes over missing tensors with a warning.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora import __version__
from qlora.errors import UserError, problem
from qlora.export.card import model_card
from qlora.files import read_json, whole_folder, write_json
from qlora.layers.attach import active_adapter, attach_adapters, forget_row_norms, named_adapters
from qlora.layers.linear import LINEAR, frozen_weight
from qlora.models.quantize import BaseRecipe
from qlora.specs import AdapterSpec

TENSORS, PEFT_CONFIG, OWN_CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "qlora.json", "README.md"
PREFIX = "base_model.model."
# Our parameter name: the end of its key in an adapter file.
KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
OLD_KEYS = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}  # as PEFT before 0.12 wrote it


def save_adapter(
    model: nn.Module, folder: str | Path, tokenizer=None, *, notes: Mapping[str, Any] | None = None
) -> Path:
    """Write the adapter of `model` as a folder that PEFT loads too; returns it. `notes` go to qlora.json and the card.

    The folder appears whole, and replaces an adapter that was there.

    Raises:
        UserError: no adapters are attached; the folder holds files that no adapter writes; the disk is full.
    """
    folder = Path(folder).absolute()
    with whole_folder(folder) as part:
        write_adapter(model, part, tokenizer, notes)
        _refuse_foreign(folder, part)
    return folder


def _refuse_foreign(folder: Path, part: Path) -> None:
    """Replacing a folder removes it, so it may only hold what an adapter folder holds."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(problem("output", folder, "is a file", "Give a folder"))
    known = {path.name for path in part.iterdir()}
    if (folder / OWN_CONFIG).is_file():
        known |= set(read_json(folder / OWN_CONFIG).get("files", ()))
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if foreign:
        shown = ", ".join(foreign[:5])
        rule = f"holds files of another kind ({shown})"
        raise UserError(problem("output", folder, rule, "Choose another folder, or move them"))


def write_adapter(model: nn.Module, folder: Path, tokenizer, notes: Mapping[str, Any] | None) -> None:
    """Write the files of an adapter into a folder that the caller makes whole."""
    spec, base = _spec(model), getattr(model, "qlora_base", None)
    save_file(_adapter_tensors(model), folder / TENSORS, metadata={"format": "pt"})
    write_json(folder / PEFT_CONFIG, _peft_config(model, spec, base))
    (folder / CARD).write_text(model_card(_model_name(model, base), spec, base, notes or {}), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    own = {
        "format": 1,
        "base": None if base is None else dataclasses.asdict(base),
        "adapter": dataclasses.asdict(spec),
        "versions": {"qlora": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "notes": dict(notes or {}),
        "files": sorted(path.name for path in folder.iterdir()) + [OWN_CONFIG],
    }
    write_json(folder / OWN_CONFIG, own)


def _spec(model: nn.Module) -> AdapterSpec:
    spec = active_adapter(model)
    if spec is None:
        raise UserError(problem("model", type(model).__name__, "has no adapters", "Call attach_adapters first"))
    return spec


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every adapter parameter by its name: <module>.lora_A, <module>.lora_B, <module>.magnitude."""
    return {
        f"{module}.{part}": parameter
        for module, adapter in named_adapters(model)
        for part, parameter in adapter.named_parameters(recurse=False)
    }


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in named_parameters(model).items():
        module, part = name.rsplit(".", 1)
        tensors[f"{PREFIX}{module}.{KEYS[part]}"] = parameter.detach().float().contiguous()
    return tensors


def _peft_config(model: nn.Module, spec: AdapterSpec, base: BaseRecipe | None) -> dict[str, Any]:
    # PEFT adapts every module whose name is a target or ends in "." + target. The short endings are what people and
    # servers expect; they are used only if they reach the same modules.
    endings = {name.rsplit(".", 1)[-1] for name in spec.modules}
    reached = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings}
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": _model_name(model, base),
        "bias": "none",
        "fan_in_fan_out": any(isinstance(adapter.base, Conv1D) for _, adapter in named_adapters(model)),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_bias": False,
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "revision": None if base is None else base.revision,
        "target_modules": sorted(endings) if reached == set(spec.modules) else list(spec.modules),
        "task_type": "CAUSAL_LM",
        "use_dora": spec.method == "dora",
        "use_rslora": spec.rslora,
    }


def _model_name(model: nn.Module, base: BaseRecipe | None) -> str | None:
    return base.model if base is not None else getattr(getattr(model, "config", None), "_name_or_path", None) or None


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


def read_adapter_recipe(folder: str | Path) -> tuple[BaseRecipe, AdapterSpec]:
    """How an adapter was made: its base, and the adapter itself.

    An adapter made by PEFT names only the model: all else in its BaseRecipe is None.

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
        modules = _modules(file.keys())
    spec = AdapterSpec(
        method="dora" if config.get("use_dora") else "lora",
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")),
        modules=tuple(modules),
    )
    if own.get("base"):
        base = BaseRecipe(**own["base"])
    else:
        known = {"model": config.get("base_model_name_or_path"), "revision": config.get("revision")}
        base = BaseRecipe(**dict.fromkeys(field.name for field in dataclasses.fields(BaseRecipe)) | known)
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
    base, spec = read_adapter_recipe(folder)
    tensors = {_current(key): value for key, value in load_file(folder / TENSORS).items()}
    problems = _base_problems(model, base, folder)
    attached = active_adapter(model) if any(True for _ in named_adapters(model)) else None
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
        attach_adapters(
            model,
            method=spec.method,
            rank=spec.rank,
            alpha=spec.alpha,
            dropout=spec.dropout,
            rslora=spec.rslora,
            targets=list(spec.modules),
        )
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            module, part = name.rsplit(".", 1)
            parameter.copy_(tensors[f"{PREFIX}{module}.{KEYS[part]}"])
    forget_row_norms(model)
    return model


def _adapter_folder(folder: str | Path) -> Path:
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
    """PEFT's configuration, with everything that we would not honour refused by name."""
    config = read_json(folder / PEFT_CONFIG)
    remedy = "Merge this adapter with PEFT, or train it without"
    known = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none", None)}
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
    for old, new in OLD_KEYS.items():
        if key.endswith("." + old):
            return key.removesuffix(old) + new
    return key


def _modules(keys) -> list[str]:
    """The modules that an adapter file names, in the order of its keys."""
    ends = tuple("." + end for end in (*KEYS.values(), *OLD_KEYS))
    found = {}
    for key in keys:
        end = next((end for end in ends if key.endswith(end)), None)
        if key.startswith(PREFIX) and end:
            found[key.removeprefix(PREFIX).removesuffix(end)] = None
    return list(found)


def _base_problems(model: nn.Module, trained: BaseRecipe, folder: Path) -> list[str]:
    """Other weights, or the same weights quantized otherwise: an adapter corrects the error of the weights that it was
    trained on.
    """
    base = getattr(model, "qlora_base", None)
    if base is None or trained.fingerprint is None:
        return []
    if trained.fingerprint != base.fingerprint:
        where = f"was trained on {trained.model} ({_made(trained)}, fingerprint {trained.fingerprint[:12]})"
        rule = f"{where}; this model is {base.model} ({_made(base)}, fingerprint {base.fingerprint[:12]})"
        return [problem("adapter", folder, rule, "Load the base it was trained on")]
    names = ("bits", "blocksize", "double_quant", "scales") if trained.bits == base.bits == 4 else ("bits",)
    pairs = [(getattr(trained, name), getattr(base, name)) for name in names]
    if all(
        one == two or one is None or two is None for one, two in pairs
    ):  # None: a checkpoint that was NF4 already does not tell
        return []
    rule = f"was trained on {_made(trained)}; this model has {_made(base)}"
    return [problem("adapter", folder, rule, f"Load the base with {_made(trained)}")]


def _made(base: BaseRecipe) -> str:
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

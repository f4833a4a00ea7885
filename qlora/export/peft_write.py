"""Writing an adapter folder in PEFT's layout (see `export.peft`, which reads it).

The folder appears whole or not at all, and replaces an adapter that was there, but no other files. The alternative,
PEFT's own save, would make it a dependency at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qlora import __version__
from qlora.errors import UserError, problem
from qlora.export.card import model_card
from qlora.export.peft import CARD, OWN_CONFIG, PEFT_CONFIG, START, TENSORS, file_key, named_parameters
from qlora.files import read_json, whole_folder, write_json
from qlora.layers.attach import active_adapter, adapter_start, named_adapters
from qlora.manifest import MANIFEST, digest_of, versions, write_manifest
from qlora.models.info import BaseInfo, info
from qlora.models.load import embedding_rows
from qlora.models.quantize import is_finite
from qlora.models.transformers_seam import loaded_from
from qlora.specs import AdapterSpec


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    notes: Mapping[str, Any] | None = None,
    step: int | None = None,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapter of `model` as a folder that PEFT loads too; returns it. The folder appears whole, and replaces
    an adapter that was there.

    Args:
        model: with adapters.
        folder: new, or that of an adapter.
        tokenizer: to be saved with it.
        notes: for qlora.json and the card.
        step: how many steps were taken, for the manifest.
        run: what the run was, for the manifest.

    Raises:
        UserError: no adapters are attached; a value in them is not finite; something else was trained, which an adapter
            does not hold; the folder holds files that no adapter writes; the disk is full.
    """
    folder = Path(folder).expanduser().absolute()
    with whole_folder(folder) as part:
        write_adapter(model, part, tokenizer, notes)
        device = next(iter(named_parameters(model).values())).device
        write_manifest(part, "adapter", versions(device), step, None if run is None else digest_of(run))
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


def write_adapter(
    model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase | None, notes: Mapping[str, Any] | None
) -> None:
    """Write the files of an adapter into a folder that the caller makes whole.

    Raises:
        UserError: no adapters are attached; a value in them is not finite; something else was trained.
    """
    spec, base = _spec(model), info(model).base
    tensors, start = _file_tensors(named_parameters(model)), adapter_start(model)
    _refuse_what_is_lost(model, tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    if start is not None:
        save_file(_file_tensors(start), folder / START, metadata={"format": "pt"})
    write_json(folder / PEFT_CONFIG, _peft_config(model, spec, base))
    (folder / CARD).write_text(model_card(_model_name(model, base), spec, base, notes or {}), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    own = {
        "format": 1,
        "base": None if base is None else dataclasses.asdict(base),
        "adapter": dataclasses.asdict(spec),
        "versions": {"qlora": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "start": "zero" if start is None else "error",
        "notes": dict(notes or {}),
        "files": [*sorted(path.name for path in folder.iterdir()), OWN_CONFIG, MANIFEST],
    }
    write_json(folder / OWN_CONFIG, own)


def _spec(model: nn.Module) -> AdapterSpec:
    """The adapters on `model`.

    Raises:
        UserError: there are none.
    """
    spec = active_adapter(model)
    if spec is None:
        raise UserError(problem("model", type(model).__name__, "has no adapters", "Call attach_adapters first"))
    return spec


def _file_tensors(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapter parameters by name in float32 under the names that PEFT gives them."""
    return {file_key(name): parameter.detach().float().contiguous() for name, parameter in parameters.items()}


def _refuse_what_is_lost(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """An adapter must hold what was learned, and nothing that nobody could use.

    Raises:
        UserError: a line for each value that is not finite, each trainable parameter that is no adapter's, and a
            vocabulary that is not the base's.
    """
    remedy = "Train again with a smaller `learning_rate`; an earlier checkpoint, if there is one, is whole"
    problems = [
        problem(key, "(not finite)", "holds values that are no finite numbers", remedy)
        for key, tensor in tensors.items()
        if not is_finite(tensor)
    ]
    ours = {id(parameter) for parameter in named_parameters(model).values()}
    problems += [
        problem(name, list(parameter.shape), "is trained too, and an adapter does not hold it", _FREEZE)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in ours
    ]
    base = info(model).base
    was, rows = (base.vocabulary if base else None), embedding_rows(model)
    if was is not None and rows != was:
        rule = f"the embedding had {was} rows when the base was loaded, and an adapter does not hold the others"
        remedy = "Resize the embedding in a copy of the base, and train on that"
        problems.append(problem("vocabulary", rows, rule, remedy))
    if problems:
        raise UserError(problems)


_FREEZE = "Freeze it (requires_grad_(False)), or save the whole model yourself"


def _peft_config(model: nn.Module, spec: AdapterSpec, base: BaseInfo | None) -> dict[str, Any]:
    """PEFT's LoraConfig of the adapter on `model`, as JSON."""
    transposed = any(isinstance(adapter.base, Conv1D) for _, adapter in named_adapters(model))
    config = peft_config(spec, [name for name, _ in model.named_modules()], transposed=transposed)
    return config | {
        "base_model_name_or_path": _model_name(model, base),
        "revision": None if base is None else base.revision,
    }


def peft_config(spec: AdapterSpec, names: Sequence[str], *, transposed: bool = False) -> dict[str, Any]:
    """PEFT's LoraConfig of `spec` as JSON, without the name of a base.

    Args:
        spec: with its modules.
        names: of all modules of the model.
        transposed: whether adapted layers store [in, out].
    """
    # PEFT adapts every module whose name is a target or ends in "." + target. The short endings are what people and
    # servers expect; they are used only if they reach the same modules.
    endings = {name.rsplit(".", 1)[-1] for name in spec.modules}
    reached = {name for name in names if name.rsplit(".", 1)[-1] in endings}
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "lora_bias": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(endings) if reached == set(spec.modules) else list(spec.modules),
        "task_type": "CAUSAL_LM",
        **spec.to_peft(),
    }
    return dict(sorted(config.items()))


def _model_name(model: nn.Module, base: BaseInfo | None) -> str | None:
    """What the base is called: as it was loaded here, or as transformers loaded it."""
    return base.model if base is not None else loaded_from(model)

"""What `save_pretrained` of a model of ours writes, by what the model is.

    with adapters     adapter_config.json, adapter_model.safetensors, qlora.json, README.md    the active adapter
                      model.safetensors: its parameters by their names in the model            for Trainer's resume
    bare, NF4         config.json, model.safetensors, ...: bitsandbytes' 4-bit layout, as `qlora quantize` writes it
    bare, 16 bits     what transformers writes

transformers.Trainer saves its checkpoints this way and, on a resume or for the best model, puts model.safetensors back
into the model that it has; the base is frozen, so its own parameters are all. There is no manifest, since Trainer adds
a tokenizer and files of its own. The alternative, the whole state in each checkpoint, writes gigabytes that never
change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from qlora.errors import UserError, problem
from qlora.export.peft import CARD, OWN_CONFIG
from qlora.export.peft_write import write_adapter
from qlora.files import disk_problem, read_json, whole_folder, write_json
from qlora.layers import nf4
from qlora.layers.attach import active_adapter
from qlora.layers.linear import NF4Linear, is_linear
from qlora.layers.mixed import MixedLinear
from qlora.manifest import MANIFEST

TRAINED = "model.safetensors"  # the name that Trainer looks for


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write `model` as a folder that loads: its active adapter, or, where none is active, the model itself.

    The arguments are those of transformers. Of an adapter, `options` (shards, variants) mean nothing.

    Raises:
        UserError: something an adapter folder cannot hold (see `peft_write.write_adapter`), other values in
            `state_dict` than in the model, an upload, a model in the middle of a mixed batch, or a full disk.
    """
    if any(isinstance(module, MixedLinear) for module in model.modules()):
        rule = "is in the middle of a mixed batch"
        raise UserError(problem("model", type(model).__name__, rule, "Save it after that"))
    if active_adapter(model) is not None:
        if push_to_hub:
            raise UserError(problem("push_to_hub", True, "an adapter is only written here", "Use model.push_to_hub"))
        if is_main_process:
            _save_adapter(model, Path(save_directory), state_dict)
        return
    transformers_own: Any = type(model)
    options |= {"is_main_process": is_main_process, "push_to_hub": push_to_hub}
    if not any(isinstance(module, NF4Linear) for module in model.modules()):
        transformers_own.save_pretrained(model, save_directory, state_dict=state_dict, **options)
        return
    _refuse_others(model, state_dict)
    config: Any = model.config
    config.quantization_config = _bitsandbytes_config(model)
    try:
        transformers_own.save_pretrained(model, save_directory, state_dict=_packed(model), **options)
    finally:
        del config.quantization_config


def _save_adapter(model: nn.Module, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write the adapter's files into a folder that may hold others, each of them whole."""
    _refuse_others(model, state_dict)
    folder = folder.expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(problem("save_directory", folder, "is a file", "Give a folder"))
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder / ".adapter") as part:
            write_adapter(model, part, None, None)
            own = read_json(part / OWN_CONFIG)
            own["files"] = [name for name in own["files"] if name != MANIFEST]
            write_json(part / OWN_CONFIG, own | {"manifest": False})
            trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            save_file(trained, part / TRAINED, metadata={"format": "pt"})
        for path in (folder / ".adapter").iterdir():
            if path.name != CARD or not (folder / CARD).exists():  # a card may be somebody's own
                os.replace(path, folder / path.name)
            else:
                path.unlink()
        (folder / ".adapter").rmdir()
        (folder / MANIFEST).unlink(missing_ok=True)  # of an adapter that was here
    except OSError as error:
        raise UserError(disk_problem(folder, error)) from error
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):  # nothing was written
            folder.rmdir()


def _refuse_others(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> None:
    """Raises:
    UserError: `state_dict` holds other values than the model, whose own are written.
    """
    here = model.state_dict()
    others = [
        name
        for name, value in (state_dict or {}).items()
        if name not in here or value.shape != here[name].shape or not torch.equal(value, here[name].to(value.device))
    ]
    if others:
        rule = f"holds {others[0]} otherwise than the model, whose own values are written"
        raise UserError(problem("state_dict", f"{len(others)} tensors", rule, "Load them into the model first"))


def _packed(model: nn.Module) -> dict[str, Tensor]:
    """The state of a bare NF4 model with each quantized weight in bitsandbytes' parts; the memory is the model's."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    ours = {f"{name}.{part}" for name, layer in layers.items() for part in layer._buffers}
    state = {name: value for name, value in model.state_dict().items() if name not in ours}
    for name, layer in layers.items():
        parts = nf4.to_bitsandbytes(layer.quantized, _dtype(model))
        state |= {f"{name}.weight{end}": tensor for end, tensor in parts.items()}
    return state


def _bitsandbytes_config(model: nn.Module) -> dict[str, Any]:
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    dense = [name for name, module in model.named_modules() if is_linear(module) and not isinstance(module, NF4Linear)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=any(layer.quantized.nested for layer in layers),
        bnb_4bit_compute_dtype=_dtype(model),
        llm_int8_skip_modules=dense,
    ).to_dict()


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.dtype
    return dtype

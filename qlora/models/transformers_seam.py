"""Every name of transformers that is not public and that we use anyway, in one place.

    stream_config(...)         a quantizer that quantizes nothing: it shows each checkpoint tensor to a function of ours
    forget_quantizer           takes the marks of that quantizer off the loaded model
    attention_implementation   which attention a model runs, and whether it lets another be chosen
    LOADING                    a lock: transformers makes one model at a time
    loaded_from                the name that a model was loaded by

Each was tried with transformers 5.17 and 5.23, and each has a test in tests/models/test_transformers_seam.py. The
quantizer is the extension point that transformers offers; how it is called and what it leaves behind is private. The
alternative, a loader of our own, would know each architecture's renamed, sharded and tied weights.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "qlora_stream"

# Held while transformers makes a model: it sets torch's default dtype and replaces torch's initializers meanwhile, for
# the whole process. 5.17, 5.23
LOADING = threading.RLock()


def stream_config(
    prepare: Callable[[nn.Module], None],
    wants: Callable[[str], bool],
    on_tensor: Callable[[str, Any], dict[str, Tensor]],
    as_stored: Callable[[str], bool] = lambda name: False,
) -> QuantizationConfigMixin:
    """The `quantization_config` of a load that shows tensors to `on_tensor(name, tensor)`, which returns what to put
    into the model, by full name. `prepare` sees the empty model first; `wants` picks tensors by name, and `as_stored`
    those that come in the type of the checkpoint.

    The quantizer is registered with transformers at the first call, not when this module is imported.
    """
    _register()
    return _StreamConfig(prepare, wants, on_tensor, as_stored)


@functools.cache
def _register() -> None:
    # `register_*` refuse a name that is taken, so this runs once a process. 5.17, 5.23
    register_quantization_config(METHOD)(_StreamConfig)
    register_quantizer(METHOD)(_StreamQuantizer)


class _StreamConfig(QuantizationConfigMixin):
    """Carries the four functions of `stream_config` to the quantizer."""

    def __init__(
        self,
        prepare: Callable[[nn.Module], None],
        wants: Callable[[str], bool],
        on_tensor: Callable[[str, Any], dict[str, Tensor]],
        as_stored: Callable[[str], bool],
    ):
        self.quant_method = METHOD  # type: ignore[assignment]  # an enum of their own; registered names are plain text
        self.prepare, self.wants, self.on_tensor, self.as_stored = prepare, wants, on_tensor, as_stored

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}  # not the functions: transformers copies and prints this


class _StreamQuantizer(HfQuantizer):
    """Runs `on_tensor` on each tensor of the checkpoint that `wants` names, in place of a quantization.

    Methods of `HfQuantizer` that the loader calls: 5.17, 5.23.
    """

    quantization_config: _StreamConfig
    is_trainable = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Prepare the empty model, and show the loader floating-point weights where codes will lie.

        transformers (5.17) casts each tensor of the file to the dtype of the parameter or buffer of its name before we
        see it. The `weight` of a quantized layer is a uint8 buffer, so a bf16 weight would arrive cast to integers.
        Until it is loaded, that buffer is therefore an empty tensor of the model's own dtype, on the meta device, where
        it takes no memory. `on_tensor` returns the codes, which take its place with their own dtype.
        """
        self.quantization_config.prepare(model)
        codes = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if "weight" in module._buffers and module.get_buffer("weight").dtype == torch.uint8
        }
        for module in codes.values():
            module.weight = torch.empty_like(module.get_buffer("weight"), dtype=model.dtype)
        self.codes = set(codes)
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        _leave_uncast(model, [name for name in names if self.quantization_config.as_stored(name)])

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes an element in the loaded model, from which memory is set aside on a GPU beforehand."""
        return 1 if param_name in self.codes else param.element_size()

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self.quantization_config.wants(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _OnTensor(self.quantization_config.on_tensor)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False


def _leave_uncast(model: PreTrainedModel, names: list[str]) -> None:
    """Let the loader take these tensors as the file has them: `_get_dtype_plan` gives {pattern: dtype to cast to}, and
    None casts to nothing. 5.17, 5.23
    """
    if names:
        plan, pattern = model._get_dtype_plan, f"^(?:{'|'.join(map(re.escape, names))})$"
        vars(model)[_PLAN] = lambda dtype: {pattern: None} | plan(dtype)


_PLAN = "_get_dtype_plan"


class _OnTensor(ConversionOps):
    """The loader's conversion step: names and tensors in, names and tensors out. 5.17, 5.23"""

    def __init__(self, on_tensor: Callable[[str, Any], dict[str, Tensor]]):
        self.on_tensor = on_tensor

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            result |= self.on_tensor(name, value[0] if isinstance(value, list) else value)
        return result


def forget_quantizer(model: PreTrainedModel) -> None:
    """An ordinary model again: Trainer and save_pretrained refuse models that a quantizer has marked. The plan of
    `_leave_uncast` goes too.

    The marks: `config._is_quantized` and `config.quantization_config` of the model and of every model in it;
    `hf_quantizer`, `quantization_method` and `is_quantized` of the model. 5.17, 5.23
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
            if hasattr(module.config, "quantization_config"):
                del module.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    vars(model)["is_quantized"] = False
    vars(model).pop(_PLAN, None)


def attention_implementation(model: Any) -> str:
    """The name of the attention that a model, or a module of it with a config, runs, such as "sdpa":
    `config._attn_implementation`. 5.17, 5.23
    """
    name: str = model.config._attn_implementation
    return name


def takes_attention(model: PreTrainedModel) -> bool:
    """Whether `set_attn_implementation` has an effect on `model`: `_can_set_attn_implementation`. 5.17, 5.23"""
    return model._can_set_attn_implementation()


def loaded_from(model: nn.Module) -> str | None:
    """The folder or hub id that a model was loaded from, or None: `config._name_or_path`. 5.17, 5.23"""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None

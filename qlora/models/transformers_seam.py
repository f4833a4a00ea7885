"""TODO head of models.transformers_seam."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora.layers.linear import NF4Linear


@register_quantization_config("qlora_stream")
class StreamConfig(QuantizationConfigMixin):
    def __init__(self, prepare=None, wants=None, visit=None):
        self.quant_method = "qlora_stream"
        self.prepare, self.wants, self.visit = prepare, wants, visit

    def to_dict(self):
        return {"quant_method": self.quant_method}


@register_quantizer("qlora_stream")
class _StreamQuantizer(HfQuantizer):
    """Runs `visit` on each tensor of the checkpoint that `wants` names, in place of a quantization."""

    is_trainable = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.quantization_config.prepare(model)
        # transformers 5.17 casts each tensor to the dtype of its place before it is visited, and the place of codes is
        # uint8.
        self.codes = {
            f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, NF4Linear)
        }
        for module in self.codes.values():
            module.weight = torch.empty_like(module.weight, dtype=model.dtype)

    def param_element_size(self, model, param_name, param):  # of what is loaded, for an allocation beforehand on a GPU
        return 1 if param_name in self.codes else param.element_size()

    def param_needs_quantization(self, model, param_name, **kwargs):
        return self.quantization_config.wants(param_name)

    def get_quantize_ops(self):
        return _Visit(self.quantization_config.visit)

    def is_serializable(self, *args, **kwargs):
        return False


class _Visit(ConversionOps):
    def __init__(self, visit):
        self.visit = visit

    def convert(self, input_dict, **kwargs):
        result = {}
        for name, value in input_dict.items():
            result |= self.visit(name, value[0] if isinstance(value, list) else value)
        return result


def forget_quantizer(model: PreTrainedModel) -> None:
    """An ordinary model again: Trainer and save_pretrained refuse models that a quantizer has marked."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
            if hasattr(module.config, "quantization_config"):
                del module.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False

"""The model of a run, in the one order of its parts: base, adapters, recomputation, forward mode.

    assemble(source, spec, device)                  real weights, as `finetune` trains them
    assemble(source, spec, device, architecture)    the same on meta tensors, of any number of layers, without weights

The recipe and the plan call the same function, so what is planned is what runs. The alternative, a second assembler for
the plan, drifts from the first with every new part.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, set_seed

from qlora.layers.attach import attach
from qlora.layers.fused import fuse
from qlora.layers.loss import expected_layout, layout_of
from qlora.models.device import DTYPES
from qlora.models.load import load_source
from qlora.models.quantize import LinearLayers
from qlora.models.source import Source
from qlora.specs import AdapterSpec, Quantization
from qlora.train.step import checkpoint_activations
from qlora_kernels import ops


@dataclass(frozen=True)
class ModelSpec:
    """What the model of a run is made of. `dtype` is a name of `models.device.DTYPES`."""

    quantization: Quantization
    adapter: AdapterSpec
    dtype: str
    gradient_checkpointing: bool = False
    seed: int = 0


def assemble(
    source: Source, spec: ModelSpec, device: torch.device, architecture: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The model that is trained on `device`: frozen base with adapters, ready for `loss_sum`.

    Args:
        architecture: given, the model is empty, on the meta device and of this config, and nothing is read or drawn.

    Raises:
        UserError: see `load_base` and `attach`.
    """
    if architecture is None:
        model = load_source(source, spec.quantization, dtype=spec.dtype, device=str(device))
        set_seed(spec.seed)
    else:
        model = empty_base(source, spec, architecture)
        if device.type == "cpu" and ops.NATIVE is not None:
            _fuse_empty(model)
    with nullcontext() if architecture is None else torch.device("meta"):
        attach(model, spec.adapter)
    if spec.gradient_checkpointing:
        checkpoint_activations(model)
    _decide_forward_mode(model, empty=architecture is not None)
    return model


def _decide_forward_mode(model: PreTrainedModel, empty: bool) -> None:
    """Whether examples are packed or padded: by comparing numbers, and of an empty model by what will be found."""
    if empty:
        model.qlora_layout = expected_layout(model)  # type: ignore[assignment]
    else:
        layout_of(model)


def empty_base(source: Source, spec: ModelSpec, architecture: PretrainedConfig) -> PreTrainedModel:
    """The frozen base on the meta device, its layers quantized as `spec` says but for what only weights can tell."""
    dtype = DTYPES[spec.dtype]
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            architecture, dtype=dtype, trust_remote_code=source.trust_remote_code
        )
    quantization = dataclasses.replace(spec.quantization, scales=None)
    LinearLayers(dataclasses.replace(source, packed=False), quantization).prepare(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def _fuse_empty(model: nn.Module) -> None:
    """`fuse` compares results, so the vectors (norms) have values for a moment."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.dim() == 1:
                module._parameters[name] = nn.Parameter(torch.ones(p.shape, dtype=p.dtype), requires_grad=False)
    fuse(model)
    model.to("meta")

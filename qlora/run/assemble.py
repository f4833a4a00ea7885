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
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qlora.errors import guard
from qlora.layers.attach import attach
from qlora.layers.dropout import Draws, base_drops
from qlora.layers.forward_mode import choose_forward_mode, expected_forward_mode
from qlora.layers.fused import fuse
from qlora.models.device import DTYPES
from qlora.models.load import load_source
from qlora.models.quantize import QuantizePass
from qlora.models.source import Source
from qlora.models.transformers_seam import LOADING
from qlora.specs import AdapterSpec, Quantization
from qlora.train.rng import seed_generators
from qlora.train.step import checkpoint_activations
from qlora.train.trial import trial_step
from qlora_kernels import backends


@dataclass(frozen=True)
class ModelSpec:
    """What the model of a run is made of. `dtype` is a name of `models.device.DTYPES`."""

    quantization: Quantization
    adapter: AdapterSpec
    dtype: str
    gradient_checkpointing: bool = False
    packing: str = "auto"  # see `choose_forward_mode`
    seed: int = 0


def assemble(
    source: Source, spec: ModelSpec, device: torch.device, architecture: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The model that is trained on `device`: frozen base with adapters, ready for `loss_sum`.

    Args:
        architecture: given, the model is empty, on the meta device and of this config, and nothing is read or drawn.

    Raises:
        UserError: see `load_base`, `attach`, `choose_forward_mode` and `trial_step`.
    """
    draws = None
    if architecture is None:
        model = load_source(source, spec.quantization, dtype=spec.dtype, device=str(device))
        seed_generators(spec.seed)
        draws = Draws(spec.seed, device, spec.adapter.dropout > 0, base_drops(model.config))
    else:
        model = empty_base(source, spec, architecture)
        if backends.has_fused_elementwise(torch.device("meta")):  # as `load_source` asks of the real device
            fuse(model, join=backends.has_joined_products(torch.device("meta")))
    with nullcontext() if architecture is None else torch.device("meta"):
        attach(model, spec.adapter, draws=draws)
    if spec.gradient_checkpointing:
        with guard("gradient_checkpointing", True, f"{model.config.model_type} cannot recompute", "Leave it out"):
            checkpoint_activations(model)
    if architecture is None:
        choose_forward_mode(model, spec.packing)
        trial_step(model)
    else:
        expected_forward_mode(model)  # there are no numbers to compare
    return model


def empty_base(source: Source, spec: ModelSpec, architecture: PretrainedConfig) -> PreTrainedModel:
    """The frozen base on the meta device, its layers quantized as `spec` says but for what only weights can tell."""
    dtype = DTYPES[spec.dtype]
    with LOADING, torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            architecture, dtype=dtype, trust_remote_code=source.trust_remote_code
        )
    quantization = dataclasses.replace(spec.quantization, scales=None)
    QuantizePass(dataclasses.replace(source, packed=False), quantization).prepare(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model

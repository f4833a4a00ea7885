"""Loading a base model, quantizing tensor by tensor as it streams in.

    Source -> load_streaming(on_tensor): every tensor passes once, under its name in the model -> load_base, merge,
    `qlora quantize`

`load_streaming` hands transformers a quantizer whose only conversion is our `on_tensor(name, tensor)`; transformers
does what it knows best (architectures, renamed and sharded checkpoints, tied weights, non-persistent buffers) and never
holds more than one unquantized tensor. Loading quantizes in `on_tensor`; `merge` and `qlora quantize` write to shards
in it and keep nothing. The alternative not taken: a loader of our own for each architecture.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qlora.errors import UserError, guard, problem
from qlora.layers.fused import fuse
from qlora.models.device import DTYPES, resolve_device, resolve_dtype
from qlora.models.gguf import GGUFTensor, gguf_tensors
from qlora.models.info import BaseInfo, info
from qlora.models.packed import packed_tensors
from qlora.models.quantize import QuantizePass, check_finite
from qlora.models.saver import saves_what_loads
from qlora.models.source import Source, is_pickled, load_config, refuse_size, resolve
from qlora.models.transformers_seam import LOADING, forget_quantizer, stream_config
from qlora.selftest.first_use import check_first_use
from qlora.specs import Quantization
from qlora_kernels import backends

OnTensor = Callable[[str, Any], dict[str, Tensor]]


def lazy_tensors(source: Source, config: PretrainedConfig, dtype: torch.dtype | str) -> dict[str, object] | None:
    """The tensors that `load_streaming` must hand to transformers, or None where transformers reads the folder."""
    if source.gguf is not None:
        return gguf_tensors(source.gguf, config, dtype)
    return packed_tensors(source) if source.packed else None


@dataclass
class _Watched:
    """`on_tensor` with its errors kept: transformers turns an exception in it into a report of its own."""

    on_tensor: OnTensor
    problems: list[str] = field(default_factory=list)
    raised: list[Exception] = field(default_factory=list)

    def __call__(self, name: str, value: Any) -> dict[str, Tensor]:
        try:
            return self.on_tensor(name, value)
        except UserError as error:
            self.problems.extend(error.problems)
            raise
        except Exception as error:  # a disk that is full, or a defect of ours: neither is a fault of the model's
            self.raised.append(error)
            raise

    def raise_ours(self) -> None:
        """Raise what `on_tensor` raised, if that is why loading stopped."""
        if self.problems:
            raise UserError(self.problems) from None
        if self.raised:
            raise self.raised[0] from None


def load_streaming(
    source: Source,
    on_tensor: OnTensor,
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    wants: Callable[[str], bool] = lambda name: True,
    as_stored: Callable[[str], bool] = lambda name: False,
) -> PreTrainedModel:
    """Load a causal language model, passing each checkpoint tensor that `wants` names through `on_tensor`.

    Args:
        source: the model on disk.
        on_tensor: takes a name and a tensor, returns what to put into the model, by full name.
        dtype: of the tensors; "auto": that of the config, of a GGUF file float32.
        device: where they go.
        prepare: sees the empty model first.
        wants: whether a tensor of this name is passed through `on_tensor`.
        as_stored: whether a tensor of this name comes in the type of the checkpoint; of a GGUF file in float32.

    Raises:
        UserError: the checkpoint lacks tensors, has them in other shapes, or `on_tensor` found something wrong.
        OSError: what `on_tensor` writes could not be written.
    """
    dtype = torch.float32 if source.gguf is not None and dtype == "auto" else dtype  # its header names none
    watched = _Watched(on_tensor)
    shapes: dict[str, torch.Size] = {}
    lazy: dict[str, object] | None = None

    def prepared(model: nn.Module) -> None:
        refuse_size(source, sum(parameter.numel() for parameter in model.parameters()))
        prepare(model)
        shapes.update((name, parameter.shape) for name, parameter in model.named_parameters())
        for name, tensor in (lazy or {}).items():
            if isinstance(tensor, GGUFTensor) and as_stored(name):
                tensor.dtype = torch.float32

    place = source.gguf or source.folder
    try:
        with guard("model", place, "cannot be loaded", "Check that the folder is whole"), LOADING:
            config = load_config(source)
            lazy = lazy_tensors(source, config, dtype)
            model, loading = _loaded(
                source, config, lazy, stream_config(prepared, wants, watched, as_stored), dtype, device
            )
    except UserError as error:
        watched.raise_ours()
        if error.__cause__ is not None and is_pickled(source):  # torch's own words explain how to run such code
            rule = "its weights are a pickle that is damaged, or would run code"
            raise UserError(problem("model", place, rule, "Get them as safetensors")) from error
        raise
    problems = watched.problems + _misfits(model, loading, shapes)
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        rule = f"the checkpoint does not fit its config ({shown})"
        raise UserError(problem("model", place, rule, "Get the whole checkpoint again"))
    forget_quantizer(model)
    return model


def _loaded(
    source: Source,
    config: PretrainedConfig,
    lazy: dict[str, object] | None,
    quantizer: Any,
    dtype: torch.dtype | str,
    device: torch.device,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and transformers' account of what was missing or did not fit."""
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "device_map": {"": device},
        "quantization_config": quantizer,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they come back in the account and are refused, all of them with the rest
    }
    factory: Any = AutoModelForCausalLM  # its annotations do not know `output_loading_info`
    if lazy is None:
        model, loading = factory.from_pretrained(
            source.folder, weights_only=True, trust_remote_code=source.trust_remote_code, **options
        )
    else:
        with torch.device("meta"):  # AutoModel takes no state dict, the class itself does
            architecture = type(factory.from_config(config, trust_remote_code=source.trust_remote_code))
        model, loading = architecture.from_pretrained(None, state_dict=lazy, **options)
    return model, loading


def _misfits(model: nn.Module, loading: dict[str, Any], shapes: dict[str, torch.Size]) -> list[str]:
    """What the checkpoint lacks, and what it has in another shape than the empty model had."""
    misfits = {name: (found, needed) for name, found, needed in loading["mismatched_keys"]}
    # transformers 5.17 does not look at shapes where there is a quantizer.
    misfits |= {
        name: (p.shape, shapes[name]) for name, p in model.named_parameters() if p.shape != shapes.get(name, p.shape)
    }
    return [f"{name} is missing" for name in sorted(loading["missing_keys"])] + [
        f"{name} is {tuple(found)}, the model needs {tuple(needed)}"
        for name, (found, needed) in sorted(misfits.items())
    ]


def embedding_rows(model: nn.Module) -> int | None:
    """The size of the vocabulary that a model has room for; None where it has no embedding that transformers knows."""
    try:
        return len(cast(Any, model).get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def load_base(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    **quantization: Any,
) -> PreTrainedModel:
    """A frozen base model from a folder, a .gguf file, a hub id or "smollm2-135m", with every linear layer but the head
    in NF4 (`bits=4`) or as it is (`bits=16`). Peak memory: the result and about two of its largest tensors.
    `quantization` are the fields of `specs.Quantization`: bits, blocksize, double_quant, scales.

    Returns an ordinary transformers model in evaluation mode; `model.qlora.base` records how it was made.

    Raises:
        UserError: nothing to load, a checkpoint that is incomplete or contradicts the options, or NaN or inf in a
        weight (named).
    """
    source = resolve(model, revision, trust_remote_code=trust_remote_code)
    return load_source(source, Quantization(**quantization), dtype=dtype, device=device)


def load_source(
    source: Source, quantization: Quantization, *, dtype: str = "auto", device: str = "auto"
) -> PreTrainedModel:
    """`load_base` of a model that was found already.

    Raises:
        UserError: see `load_base`.
    """
    place = resolve_device(device)
    if place.type != "cpu":  # a CPU's kernels are tested by CI on every instruction set
        check_first_use(place)
    dtype = resolve_dtype(dtype, place)
    layers = QuantizePass(source, quantization)
    loaded = load_streaming(
        source,
        layers.on_tensor,
        dtype=DTYPES[dtype],
        device=place,
        prepare=layers.prepare,
        wants=layers.wants,
        as_stored=layers.reads_stored,
    )
    check_finite(loaded)
    loaded.requires_grad_(False)
    made, names = layers.quantization, [name for name, _ in loaded.named_parameters() if not layers.wants(name)]
    for name in names:
        layers.fingerprint.add_other(name, loaded.get_parameter(name))
    info(loaded).base = BaseInfo(
        source.name,
        source.revision,
        made.bits,
        made.blocksize,
        made.double_quant,
        dtype,
        layers.fingerprint.digest(names),
        made.scales,
        embedding_rows(loaded),
        layers.stored,
        made.cast_to,
    )
    if backends.has_fused_elementwise(place):
        fuse(loaded, join=backends.has_joined_products(place))
    if made.bits != 16:  # transformers itself saves a model in 16 bits, until it gets an adapter
        saves_what_loads(loaded)
    return loaded.eval()

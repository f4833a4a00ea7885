"""Loading a base model, quantizing tensor by tensor as it streams in.

    Source -> stream(visit): every tensor passes once, under its name in the model -> load_base, merging, `qlora
    quantize`

`stream` hands transformers a quantizer whose only conversion is our `visit(name, tensor)`; transformers does what it
knows best (architectures, renamed and sharded checkpoints, tied weights, non-persistent buffers) and never holds more
than one unquantized tensor. Loading quantizes in `visit`; merging and `qlora quantize` write to shards in it and keep
nothing.
The alternative not taken: a loader of our own for each architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora.errors import UserError, problem
from qlora.layers.fused import fuse
from qlora.models.device import DTYPES, bound_kernel_caches, resolve_device, resolve_dtype
from qlora.models.gguf import gguf_tensors
from qlora.models.packed import packed_tensors
from qlora.models.quantize import BaseRecipe, LinearLayers
from qlora.models.source import Source, load_config, resolve
from qlora.models.transformers_seam import StreamConfig, forget_quantizer
from qlora.specs import Quantization
from qlora_kernels import backends


def lazy_tensors(source: Source, config, dtype: torch.dtype | str) -> dict[str, object] | None:
    """The tensors that `model.stream` must hand to transformers itself, or None where transformers reads the folder."""
    if source.gguf is not None:
        return gguf_tensors(source.gguf, config, dtype)
    return packed_tensors(source) if source.packed else None


def stream(
    source: Source,
    visit: Callable[[str, object], dict[str, Tensor]],
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    wants: Callable[[str], bool] = lambda name: True,
) -> PreTrainedModel:
    """Load a causal language model, passing each checkpoint tensor that `wants` names through `visit(name, tensor)`,
    which returns what to put into the model, by full name. `dtype` is that of the tensors ("auto": as stored);
    `prepare(model)` sees the empty model first.

    Raises:
        UserError: the checkpoint lacks tensors, has them in other shapes, or `visit` found something wrong.
        OSError: what `visit` writes could not be written.
    """
    config = load_config(source)
    problems: list[str] = []
    unwritten: list[OSError] = []

    def guarded(name: str, value: object) -> dict[str, Tensor]:
        try:
            return visit(name, value)
        except (
            UserError
        ) as error:  # transformers turns an exception here into a report of its own; ours is raised below
            problems.extend(error.problems)
            raise
        except OSError as error:
            unwritten.append(error)
            raise

    shapes: dict[str, torch.Size] = {}

    def prepared(model: nn.Module) -> None:
        prepare(model)
        shapes.update((name, parameter.shape) for name, parameter in model.named_parameters())

    options = dict(
        config=config,
        dtype=dtype,
        device_map={"": device},
        quantization_config=StreamConfig(prepared, wants, guarded),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they come back in the info and are refused below, all of them with the rest
    )
    lazy = lazy_tensors(source, config, dtype)
    try:
        if lazy is None:
            model, info = AutoModelForCausalLM.from_pretrained(
                source.folder, weights_only=True, trust_remote_code=source.trust_remote_code, **options
            )
        else:
            with torch.device("meta"):  # AutoModel takes no state dict, the class itself does
                architecture = type(
                    AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
                )
            model, info = architecture.from_pretrained(None, state_dict=lazy, **options)
    except (RuntimeError, OSError, ValueError) as error:
        if problems:
            raise UserError(problems) from None
        if unwritten:
            raise unwritten[0] from None
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, UserError):
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                problem(
                    "model",
                    source.gguf or source.folder,
                    f"cannot be loaded ({reason})",
                    "Check that the folder is whole",
                )
            ) from error
        raise
    problems += [f"{name} is missing" for name in sorted(info["missing_keys"])]
    misfits = {name: (found, needed) for name, found, needed in info["mismatched_keys"]}
    # transformers 5.17 does not look at shapes where there is a quantizer.
    misfits |= {
        name: (p.shape, shapes[name]) for name, p in model.named_parameters() if p.shape != shapes.get(name, p.shape)
    }
    problems += [
        f"{name} is {tuple(found)}, the model needs {tuple(needed)}"
        for name, (found, needed) in sorted(misfits.items())
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(
            problem(
                "model",
                source.gguf or source.folder,
                f"the checkpoint does not fit its config ({shown})",
                "Get the whole checkpoint again",
            )
        )
    forget_quantizer(model)
    return model


def load_base(
    model: str,
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

    Returns an ordinary transformers model in evaluation mode; `model.qlora_base` records how it was made.

    Raises:
        UserError: nothing to load, a checkpoint that is incomplete or contradicts the options, or NaN or inf in a
        weight (named).
    """
    source = resolve(model, revision, trust_remote_code=trust_remote_code)
    return load_source(source, Quantization(**quantization), dtype=dtype, device=device)


def load_source(
    source: Source, quantization: Quantization, *, dtype: str = "auto", device: str = "auto"
) -> PreTrainedModel:
    """`load_base` of a model that was found already."""
    place = resolve_device(device)
    dtype = resolve_dtype(dtype, place)
    layers = LinearLayers(source, quantization)
    bound_kernel_caches()
    loaded = stream(source, layers.visit, dtype=DTYPES[dtype], device=place, prepare=layers.prepare, wants=layers.wants)
    loaded.requires_grad_(False)
    loaded.config.use_cache = False
    made = layers.quantization
    loaded.qlora_base = BaseRecipe(
        source.name,
        source.revision,
        made.bits,
        made.blocksize,
        made.double_quant,
        dtype,
        layers.fingerprint(),
        made.scales,
    )
    if backends.has_fused_elementwise(place):
        fuse(loaded)
    return loaded.eval()
